"""Two versions side by side: what they were made from, how, at what cost, and how they did on the test set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from finetune_assets.registry.ledger import Ledger
from finetune_assets.registry.tables import Version


def facts(ledger: Ledger, version: Version) -> dict[str, Any]:
    """A version as one flat row: its record, its job's settings, its data set's counts and its report's measures."""
    job = ledger.job(version.job_id)
    row: dict[str, Any] = {
        "assistant": version.assistant,
        "version": version.version,
        "verdict": version.verdict,
        "content_hash": version.content_hash,
        "dataset": version.dataset_fingerprint,
        "base_model": version.base_model,
        "trainer": job.provider,
        "trained_tokens": job.trained_tokens,
        "seconds": job.seconds,
        "created_at": f"{version.created_at:%Y-%m-%d %H:%M}",
        "folder": version.path,
        "report": version.report,
    }
    row |= {f"hyperparameters.{key}": value for key, value in sorted(job.hyperparameters.items())}
    for measure, interval in measures(version).get("tuned", {}).items():
        row[f"tuned.{measure}"] = interval["value"]
    for what in ("split", "source", "intent"):
        names = {"split": "rows"}
        row |= {f"{names.get(what, what)}.{name}": count for name, count in _counts(version).get(what, {}).items()}
    return row


def measures(version: Version) -> dict[str, dict[str, dict[str, float | None]]]:
    """Candidate -> measure -> {"value", "low", "high"} of a version's report; empty where it was not benchmarked."""
    report = _json(Path(version.report).with_name("report.json")) if version.report else {}
    return {
        candidate: {name: one for name, one in (found or {}).items() if isinstance(one, dict) and one.get("value") is not None}
        for candidate, found in report.get("candidates", {}).items()
    }


def _counts(version: Version) -> dict[str, dict[str, int]]:
    folder = Path(version.path).parents[2] / "datasets" / version.assistant / version.dataset_fingerprint
    return _json(folder / "manifest.json").get("counts", {})


def differences(first: dict[str, Any], second: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(name, first, second) of everything in which two rows differ."""
    names = list(dict.fromkeys([*first, *second]))
    return [(name, first.get(name), second.get(name)) for name in names if first.get(name) != second.get(name)]


def _json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
