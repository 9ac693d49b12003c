"""Task `train`: a chain of objectives, resumable at any moment.

The spec is that of `finetune_assets.training.spec`; its `output` is the job's folder. Written there: stages/ (see
`worker.stage`), training_log.jsonl (the curves of all stages, one after the other), model/ (weights in the base model's dtype,
tokenizer, template; of an adapter model the merged weights, and the adapter alone in model/adapter/) and, last, result.json.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import gc
import json
import os
import platform
import resource
import shutil
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from finetune_assets.environment import code_revision
from finetune_assets.errors import FinetuneError, TrainingError
from finetune_assets.storage import read_json, replacing_folder, write_text
from finetune_assets.training.base_model import folder_hash
from finetune_assets.worker import adapters, checkpoints, curve, models, ranks
from finetune_assets.worker.attempt import run_stage
from finetune_assets.worker.progress import Progress
from finetune_assets.worker.recovery import disk_full
from finetune_assets.worker.stage import Stage, check, on_this_machine

Result = dict[str, Any]


def run(spec: dict[str, Any], progress: Progress) -> Result:
    """Trains, or goes on where an earlier start was killed; the finished job's result is given back as it is."""
    began, output = float(spec.get("began") or time.monotonic()), Path(spec["output"])
    done = finished(output)
    if done is not None:
        progress.note("This training is finished already; nothing is trained again.")
        return done
    check(spec, progress)
    gc.freeze()  # what the imports made stays: transformers collects garbage at the start and at every end of a training
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(output / "tensorboard"))
    ranks.join()
    spec = ranks.same(on_this_machine(spec) if ranks.first() else spec)
    torch.set_num_threads(max(1, int(spec["threads"]) // ranks.here()))
    earlier = trained_before(spec)
    try:
        tokenizer = models.load_tokenizer(spec["base_model"], spec["base_model_identity"].get("revision"))
        stages: list[Stage] = []
        results: list[Result] = []
        for number in range(len(spec["stages"])):
            stages.append(Stage(spec, number, stages[-1].place.best if stages else None))
            results.append(run_stage(stages[-1], tokenizer, progress))
            if ranks.first():
                write_log(output, stages)
        if not ranks.first():
            return {}
        finish_model(spec, stages[-1].place.best, tokenizer)
    except Exception as error:
        if isinstance(error, FinetuneError) or not disk_full(error):
            raise
        free = shutil.disk_usage(output).free
        raise TrainingError(
            f"The disk of {output} is full ({free / 1e6:,.0f} MB free, or a quota or file-size limit is reached). Make room and "
            "start the same again: it goes on from its last checkpoint."
        ) from error
    return {**summary(spec, results), "wall_seconds": round(time.monotonic() - began + earlier, 2)}


def trained_before(spec: dict[str, Any]) -> float:
    """Seconds in the loops of earlier starts of which something is kept."""
    seconds = 0.0
    for number in range(len(spec["stages"])):
        folder = Stage(spec, number, None).place.folder
        newest, _ = checkpoints.newest_whole(folder / "checkpoints")
        kept = folder / "result.json" if newest is None else newest / "totals.json"
        seconds += float(read_json(kept)["seconds"]) if kept.exists() else 0.0
    return seconds


def clean(spec: dict[str, Any]) -> None:
    """Deletes the stages of a job that has its result: model/ holds what they were for."""
    shutil.rmtree(Path(spec["output"]) / "stages", ignore_errors=True)


def finished(output: Path) -> Result | None:
    """The result of a finished job whose model folder is whole, else None."""
    try:
        result: Result = read_json(output / "result.json")
    except (OSError, ValueError):
        return None
    return result if checkpoints.is_whole(output / str(result.get("model", "model"))) else None


def write_log(output: Path, stages: list[Stage]) -> None:
    """The stages' curves as one: each point names its stage, and steps are counted through."""
    lines: list[str] = []
    offset = 0
    for stage in stages:
        points = curve.read(stage.place.log)
        lines += [json.dumps({**point, "stage": stage.objective, "step": point["step"] + offset}) for point in points]
        offset += max((point["step"] for point in points), default=0)
    write_text(output / "training_log.jsonl", "".join(line + "\n" for line in lines))


def finish_model(spec: dict[str, Any], best: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Writes model/: the weights in the base model's dtype, the tokenizer and its template; an adapter merged and alone."""
    revision = spec["base_model_identity"].get("revision")
    dtype: torch.dtype = models.load_config(spec["base_model"], revision).dtype or torch.float32
    if spec["adapter"] == "full":
        model: Any = models.load_model(best, "float32", where=torch.device("cpu")).to(dtype)  # pyright: ignore[reportArgumentType]
    else:
        model = adapters.merged(spec["base_model"], revision, best, dtype)
    model.generation_config.eos_token_id = models.end_ids(tokenizer)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    with replacing_folder(Path(spec["output"]) / "model") as draft:
        model.save_pretrained(draft)
        tokenizer.save_pretrained(draft)
        if spec["adapter"] != "full":
            (draft / "adapter").mkdir()
            adapters.keep(best, draft / "adapter")
            tokenizer.save_pretrained(draft / "adapter")
        for file in draft.rglob("*"):
            if file.is_file():
                file.chmod(0o644)  # safetensors writes for its owner alone
        checkpoints.seal(draft)


def environment() -> dict[str, str | None]:
    """What the numbers depend on beside the spec."""
    names = ("finetune-assets", "torch", "transformers", "trl", "peft", "accelerate")
    made: dict[str, str | None] = {name: version(name) for name in names}
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {**made, "code": code_revision(), "python": platform.python_version(), "machine": platform.machine(), "gpu": gpu}


def summary(spec: dict[str, Any], results: list[Result]) -> Result:
    """What result.json says: the last stage's numbers, sums over all, and each stage by itself."""
    output, last = Path(spec["output"]), results[-1]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    tokens, seconds = sum(one["tokens"] for one in results), sum(one["seconds"] for one in results)
    chat = next((one for one in results if one["objective"] in ("sft", "tools")), last)
    events = [{**event, "stage": one["objective"]} for one in results for event in one["recoveries"]]
    return {
        **{key: chat[key] for key in ("train_loss", "eval_loss", "eval_losses", "best_step", "max_length", "hyperparameters")},
        "model": "model",
        "model_sha256": folder_hash(output / "model"),
        "spec_hash": spec["spec_hash"],
        "base_model": spec["base_model"],
        "base_model_identity": spec["base_model_identity"],
        "objective": [one["objective"] for one in results],
        "adapter": spec["adapter"],
        "preset": spec.get("preset"),
        "seed": spec["seed"],
        "steps": sum(one["steps"] for one in results),
        "tokens": tokens,
        "seconds": round(seconds, 2),
        "seconds_before_first_step": last["seconds_before_first_step"],
        "tokens_per_second": round(tokens / max(seconds, 1e-9), 1),
        "memory_bytes": int(torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else peak,
        "resumed": sum(event["what"] == "resumed" for event in events),
        "recoveries": events,
        "stages": results,
        "threads": spec["threads"],
        "processes": ranks.count(),
        "parallel": spec.get("parallel", "ddp") if ranks.count() > 1 else None,
        "precision": spec["precision"],
        "environment": environment(),
        "host": os.uname().nodename,
        "rows": chat["rows"],
    }
