"""All versions on one page, in their order, with what each reached."""

from pathlib import Path

from finetune_assets.evaluation.history import html, reports, write_history
from finetune_assets.evaluation.measures import MEASURES
from finetune_assets.storage import point, write_json


def report(version: str, bits: float | None, verdict: str = "serve") -> dict:
    known = {"bits_per_byte": {"value": bits, "low": bits and bits - 0.1, "high": bits and bits + 0.1}}
    values = {name: known.get(name, {"value": None, "low": None, "high": None}) for name in MEASURES}
    facts = {
        "language": "es",
        "assistant": "dental",
        "made_at": "2026-11-21T00:00:00",
        "test_rows": 100,
        "dataset_fingerprint": "f" * 20,
    }
    return {**facts, "model_version": version, "verdict": verdict, "candidates": {"tuned": values}}


def test_versions_in_their_order(tmp_path: Path):
    for version, bits in (("v10-aaaa", 0.7), ("v2-bbbb", 0.9), ("v1-cccc", None)):
        write_json(tmp_path / version / "report.json", report(version, bits, "do_not_serve" if bits is None else "serve"))
    point(tmp_path / "latest", "v10-aaaa")
    (tmp_path / "v3-half").mkdir()
    assert [one["model_version"] for one in reports(tmp_path)] == ["v1-cccc", "v2-bbbb", "v10-aaaa"]
    page = write_history(tmp_path).read_text()
    assert page.index("v10-aaaa/report.html") < page.index("v2-bbbb/report.html")
    assert "No servir" in page
    assert page.count('class="mark tuned"') == 2
    assert html([]).count("No version has a report yet.") == 1
