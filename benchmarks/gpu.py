"""Training of Qwen2.5-0.5B- and 1.5B-shaped models on one GPU, rows of 2,048 tokens, beside plain TRL in the same run.

    python benchmarks/run.py gpu

Random weights do for speed. Ours is the plan's own probe (ten steps of the training, the first two not counted), TRL's the same
steps on the same tokens. MFU: useful operations (6 a weight and token, 4 with an adapter, and 12 · layers · width · length for
attention: Chowdhery et al., arXiv:2204.02311, appendix B) beside the card's own rate in products of 8,192² bfloat16 matrices,
measured here. Without a GPU there is one row, which says that nothing was measured.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT, Row
from finetune_assets.storage import read_json, write_json
from finetune_assets.training import base_model, plan, presets
from finetune_assets.training.machine import has_gpu

LENGTH = 2048
BATCH = 8
MFU = 0.5
CLOSE = 0.1
QWEN = {"num_key_value_heads": 2, "vocab_size": 151_936, "tie_word_embeddings": True, "max_position_embeddings": 32_768}
SHAPES: dict[str, dict[str, Any]] = {
    "0.5B": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14, **QWEN},
    "1.5B": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12, **QWEN},
}


def rows(rounds: int) -> list[Row]:
    """Two models, each in full and with LoRA; `rounds` is not used."""
    if not has_gpu():
        return [Row("training on a GPU", 0.0, note="unmeasured: this machine has no NVIDIA GPU")]
    with tempfile.TemporaryDirectory() as name:
        text(Path(name))
        best = float(_child(["matrix"], Path(name) / "matrix")["flops"])
        return [_row(size, adapter, Path(name), best) for size in SHAPES for adapter in ("full", "lora")]


def _row(size: str, adapter: str, folder: Path, best: float) -> Row:
    ours, theirs, estimated = measured(SHAPES[size], adapter, folder / f"{size}-{adapter}", folder / "text")
    shape = base_model.shape(str(folder / f"{size}-{adapter}" / "model"))
    assert shape is not None
    each = plan.OPERATIONS[adapter] * shape.parameters + 12 * shape.layers * shape.hidden * LENGTH
    used = [one["tokens_per_second"] * each / best for one in (ours, theirs)]
    apart = estimated / ours["memory_bytes"] - 1
    return Row(
        f"{size} {adapter}: a million tokens on a GPU (wall seconds)",
        1e6 / ours["tokens_per_second"],
        "plain TRL",
        1e6 / theirs["tokens_per_second"],
        ours["memory_bytes"] // 2**20,
        f"MFU ≥ {MFU:.0%} in full fine-tuning, memory estimate within {CLOSE:.0%}",
        (used[0] >= MFU or adapter != "full") and abs(apart) <= CLOSE,
        f"{ours['tokens_per_second']:,.0f} and {theirs['tokens_per_second']:,.0f} tokens/s, MFU {used[0]:.0%} and {used[1]:.0%} "
        f"of {best / 1e12:,.0f} TFLOP/s; memory {ours['memory_bytes'] / 2**30:.1f} and {theirs['memory_bytes'] / 2**30:.1f} GiB, "
        f"estimated {estimated / 2**30:.1f} ({apart:+.0%})",
    )


def measured(
    config: dict[str, Any], adapter: str, folder: Path, text: Path, length: int = LENGTH
) -> tuple[dict[str, Any], dict[str, Any], int]:
    """Rate and memory of ours and of TRL, and the memory that the plan's formula expects."""
    _child(["model", json.dumps(config)], folder / "model")
    overrides = {"batch_size": BATCH, "max_length": length, "epochs": 1}
    values = presets.of_stage("default", "continued_pretraining", adapter, overrides)
    spec: dict[str, Any] = {
        "task": "probe",
        "text": str(text),
        "base_model": str(folder / "model"),
        "base_model_identity": base_model.identity(str(folder / "model")),
        "stages": [{"objective": "continued_pretraining", "hyperparameters": values.to_dict()}],
        **{"adapter": adapter, "seed": 42, "spec_hash": "benchmark", "output": str(folder / "ours")},
    }
    write_json(folder / "ours" / "spec.json", spec)
    _run([sys.executable, "-m", "finetune_assets.worker", str(folder / "ours" / "spec.json")])
    theirs = _child(["trl", str(folder / "ours" / "spec.json")], folder / "trl")
    shape = base_model.shape(str(folder / "model"))
    assert shape is not None
    return read_json(folder / "ours" / "result.json"), theirs, plan.estimate_memory(shape, values, length, adapter, gpu=has_gpu())


def text(folder: Path) -> None:
    """Three million characters; any will do: this repository's documents, again and again."""
    (folder / "text").mkdir()
    documents = "\n\n".join(file.read_text(encoding="utf-8") for file in sorted((ROOT / "docs").glob("*.md")))
    for number in range(-(-3_000_000 // len(documents))):
        (folder / "text" / f"{number}.md").write_text(f"{number}\n\n{documents}", encoding="utf-8")


def _run(command: list[str]) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    subprocess.run(command, env=environment, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def _child(arguments: list[str], output: Path) -> dict[str, Any]:
    output.mkdir(parents=True, exist_ok=True)
    _run([sys.executable, "-m", "benchmarks.gpu", *arguments, str(output)])
    return read_json(output / "measured.json")


def _make_model(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Random weights of that shape, with the shipped tokenizer, which has fewer tokens."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    base = ROOT / "data" / "base_model"
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy2(base / name, folder / name)
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(Qwen2Config(**config), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return {}


def _matrix_rate() -> dict[str, Any]:
    """Floating-point operations a second in bfloat16 products."""
    import torch

    size, times = 8192, 50
    one, other = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(5):
        one @ other
    torch.cuda.synchronize()
    start = time.monotonic()
    for _ in range(times):
        one @ other
    torch.cuda.synchronize()
    return {"flops": 2 * size**3 * times / (time.monotonic() - start)}


def _trl(spec_file: Path, output: Path) -> dict[str, Any]:
    """The same steps on the same tokens by TRL's defaults."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    from finetune_assets.training.tokens import token_rows
    from finetune_assets.worker import models, probe

    spec = read_json(spec_file)
    values = spec["stages"][0]["hyperparameters"]
    tokenizer = AutoTokenizer.from_pretrained(spec["base_model"])
    read = token_rows(lambda: models.renderer(tokenizer), ("text", Path(spec["text"])), {}, values["max_length"])
    data = probe.evenly(read, BATCH * probe.STEPS).examples
    marks: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            marks.append(time.monotonic())

    arguments = SFTConfig(
        output_dir=str(output / "trainer"),
        use_cpu=not torch.cuda.is_available(),
        num_train_epochs=1,
        per_device_train_batch_size=BATCH,
        max_length=values["max_length"],
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    lora = LoraConfig(r=values["lora_rank"], lora_alpha=values["lora_alpha"], target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(spec["base_model"], dtype=torch.float32),
        args=arguments,
        train_dataset=Dataset.from_list([{"input_ids": row["input_ids"]} for row in data]),
        processing_class=tokenizer,
        peft_config=lora if spec["adapter"] == "lora" else None,
        callbacks=[Clock()],
    )
    trainer.train()
    tokens = sum(len(row["input_ids"]) for row in data) * (len(marks) - probe.WARM) / len(marks)
    memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return {"tokens_per_second": tokens / (marks[-1] - marks[probe.WARM - 1]), "memory_bytes": int(memory)}


if __name__ == "__main__":
    kind, *given = sys.argv[1:]
    out = Path(given[-1])
    if kind == "model":
        made = _make_model(json.loads(given[0]), out)
    else:
        made = _matrix_rate() if kind == "matrix" else _trl(Path(given[0]), out)
    write_json(out / "measured.json", made)
