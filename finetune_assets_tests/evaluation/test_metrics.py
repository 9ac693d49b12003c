"""The metric modules load from disk without the hub."""

from pathlib import Path

import pytest

METRICS = Path(__file__).parents[2] / "finetune_assets" / "evaluation" / "metrics"


@pytest.mark.parametrize(("name", "best"), [("bleu", 100.0), ("chrf", 100.0), ("rouge_l", 1.0)])
def test_loads_offline(name: str, best: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    import socket

    import evaluate
    from evaluate import config

    def refuse(*_args: object) -> None:
        raise AssertionError("a metric asked for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(config, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    metric = evaluate.load(str(METRICS / f"{name}.py"), keep_in_memory=True, cache_dir=str(tmp_path))
    same = ["Mañana a las diez, con gusto.", "Claro que sí, ¿a qué hora?"]
    found = metric.compute(predictions=same, references=same)
    assert found[name] == pytest.approx(best)
    assert len(found["statistics"]) == 2
    assert metric.compute(predictions=["niño"], references=["ni o"])["rouge_l"] == 0 if name == "rouge_l" else True
