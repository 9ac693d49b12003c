"""The metric modules load from disk without the hub."""

from pathlib import Path

import pytest

METRICS = Path(__file__).parents[2] / "finetune_assets" / "evaluation" / "metrics"


def test_load_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    import socket

    import evaluate
    from evaluate import config

    def refuse(*_args: object) -> None:
        raise AssertionError("a metric asked for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(config, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    same = ["Mañana a las diez, con gusto.", "Claro que sí, ¿a qué hora?"]
    for name, best in (("bleu", 100.0), ("chrf", 100.0), ("rouge_l", 1.0)):
        metric = evaluate.load(str(METRICS / f"{name}.py"), keep_in_memory=True, cache_dir=str(tmp_path))
        found = metric.compute(predictions=same, references=same)
        assert found[name] == pytest.approx(best)
        assert len(found["statistics"]) == 2
        assert len(found["statistics"][0]) == len(found["columns"])


def test_rouge_keeps_spanish_words_whole(tmp_path: Path):
    from finetune_assets.evaluation.metrics.rouge_l import RougeL

    metric = RougeL(keep_in_memory=True, cache_dir=str(tmp_path))
    assert metric.compute(predictions=["mañana"], references=["ma ana"])["rouge_l"] == 0
