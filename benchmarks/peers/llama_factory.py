"""LLaMA-Factory on the rows of `benchmarks.training`: `llama_factory.py FOLDER BASE OUTPUT THREADS SETTINGS`, SETTINGS as JSON.

Its defaults but for what must be equal: rate, schedule, batch, epochs, loss on the last reply, bfloat16, the base model's format
of chats. FOLDER/train/train.jsonl is read; OUTPUT gets model/ and measured.json (CPU seconds after the imports).

    python -m venv lf && lf/bin/pip install torch && lf/bin/pip install --no-deps llamafactory
    lf/bin/pip install "transformers<=5.6" "trl<=0.24" "accelerate<=1.11" "datasets<=4.0" "peft<=0.18.1" "tyro<0.9" \
        av einops fire omegaconf pyyaml protobuf sentencepiece tiktoken scipy pandas hf-transfer modelscope fastapi uvicorn \
        sse-starlette matplotlib
    BENCH_LLAMA_FACTORY=lf/bin/python python benchmarks/run.py training

torchaudio, which LLaMA-Factory imports whatever is trained, has no build for each torch on a CPU: where it is missing an empty
module takes its place, since only audio uses it.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import os
import resource
import sys
import time
import types
from pathlib import Path


def main(folder: Path, base: str, output: Path, threads: str, settings: dict[str, float]) -> None:
    """Trains once."""
    os.environ.update(OMP_NUM_THREADS=threads, MKL_NUM_THREADS=threads, OMP_WAIT_POLICY="PASSIVE", GOMP_SPINCOUNT="0")
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false", DISABLE_VERSION_CHECK="1")
    if importlib.util.find_spec("torchaudio") is None:
        stand_in = types.ModuleType("torchaudio")
        stand_in.__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
        sys.modules["torchaudio"] = stand_in

    import torch
    from llamafactory.data.formatter import EmptyFormatter, StringFormatter
    from llamafactory.data.template import register_template
    from llamafactory.train.tuner import run_exp

    torch.set_num_threads(int(threads))
    register_template(
        name="shipped",
        format_prefix=EmptyFormatter(slots=[{"bos_token"}]),
        format_system=StringFormatter(slots=["<|system|>{{content}}<|end|>"]),
        format_user=StringFormatter(slots=["<|user|>{{content}}<|end|><|assistant|>"]),
        format_assistant=StringFormatter(slots=["{{content}}<|end|>"]),
        stop_words=["<|end|>"],
    )
    write_data(folder, output / "data")
    start = time.process_time()
    run_exp(
        {
            "stage": "sft",
            "do_train": True,
            "model_name_or_path": base,
            "finetuning_type": "full",
            "template": "shipped",
            "dataset": "rows",
            "dataset_dir": str(output / "data"),
            "mask_history": True,
            "output_dir": str(output / "model"),
            "use_cpu": True,
            "bf16": True,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            **settings,
        }
    )
    taken = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    (output / "measured.json").write_text(json.dumps({"cpu_seconds": taken, "peak_mb": peak}))


def write_data(folder: Path, data: Path) -> None:
    """The rows as a data set of LLaMA-Factory."""
    data.mkdir(parents=True)
    rows = [json.loads(line) for line in (folder / "train" / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    (data / "rows.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    tags = {"role_tag": "role", "content_tag": "content"} | {f"{name}_tag": name for name in ("user", "assistant", "system")}
    info = {"rows": {"file_name": "rows.json", "formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": tags}}
    (data / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), sys.argv[4], json.loads(sys.argv[5]))
