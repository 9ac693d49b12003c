"""Task `train`: full fine-tuning with loss on the last reply, resumable at any moment.

The spec is that of `finetune_assets.training.spec`; its `output` is the job's folder. Written there: checkpoints/,
training_log.jsonl (one point of the curve a line), model/ (weights in the base model's dtype, tokenizer, template) and, last,
result.json. Master weights are float32; bfloat16 is used for the products only (autocast).

With a validation set the model is that of the epoch with the lowest validation loss, else the last one.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import json
import math
import os
import resource
import shutil
import sys
import time
import warnings
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, set_seed
from trl.trainer.sft_config import SFTConfig

from finetune_assets.errors import DataError, ModelUnavailable, TrainingError
from finetune_assets.storage import read_json, replacing_folder, write_json
from finetune_assets.training.base_model import folder_hash
from finetune_assets.worker import checkpoints, models, sft
from finetune_assets.worker.progress import Progress
from finetune_assets.worker.rows import Rows, longest_first, read_rows

PADDED_TO = 32
"""Few different shapes: on a CPU every new one costs compiled kernels and fragments the heap (3.1 GB after 560 steps of the 3M
model without it, 1.2 GB with it, at the same speed)."""

EAGER_LENGTH = 1024
"""Up to here plain attention is a third faster on a CPU than torch's flash attention, whose backward pass took 27 % of the time
(measured: d 192, 6 heads, rows of 60 to 270 tokens)."""


def run(spec: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Trains, or goes on where an earlier start was killed; the finished job's result is given back as it is."""
    output = Path(spec["output"])
    done = finished(output)
    if done is not None:
        progress.note("This training is finished already; nothing is trained again.")
        return done
    if spec["objective"] != ["sft"] or spec["adapter"] != "full":
        raise TrainingError(
            f"objective {spec['objective']} with adapter {spec['adapter']!r} is unknown to this worker; it trains [sft], full."
        )
    started = time.monotonic()
    torch.set_num_threads(int(spec["threads"]))
    set_seed(int(spec["seed"]))
    revision = spec["base_model_identity"].get("revision")
    tokenizer = models.load_tokenizer(spec["base_model"], revision)
    model = models.load_model(spec["base_model"], "float32", revision)
    check_vocabulary(spec["base_model"], tokenizer, model)
    max_length = min(int(spec["hyperparameters"]["max_length"]), models.context_length(model))
    if max_length < spec["hyperparameters"]["max_length"]:
        progress.note(
            f"max_length {spec['hyperparameters']['max_length']} is more than the model's context: {max_length} is used."
        )
    if not torch.cuda.is_available() and max_length <= EAGER_LENGTH:
        model.set_attn_implementation("eager")
    data = Path(spec["dataset"])
    train = read_rows(data / "train.jsonl", tokenizer, max_length, progress)
    validation = read_rows(data / "validation.jsonl", tokenizer, max_length, progress)
    if not train.examples:
        raise DataError(f"{data / 'train.jsonl'} has no row that fits in {max_length} tokens. Raise hyperparameters.max_length.")
    checkpoint, totals = resume_point(output, progress)
    trainer = make_trainer(spec, model, tokenizer, (train, validation), totals, progress)
    ready = time.monotonic() - started
    last = math.ceil(spec["hyperparameters"]["epochs"] * math.ceil(len(train.examples) / spec["hyperparameters"]["batch_size"]))
    if checkpoint is None or totals.steps < last:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the libraries' own deprecations
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        model = cast("PreTrainedModel", trainer.accelerator.unwrap_model(trainer.model))
    else:  # killed between the last step and the end: transformers would train one step more
        model = models.load_model(checkpoint, "float32")
    finish_model(spec, model, tokenizer)
    result = summary(spec, totals, (train, validation), output)
    return {**result, "seconds_before_first_step": round(ready, 2), "max_length": max_length}


def clean(spec: dict[str, Any]) -> None:
    """Deletes the checkpoints of a job that has its result: model/ holds what they were for."""
    shutil.rmtree(Path(spec["output"]) / "checkpoints", ignore_errors=True)


def finished(output: Path) -> dict[str, Any] | None:
    """The result of a finished job whose model folder is whole, else None."""
    try:
        result: dict[str, Any] = read_json(output / "result.json")
    except (OSError, ValueError):
        return None
    return result if checkpoints.is_whole(output / str(result.get("model", "model"))) else None


def check_vocabulary(name: str, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Raises ModelUnavailable where the tokenizer knows ids that the model does not embed."""
    embedded = int(cast("Any", model.get_input_embeddings()).weight.shape[0])
    if len(tokenizer) > embedded:
        raise ModelUnavailable(
            f"The tokenizer of {name} has {len(tokenizer)} tokens, the model embeds {embedded}: they do not belong together. "
            "Give a folder with both from the same model."
        )


def resume_point(output: Path, progress: Progress) -> tuple[Path | None, sft.Totals]:
    """The newest whole checkpoint and its totals; broken ones are removed."""
    folder = output / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint, broken = checkpoints.newest_whole(folder)
    for path in broken:
        progress.note(f"{path.name} is broken and is not used.")
        shutil.rmtree(path)
    if checkpoint is None:
        sft.forget(folder, 0)
        return None, sft.Totals()
    totals = sft.Totals(**read_json(checkpoint / "totals.json"))
    sft.forget(folder, totals.steps)
    resumes = read_json(output / "resumes.json")["resumed"] if (output / "resumes.json").exists() else 0
    write_json(output / "resumes.json", {"resumed": resumes + 1})
    progress.note(f"Going on from step {totals.steps:,}.")
    return checkpoint, totals


def make_trainer(
    spec: dict[str, Any],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: tuple[Rows, Rows],
    totals: sft.Totals,
    progress: Progress,
) -> sft.Loop:
    """The loop with its data (`rows`: training, validation) and callbacks."""
    train, validation = rows
    output = Path(spec["output"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = sft.Loop(
            lengths=train.lengths,
            totals=totals,
            model=model,
            args=training_arguments(spec, validates=bool(validation.examples)),
            train_dataset=train.dataset(),
            eval_dataset=Rows(longest_first(validation), 0, 0).dataset() if validation.examples else None,
            processing_class=tokenizer,
            callbacks=[sft.Watch(output, progress, totals, float(spec.get("checkpoint_seconds", sft.CHECKPOINT_SECONDS)))],
        )
    trainer.remove_callback(PrinterCallback)
    return trainer


def training_arguments(spec: dict[str, Any], *, validates: bool) -> SFTConfig:
    """TRL's settings for a spec."""
    values = spec["hyperparameters"]
    gpu = torch.cuda.is_available()
    bf16 = torch.cuda.is_bf16_supported() if gpu else spec["precision"] == "bfloat16"
    return SFTConfig(
        output_dir=str(Path(spec["output"]) / "checkpoints"),
        num_train_epochs=float(values["epochs"]),
        learning_rate=float(values["learning_rate"]),
        per_device_train_batch_size=int(values["batch_size"]),
        per_device_eval_batch_size=2 * int(values["batch_size"]),
        warmup_steps=float(values["warmup"]),  # below 1: a share of the steps
        weight_decay=float(values["weight_decay"]),
        lr_scheduler_type=values["scheduler"],
        logging_steps=int(values["log_steps"]),
        logging_nan_inf_filter=False,
        eval_strategy="epoch" if validates else "no",
        save_strategy="no",  # sft.Watch says when
        seed=int(spec["seed"]),
        data_seed=int(spec["seed"]),
        use_cpu=not gpu,
        bf16=bf16,
        optim="adamw_torch_fused",
        activation_checkpointing=False,
        pad_to_multiple_of=PADDED_TO,
        max_length=None,  # rows fit already
        dataset_kwargs={"skip_prepare_dataset": True},
        dataloader_num_workers=0,
        dataloader_pin_memory=gpu,
        report_to="none",
        disable_tqdm=True,
        log_level="error",
    )


def finish_model(spec: dict[str, Any], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Writes model/: the best or last weights in the base model's dtype, the tokenizer and its template."""
    output = Path(spec["output"])
    best = output / "checkpoints" / "best"
    if (best / "best.json").exists():
        model = models.load_model(best, "float32")
    config = models.load_config(spec["base_model"], spec["base_model_identity"].get("revision"))
    model.to(config.dtype or torch.float32)  # pyright: ignore[reportArgumentType]
    model.generation_config.eos_token_id = models.end_ids(tokenizer)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    with replacing_folder(output / "model") as draft:
        model.save_pretrained(draft)
        tokenizer.save_pretrained(draft)
        for file in draft.iterdir():
            file.chmod(0o644)  # safetensors writes for its owner alone
        checkpoints.seal(draft)


def summary(spec: dict[str, Any], totals: sft.Totals, rows: tuple[Rows, Rows], output: Path) -> dict[str, Any]:
    """What result.json says."""
    train, validation = rows
    curve = [json.loads(line) for line in (output / "training_log.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [(point["step"], point["loss"]) for point in curve if "loss" in point]
    late = [loss for step, loss in losses if step > 0.9 * totals.steps] or [loss for _, loss in losses[-1:]]
    best = output / "checkpoints" / "best" / "best.json"
    chosen = read_json(best) if best.exists() else None
    resumes = output / "resumes.json"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {
        "model": "model",
        "model_sha256": folder_hash(output / "model"),
        "spec_hash": spec["spec_hash"],
        "base_model": spec["base_model"],
        "base_model_identity": spec["base_model_identity"],
        "train_loss": sum(late) / len(late) if late else None,  # mean of the last tenth of the steps
        "eval_loss": chosen["eval_loss"] if chosen else None,
        "eval_losses": [point["eval_loss"] for point in curve if "eval_loss" in point],
        "steps": totals.steps,
        "best_step": chosen["step"] if chosen else totals.steps,
        "tokens": totals.tokens,
        "seconds": round(totals.seconds, 2),
        "tokens_per_second": round(totals.tokens / max(totals.seconds, 1e-9), 1),
        "memory_bytes": int(torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else peak,
        "resumed": read_json(resumes)["resumed"] if resumes.exists() else 0,
        "threads": spec["threads"],
        "precision": spec["precision"],
        "host": os.uname().nodename,
        "rows": {
            "train": len(train.examples),
            "validation": len(validation.examples),
            "shortened": train.shortened,
            "dropped": train.dropped + validation.dropped,
        },
    }
