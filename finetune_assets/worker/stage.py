"""One stage of a chain: its weights, rows and loop. How it is trained to its end: `worker.attempt`.

<job>/stages/<n>-<objective>/   checkpoints/, training_log.jsonl, recovery.json, reference.json (dpo, kto),
                                best/ (the result: weights, or an adapter's alone) and result.json, written last
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.kto_config import KTOConfig
from trl.trainer.sft_config import SFTConfig

from finetune_assets.errors import DataError, TrainingError
from finetune_assets.storage import read_json, write_json
from finetune_assets.training.machine import default_precision, free_threads, has_gpu, multiplies_bfloat16
from finetune_assets.training.tokens import Rows, token_rows
from finetune_assets.worker import adapters, attention, models, precision, preferences, ranks, shards
from finetune_assets.worker.loops import DpoLoop, KtoLoop, Resumable, SftLoop, Totals
from finetune_assets.worker.progress import Progress
from finetune_assets.worker.recovery import Recovery
from finetune_assets.worker.rows import Filled, FixedBatches, LengthGrouped, longest_first, no_targets
from finetune_assets.worker.watch import CHECKPOINT_SECONDS, Place, Watch

PADDED_TO = 16
"""Few different shapes: on a CPU every new one costs compiled kernels and fragments the heap (3.1 GB after 560 steps of the 3M
model without it, 1.2 GB with it, at the same speed)."""

SFT_WEIGHT = 10.0
"""Weight of the chosen reply's own loss, a mean over tokens, beside DPO's, a sum (Pang et al., arXiv:2404.19733): alone, DPO
makes good replies unlikely. On the sample, with LoRA after a tenth of an epoch of sft: held-out good replies lose 0.034 nats
a token at weight 1 [0.003, 0.069], 0.014 at 5 [0.003, 0.024], 0.004 at 10 [-0.001, 0.012]; the margin is 0.12, 0.07, 0.05."""

FILES = {
    "sft": ("chat", "train.jsonl", "validation.jsonl"),
    "tools": ("chat", "train.jsonl", "validation.jsonl"),
    "dpo": ("preferences", "preferences.jsonl", "preferences_heldout.jsonl"),
    "kto": ("kto", "kto.jsonl", "kto_heldout.jsonl"),
}
LOOPS: dict[str, type[Resumable]] = {"dpo": DpoLoop, "kto": KtoLoop}


@dataclass(frozen=True)
class Stage:
    """What a stage trains. `start`: the folder of the stage before, None for the base model."""

    spec: dict[str, Any]
    number: int
    start: Path | None

    @property
    def objective(self) -> str:
        """sft, dpo, …"""
        return str(self.spec["stages"][self.number]["objective"])

    @property
    def values(self) -> dict[str, Any]:
        """Hyper-parameters."""
        return self.spec["stages"][self.number]["hyperparameters"]

    @property
    def smallest(self) -> int:
        """Least micro-batch: kto compares rows of one."""
        return 2 if self.objective == "kto" else 1

    @cached_property
    def place(self) -> Place:
        """Folder and name."""
        folder = Path(self.spec["output"]) / "stages" / f"{self.number}-{self.objective}"
        several = len(self.spec["stages"]) > 1
        name = self.objective if several else "train"
        return Place(folder, name, int(self.values["patience"]), float(self.spec.get("checkpoint_seconds", CHECKPOINT_SECONDS)))

    @property
    def bf16(self) -> bool:
        """Whether products are in bfloat16; on a GPU only where it has instructions for it."""
        if not torch.cuda.is_available():
            return self.spec["precision"] == "bfloat16"
        wanted = self.spec["precision"] == "bfloat16" or not has_gpu()  # a GPU that the precision was chosen without
        return wanted and torch.cuda.is_bf16_supported(including_emulation=False)

    @property
    def sharded(self) -> bool:
        """Whether several processes share the weights."""
        return self.spec.get("parallel") == "fsdp" and ranks.count() > 1

    @property
    def revision(self) -> str | None:
        """Commit of a hub model."""
        return self.spec["base_model_identity"].get("revision")


def on_this_machine(spec: dict[str, Any]) -> dict[str, Any]:
    """The spec with threads and precision, which the machine where the training first starts decides for all its starts."""
    file = Path(spec["output"]) / "machine.json"
    decided = read_json(file) if file.exists() else {"threads": free_threads(), "precision": default_precision()}
    missing = {name: value for name, value in decided.items() if not spec.get(name)}
    if missing and not file.exists():
        write_json(file, decided)
    return {**spec, **missing}


def start_model(stage: Stage) -> PreTrainedModel:
    """The weights that the stage starts from, with an adapter where one is trained."""
    spec = stage.spec
    where = torch.device("cpu") if stage.sharded else None  # each process then takes its part to its GPU
    if spec["adapter"] == "full":
        if stage.start is not None:
            return models.load_model(stage.start, "float32", where=where)
        return models.load_model(spec["base_model"], "float32", stage.revision, where)
    if spec["adapter"] == "qlora":
        base = adapters.load_quantised(spec["base_model"], stage.revision)
    else:
        base = models.load_model(spec["base_model"], "float32", stage.revision, where)
    if stage.start is not None:
        return cast("PreTrainedModel", models.attach(base, stage.start, trainable=True))
    return cast("PreTrainedModel", adapters.new(base, spec["base_model"], stage.values))


def ready_model(stage: Stage, tokenizer: PreTrainedTokenizerBase, progress: Progress) -> tuple[PreTrainedModel, int]:
    """The model as it is trained, with the fastest attention and casts that it allows; and the most tokens of a row.

    Raises ModelUnavailable where the tokenizer is another model's.
    """
    model = start_model(stage)
    models.check_vocabulary(stage.spec["base_model"], tokenizer, model)
    max_length = fitting_length(stage, model, progress)
    attention.choose(model, max_length, bf16=stage.bf16)
    if stage.bf16:
        precision.cast_once(model)
    return model, max_length


def fitting_length(stage: Stage, model: PreTrainedModel, progress: Progress) -> int:
    """max_length, or the model's context where that is shorter."""
    wanted, context = int(stage.values["max_length"]), models.context_length(model)
    if context < wanted:
        progress.note(f"max_length {wanted} is more than the model's context: {context} is used.")
    return min(wanted, context)


def read_rows(stage: Stage, tokenizer: PreTrainedTokenizerBase, max_length: int, progress: Progress) -> tuple[Rows, Rows]:
    """Training and held-out rows, tokenised or from the cache. Raises DataError where there is nothing to train on."""
    spec = stage.spec
    cache = Path(spec["cache"]) if spec.get("cache") else None
    read = partial(
        token_rows, lambda: models.renderer(tokenizer), model=spec["base_model_identity"], max_length=max_length, cache=cache
    )
    progress.update("tokenise", 0, 1)
    with models.rendering(spec["base_model"]):
        if stage.objective == "continued_pretraining":
            train, heldout = read(("text", Path(spec["text"]))), Rows()
            where = spec["text"]
        else:
            kind, name, held = FILES[stage.objective]
            data = Path(spec["dataset"])
            train, heldout = read((cast("Any", kind), data / name)), read((cast("Any", kind), data / held))
            where = str(data / name)
    progress.update("tokenise", 1, 1)
    if not train.examples:
        raise DataError(f"{where} has no row that fits in {max_length} tokens. Raise hyperparameters.max_length.")
    if train.shortened or train.dropped:
        progress.note(
            f"{where}: {train.shortened:,} of {len(train.examples):,} examples lost their oldest turns to fit in {max_length} "
            f"tokens, {train.dropped:,} more were left out, since their reply leaves no room for a prompt."
        )
    size, seed = int(stage.values["batch_size"]), int(spec["seed"])
    return (
        preferences.arranged(stage.objective, train, size, seed, max_length),
        preferences.arranged(stage.objective, heldout, size, seed, max_length),
    )


def make_loop(
    stage: Stage,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: tuple[Rows, Rows],
    totals: Totals,
    recovery: Recovery,
) -> Resumable:
    """The loop with its data (`rows`: training, held out) and callbacks."""
    train, heldout = rows
    progress = recovery.progress
    size, seed = int(stage.values["batch_size"]), int(stage.spec["seed"])
    fixed = stage.objective == "kto"
    sampler = FixedBatches(len(train.examples), size, seed) if fixed else LengthGrouped(train.lengths, size, seed)
    examples = train.examples
    if ranks.count() > 1:  # each process has its micro-batches in each step, the last one of an epoch too
        sampler, examples = Filled(sampler, size), [*examples, no_targets(tokenizer)]
    held = heldout.examples if fixed else longest_first(heldout)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loop = LOOPS.get(stage.objective, SftLoop).made(
            totals,
            recovery,
            sampler,
            model=model,
            args=arguments(stage, recovery, layout(stage.spec, model), validates=bool(heldout.examples)),
            train_dataset=Dataset.from_list(examples),
            eval_dataset=Dataset.from_list(held) if held else None,
            processing_class=tokenizer,
            callbacks=[Watch(stage.place, progress, totals, recovery)],
        )
    if stage.sharded:
        shards.enable(loop)
    loop.kept = int(stage.spec.get("checkpoints") or loop.kept)
    loop.remove_callback(PrinterCallback)
    if "ref" in getattr(loop.model, "peft_config", {}):
        cast("Any", loop.model).delete_adapter("ref")  # TRL's copy of the start; its log-probabilities are in the rows already
    return loop


def arguments(stage: Stage, recovery: Recovery, laid: str, *, validates: bool) -> SFTConfig | DPOConfig | KTOConfig:
    """TRL's settings for a stage. `laid`: its layout."""
    values, gpu = stage.values, torch.cuda.is_available()
    common: dict[str, Any] = {
        "output_dir": str(stage.place.folder / "checkpoints"),
        "num_train_epochs": float(values["epochs"]),
        "learning_rate": float(values["learning_rate"]) * recovery.state.rate,
        "per_device_train_batch_size": recovery.micro_batch,
        "per_device_eval_batch_size": recovery.micro_batch,
        "gradient_accumulation_steps": recovery.accumulation,
        "warmup_steps": float(values["warmup"]),  # below 1: a share of the steps
        "weight_decay": float(values["weight_decay"]),
        "lr_scheduler_type": values["scheduler"],
        "logging_steps": int(values["log_steps"]),
        "logging_nan_inf_filter": False,
        "eval_strategy": "epoch" if validates else "no",
        "prediction_loss_only": True,
        "save_strategy": "no",  # Watch says when
        "seed": int(stage.spec["seed"]),
        "data_seed": int(stage.spec["seed"]),
        "use_cpu": not gpu,
        "bf16": stage.bf16,
        "optim": "adamw_torch_fused",
        "activation_checkpointing": recovery.state.recompute,
        "pad_to_multiple_of": PADDED_TO,
        "max_length": None,  # rows fit already
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": gpu,
        "ddp_backend": None if gpu or ranks.count() == 1 else "gloo",
        "ddp_find_unused_parameters": False,
        "report_to": (stage.spec.get("report_to") if ranks.first() else None) or "none",
        "run_name": f"{stage.spec.get('assistant', stage.place.name)}-{stage.spec['spec_hash']}-{stage.objective}",
        "use_liger_kernel": bool(stage.spec.get("liger")),
        "disable_tqdm": True,
        "log_level": "error",
        **(shards.settings(recovery.state.recompute) if stage.sharded else {}),
    }
    if stage.objective == "dpo":
        return DPOConfig(
            **common,
            beta=float(values["beta"]),
            precompute_ref_log_probs=True,
            loss_type=["sigmoid", "sft"],
            loss_weights=[1.0, SFT_WEIGHT],
        )
    if stage.objective == "kto":
        return KTOConfig(
            **common, beta=float(values["beta"]), precompute_ref_log_probs=True, train_sampling_strategy="sequential"
        )
    if laid == "padding_free":
        common |= {"padding_free": True, "pad_to_multiple_of": None}
    return SFTConfig(**common, dataset_kwargs={"skip_prepare_dataset": True})


def layout(spec: dict[str, Any], model: PreTrainedModel) -> str:
    """`padding_free` where the model's attention keeps documents apart, else `padded`, grouped by length."""
    wanted = spec.get("layout")
    if wanted is not None:
        return str(wanted)
    return "padding_free" if attention.keeps_apart(model) else "padded"


def check(spec: dict[str, Any], progress: Progress) -> None:
    """Raises TrainingError for what this machine cannot do, before a model is loaded; tells what it does slowly."""
    gpu = torch.cuda.is_available()
    if has_gpu() and not gpu:
        progress.note("This machine has an NVIDIA GPU that the installed torch does not see: it trains on the processor.")
    if spec.get("precision") == "bfloat16" and not (gpu or multiplies_bfloat16()):
        progress.note("This processor has no instructions for bfloat16, in which this training began: it goes on slowly.")
    if spec["adapter"] == "qlora":
        adapters.check_quantised()
    unknown = [stage["objective"] for stage in spec["stages"] if stage["objective"] not in (*FILES, "continued_pretraining")]
    if unknown or spec["adapter"] not in ("full", "lora", "qlora"):
        raise TrainingError(f"objective {unknown}, adapter {spec['adapter']!r}: unknown to this worker.")
