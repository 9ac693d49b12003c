"""LoRA (arXiv:2106.09685) through PEFT: small matrices beside the frozen weights; QLoRA (arXiv:2305.14314) over a 4-bit base."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import importlib.util
import shutil
import warnings
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from finetune_assets.errors import TrainingError
from finetune_assets.storage import read_json, write_json
from finetune_assets.training import base_model as base_models
from finetune_assets.worker import models


def check_quantised() -> None:
    """Raises TrainingError where a 4-bit base cannot be trained."""
    if not torch.cuda.is_available() or importlib.util.find_spec("bitsandbytes") is None:
        raise TrainingError(
            "adapter `qlora` needs an NVIDIA GPU and the package bitsandbytes (`pip install 'finetune-assets[qlora]'`). "
            "Set `adapter: lora`, or train on a machine that has both."
        )


def new(model: PreTrainedModel, base: str, values: dict[str, Any]) -> PeftModel:
    """Fresh matrices beside every linear layer but the output layer. `values`: lora_rank, lora_alpha."""
    config = LoraConfig(
        r=int(values["lora_rank"]),
        lora_alpha=int(values["lora_alpha"]),
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # GPT-2's transposed layers: PEFT sets fan_in_fan_out by itself, and says so
        return cast("PeftModel", get_peft_model(model, config))


def load_quantised(path_or_id: str, revision: str | None) -> PreTrainedModel:
    """The base in 4 bits (NF4, twice quantised), products in bfloat16. Raises TrainingError, ModelUnavailable."""
    check_quantised()
    source = base_models.resolve(path_or_id)
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
    )
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            source,
            revision=revision,
            quantization_config=config,
            device_map={"": torch.cuda.current_device()},
            dtype=torch.bfloat16,
        )
    except Exception as error:
        raise models.unavailable(source, error) from error
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def merged(base: str, revision: str | None, folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The base in float32 with the adapter added to its weights, then in `dtype`; in main memory."""
    whole: Any = models.load_model(base, "float32", revision, torch.device("cpu"))
    return models.attach(whole, folder).merge_and_unload().to(dtype)


def keep(best: Path, folder: Path) -> None:
    """Copies an adapter. Its layers are a set to PEFT, written in another order by each process: here they have one."""
    shutil.copy2(best / "adapter_model.safetensors", folder / "adapter_model.safetensors")
    config = read_json(best / "adapter_config.json")
    if isinstance(layers := config.get("target_modules"), list):
        config["target_modules"] = sorted(cast("list[str]", layers))
    write_json(folder / "adapter_config.json", config)
