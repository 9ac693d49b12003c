"""All versions of an assistant on one page: `<home>/reports/<assistant>/history.html`, made anew with every report.

Versions were measured on the test set of their own day, so a step may be the test set's; where that changed, the page says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from finetune_assets.evaluation import plots
from finetune_assets.evaluation.candidates import TUNED
from finetune_assets.evaluation.measures import MEASURES
from finetune_assets.evaluation.texts import TEMPLATES, Texts
from finetune_assets.storage import read_json, write_text

FILE = "history.html"
SHOWN = ("accuracy", "bits_per_byte", "rules", "faithful", "similarity_gain", "chrf", "seconds_p50", "usd_per_1000")


def write_history(folder: Path) -> Path:
    """Writes the page of the reports under `folder` (one sub-folder a version); its path."""
    path = folder / FILE
    write_text(path, html(reports(folder)))
    return path


def reports(folder: Path) -> list[dict[str, Any]]:
    """The reports of all versions, oldest version first; a folder without a whole one is left out."""
    files = [file for file in folder.glob("v*/report.json") if not file.parent.is_symlink()]
    return sorted((read_json(file) for file in files), key=lambda report: (_number(report["model_version"]), report["made_at"]))


def html(found: Sequence[dict[str, Any]]) -> str:
    """The page; a list of no reports gives one that says so."""
    t = Texts(found[-1]["language"] if found else "en")
    measures = [m for m in SHOWN if any(_value(report, m) is not None for report in found)]
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    lines = {
        measure: plots.history(
            [(report["model_version"], report["candidates"][TUNED].get(measure) or {}) for report in found],
            f"{t('measure.' + measure)}: " + ", ".join(t.value(measure, _value(report, measure)) for report in found),
            partial(t.value, measure),
            (0.0, 1.0) if MEASURES[measure].form == "percent" else None,
        )
        for measure in measures
    }
    page = environment.get_template("history.html.j2")
    return page.render(t=t, reports=found, measures=measures, lines=lines, value=_value)


def _value(report: dict[str, Any], measure: str) -> float | None:
    return (report["candidates"][TUNED].get(measure) or {}).get("value")


def _number(version: str) -> int:
    digits = version.removeprefix("v").split("-")[0]
    return int(digits) if digits.isdigit() else 0
