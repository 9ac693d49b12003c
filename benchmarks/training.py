"""One epoch of the sample's dental conversations: ours beside `trl sft` with its defaults, and beside a hand-tuned TRL script.

Same base model, rows, objective (loss on the last reply), epochs, rate, schedule, batch and number of threads (the free cores);
each in a process of its own, in turns. CPU seconds cover everything after the imports: tokenisation, training, checkpoints (ours
alone), saving. None validates while it trains; the note has the validation loss of each result, measured by one function.
LLaMA-Factory runs in the interpreter that BENCH_LLAMA_FACTORY names (`peers/llama_factory.py` says how to install it).
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT, SAMPLE, Row
from finetune_assets.training.machine import free_threads

ROWS, VALIDATION = 480, 120
VALUES: dict[str, Any] = {"epochs": 1, "learning_rate": 1e-3, "batch_size": 8}
BASE = ROOT / "data" / "base_model"
BAR = 4.0
CLOSE = 0.01
"""Validation losses whose ratio is this near to 1 count as equal."""
SHARES = (0.97, 0.94, 0.91, 0.88, 0.85)


def rows(rounds: int) -> list[Row]:
    """Beside TRL's defaults over the same rows, and to the same validation loss; beside TRL tuned by hand; LLaMA-Factory."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        training_data(folder)
        threads = free_threads()
        measured = _measured(("ours", "trl_defaults", "trl_tuned"), folder, rounds, threads)
        defaults = measured["trl_defaults"]
        share, same = _to_the_loss(defaults["loss"], measured["ours"], folder, rounds, threads)
        factory = _factory(folder, rounds, threads)
    what = f"training on {measured['ours']['tokens']:,} real tokens, 3M model, threads: {threads}"
    less = f"the same to that validation loss, {share:.0%} of the epoch"
    close = abs(same["loss"] / defaults["loss"] - 1) <= CLOSE
    beside = [
        (what, measured["ours"], "trl sft, defaults", defaults, f"≥ {BAR:g} times, validation loss no worse", True),
        (less, same, "trl sft, defaults", defaults, f"≥ {BAR:g} times at equal validation loss ({CLOSE:.0%})", close),
        (what, measured["ours"], "TRL, tuned by hand", measured["trl_tuned"], "", True),
    ]
    if factory is not None:
        peer = {**factory, "tokens": measured["ours"]["tokens"]}  # the same rows
        beside.append((what, measured["ours"], "LLaMA-Factory, defaults", peer, "", True))
    return [_row(*one) for one in beside]


def _factory(folder: Path, rounds: int, threads: int) -> dict[str, Any] | None:
    """LLaMA-Factory's training; None where it is not there."""
    if not os.environ.get("BENCH_LLAMA_FACTORY"):
        return None
    return _measured(("llama_factory",), folder, rounds, threads)["llama_factory"]


def _row(what: str, ours: dict[str, Any], title: str, peer: dict[str, Any], bar: str, comparable: bool) -> Row:
    apart = 100 * (ours["loss"] / peer["loss"] - 1)
    rates = [round(one["tokens"] / one["cpu_seconds"]) for one in (ours, peer)]
    met = peer["cpu_seconds"] / ours["cpu_seconds"] >= BAR and comparable and ours["loss"] <= (1 + CLOSE) * peer["loss"]
    return Row(
        what,
        ours["cpu_seconds"],
        title,
        peer["cpu_seconds"],
        ours["peak_mb"],
        bar,
        met if bar else None,
        f"{rates[0]:,} and {rates[1]:,} tokens a CPU second; validation loss {ours['loss']:.4f} and {peer['loss']:.4f} "
        f"({apart:+.1f} %)",
    )


def _to_the_loss(goal: float, whole: dict[str, Any], folder: Path, rounds: int, threads: int) -> tuple[float, dict[str, Any]]:
    """The smallest share of the epoch after which ours ends no further than CLOSE above `goal` (its schedule is as long), and
    that run. Where each share goes further than CLOSE above or below, the nearest one: its row is not met.
    """
    tried = [(1.0, whole)]
    for share in SHARES:
        (made,) = _measured((f"ours:{share}",), folder, 1, threads).values()
        tried.append((share, made))
        if made["loss"] > (1 + CLOSE) * goal:
            break
    close = [one for one in tried if abs(one[1]["loss"] / goal - 1) <= CLOSE]
    share, made = close[-1] if close else min(tried, key=lambda one: abs(one[1]["loss"] - goal))
    if share < 1 and rounds > 1:
        (made,) = _measured((f"ours:{share}",), folder / "again", rounds, threads, data=folder).values()
    return share, made


def training_data(folder: Path) -> None:
    """The first rows of the dental assistant's data set, as the project makes it."""
    from finetune_assets.assistants import load_assistant
    from finetune_assets.corpus.examples import build_examples
    from finetune_assets.corpus.ingest import ingest_conversations, ingest_feedback, stale_weeks
    from finetune_assets.corpus.sources import read_source
    from finetune_assets.dataset import choose, freeze
    from finetune_assets.storage import Store

    store = Store(folder / "store")
    tables = read_source([str(SAMPLE)])
    weeks = stale_weeks(store, tables).stale
    ingest_conversations(store, tables, weeks, b"key")
    ingest_feedback(store, tables, weeks, b"key")
    build_examples(store, weeks)
    assistant = load_assistant(ROOT / "finetune_assets" / "assistants", "dental")
    made = freeze(store, assistant, choose(store, assistant))
    source = store.dataset("dental", made["fingerprint"])
    for split, count in (("train", ROWS), ("validation", VALIDATION)):
        lines = (source / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()[:count]
        (folder / split).mkdir()
        (folder / split / f"{split}.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def make_spec(folder: Path, name: str, epochs: float) -> Path:
    """The file of a training of the benchmark's data (`<folder>/train`) in `<folder>/<name>`."""
    from finetune_assets.storage import write_json
    from finetune_assets.training import base_model, presets
    from finetune_assets.training.machine import default_precision

    values = presets.of_stage("tiny", "sft", "full", {"epochs": epochs, "learning_rate": 1e-3})
    output = folder / name
    output.mkdir()
    spec: dict[str, Any] = {
        "task": "train",
        "dataset": str(folder / "train"),
        "base_model": str(BASE),
        "base_model_identity": base_model.identity(str(BASE)),
        "stages": [{"objective": "sft", "hyperparameters": values.to_dict()}],
        "output": str(output),
        **{"adapter": "full", "seed": 42, "threads": 1, "precision": default_precision(), "spec_hash": "benchmark"},
    }
    write_json(output / "spec.json", spec)
    return output / "spec.json"


def _measured(
    kinds: tuple[str, ...], folder: Path, rounds: int, threads: int, data: Path | None = None
) -> dict[str, dict[str, Any]]:
    """What each kind's last round made, with the median of its CPU seconds. In turns: a busy machine disturbs all alike. `data`:
    folder of the rows, where it is not `folder`.
    """
    data = data or folder
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    for number in range(rounds):
        for kind in kinds:
            output = folder / f"{kind}-{number}"
            commands = [[sys.executable, "-m", "benchmarks.training", kind, str(data), str(output), str(threads)]]
            if kind == "llama_factory":
                commands.insert(0, _factory_command(data, output, threads))
            for command in commands:
                done = subprocess.run(command, env=environment, cwd=ROOT, check=False, capture_output=True, text=True)
                if done.returncode != 0:
                    raise RuntimeError(f"{kind} failed: {done.stderr[-2000:]}")
            found[kind].append(json.loads((output / "measured.json").read_text()))
    return {
        kind: {**made[-1], "cpu_seconds": statistics.median(one["cpu_seconds"] for one in made)} for kind, made in found.items()
    }


def _ours(folder: Path, output: Path, threads: int, share: float) -> tuple[Path, int]:
    from finetune_assets.training import base_model, presets
    from finetune_assets.training.machine import default_precision
    from finetune_assets.worker import train
    from finetune_assets.worker.progress import Progress

    values = presets.of_stage("tiny", "sft", "full", {**VALUES, "epochs": share * VALUES["epochs"]})
    spec = {
        "dataset": str(folder / "train"),
        "base_model": str(BASE),
        "base_model_identity": base_model.identity(str(BASE)),
        "stages": [{"objective": "sft", "hyperparameters": values.to_dict()}],
        **{"adapter": "full", "seed": 42, "threads": threads, "precision": default_precision(), "spec_hash": "benchmark"},
        "output": str(output),
    }
    result = train.run(spec, Progress.open(output))
    return output / "model", result["tokens"]


def _theirs(folder: Path, output: Path, *, tuned: bool) -> tuple[Path, int]:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    lines = (folder / "train" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    chats = [json.loads(line)["messages"] for line in lines]
    data = Dataset.from_list([{"prompt": chat[:-1], "completion": chat[-1:]} for chat in chats])
    better: dict[str, Any] = {
        "activation_checkpointing": False,
        "train_sampling_strategy": "group_by_length",
        "optim": "adamw_torch_fused",
        "pad_to_multiple_of": 32,
        "max_length": 512,
    }
    arguments = SFTConfig(
        output_dir=str(output / "trainer"),
        use_cpu=True,
        num_train_epochs=VALUES["epochs"],
        learning_rate=VALUES["learning_rate"],
        per_device_train_batch_size=VALUES["batch_size"],
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        report_to="none",
        disable_tqdm=True,
        **(better if tuned else {}),
    )
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    model: Any = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    if tuned:
        model.set_attn_implementation("eager")
    trainer: Any = SFTTrainer(model=model, args=arguments, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    trainer.save_model(str(output / "model"))
    return output / "model", int(trainer._total_train_tokens)


def _factory_command(folder: Path, output: Path, threads: int) -> list[str]:
    settings = {
        "num_train_epochs": VALUES["epochs"],
        "learning_rate": VALUES["learning_rate"],
        "per_device_train_batch_size": VALUES["batch_size"],
        "lr_scheduler_type": "cosine",
        "warmup_steps": round(0.05 * VALUES["epochs"] * ROWS / VALUES["batch_size"]),
    }
    script = str(ROOT / "benchmarks" / "peers" / "llama_factory.py")
    place = [str(folder), str(BASE), str(output), str(threads), json.dumps(settings)]
    return [os.environ["BENCH_LLAMA_FACTORY"], script, *place]


def _loss(model: Path, folder: Path) -> float:
    """Nats per target token of the validation rows."""
    from finetune_assets.worker import models
    from finetune_assets.worker.generate import Generator, batches

    generator = Generator(str(model), 8)
    chats = [
        json.loads(line)["messages"]
        for line in (folder / "validation" / "validation.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    examples = [models.encode_example(generator.tokenizer, chat, 512)[:2] for chat in chats]
    groups = batches([len(ids) for ids, _ in examples], tokens=8192)
    return sum(sum(generator.likelihoods([examples[n] for n in group])) for group in groups) / sum(
        sum(mask) for _, mask in examples
    )


def _main(kind: str, folder: Path, output: Path, threads: int) -> None:
    """The child: one training, measured; of LLaMA-Factory's, which is over, the validation loss."""
    from finetune_assets.worker.__main__ import set_environment

    set_environment(threads)
    import torch

    import finetune_assets.worker.train  # noqa: F401
    from benchmarks.measure import peak_mb

    torch.set_num_threads(threads)
    if kind == "llama_factory":
        made = json.loads((output / "measured.json").read_text())
        (output / "measured.json").write_text(json.dumps({**made, "loss": _loss(output / "model", folder)}))
        return
    output.mkdir(parents=True)
    start = time.process_time()
    name, _, share = kind.partition(":")
    if name == "ours":
        model, tokens = _ours(folder, output, threads, float(share or 1))
    else:
        model, tokens = _theirs(folder, output, tuned=name == "trl_tuned")
    taken = time.process_time() - start
    measured = {"cpu_seconds": taken, "tokens": tokens, "peak_mb": peak_mb(), "loss": _loss(model, folder)}
    (output / "measured.json").write_text(json.dumps(measured))


if __name__ == "__main__":
    _main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
