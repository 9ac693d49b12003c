"""The cache's key is what decides replies: weights, tokenizer, shape; not when or from what they were made."""

import json
import shutil
from pathlib import Path

from finetune_assets.worker.generate import content
from finetune_assets_tests.tiny_model import make_tiny_model


def test_a_retrain_with_equal_weights_is_the_same_model(tmp_path: Path):
    first = make_tiny_model(tmp_path / "a")
    second = tmp_path / "b"
    shutil.copytree(first, second)
    (second / "result.json").write_text('{"seconds": 12}')
    (second / "spec.json").write_text("{}")
    (second / "training_log.jsonl").write_text("{}")
    config = json.loads((second / "config.json").read_text())
    (second / "config.json").write_text(json.dumps({**config, "transformers_version": "9.9", "_name_or_path": "elsewhere"}))
    assert content(str(first)) == content(str(second))
    (second / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
    assert content(str(first)) != content(str(second))
    assert content(str(first)) != content(str(make_tiny_model(tmp_path / "c", seed=1)))
