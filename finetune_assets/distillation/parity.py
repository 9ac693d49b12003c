"""How near a student comes to its teacher, on the test rows of its benchmark: in what it says, and how well it says it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from finetune_assets.assistants.settings import Assistant
from finetune_assets.assistants.settings.evaluation import EndpointSettings
from finetune_assets.corpus.near_duplicates import normalise
from finetune_assets.evaluation.candidates import TUNED
from finetune_assets.evaluation.rented import address_of
from finetune_assets.evaluation.statistics import Bootstrap, Estimate, mean, share
from finetune_assets.evaluation.text_scores import chrf
from finetune_assets.storage import read_json, write_json
from finetune_assets.training.remote import RemoteModel

TEACHER = "teacher"
"""Name of the candidate in the report."""
FILE = "parity.json"


def with_teacher(assistant: Assistant, manifest: Mapping[str, Any]) -> Assistant:
    """Settings for the benchmark of a model trained on a distilled data set: its teacher answers the same test rows."""
    endpoint = _endpoint(manifest)
    known = assistant.benchmark.endpoints
    if endpoint is None or any(one.name == TEACHER for one in known):
        return assistant
    return assistant.model_copy(update={"benchmark": assistant.benchmark.model_copy(update={"endpoints": [*known, endpoint]})})


def _endpoint(manifest: Mapping[str, Any]) -> EndpointSettings | None:
    about = manifest.get("distilled")
    if not about:
        return None
    model = RemoteModel(**{key: value for key, value in about.items() if key in RemoteModel.__dataclass_fields__})
    return address_of(TEACHER, model)


def parity(work: Path) -> dict[str, Any] | None:
    """Student beside teacher, each with its 95 % interval over conversations; null where the benchmark had no teacher.

    `work`: the benchmark's folder. same: share of the replies that are equal but for case, blanks and punctuation. chrf: of the
    student's replies against the teacher's. similarity, chrf_to_reference: student minus teacher, against what people accepted.
    """
    files = [work / f"{name}.parquet" for name in (TUNED, TEACHER)]
    if not all(file.exists() for file in files):
        return None
    student, teacher = (pl.read_parquet(file) for file in files)
    rows = read_json(work / "rows.json")["rows"]
    both = student["reply"].is_not_null() & teacher["reply"].is_not_null()
    if not both.any():
        return {"rows": 0, "not_answered": teacher.height}
    student, teacher = student.filter(both), teacher.filter(both)
    draws = Bootstrap([row["conversation_id"] for row, there in zip(rows, both, strict=True) if there])
    same = (normalise(student["reply"]) == normalise(teacher["reply"])).to_list()
    between = Estimate(_statistics(student["reply"].to_list(), teacher["reply"].to_list()), chrf)
    made: dict[str, Any] = {
        "rows": student.height,
        "not_answered": len(rows) - student.height,
        "same": draws.interval(share(same)).as_dict(),
        "chrf": draws.interval(between).as_dict(),
        "chrf_to_reference": draws.difference(
            *(Estimate(np.array(one["chrf"].to_list()), chrf) for one in (student, teacher))
        ).as_dict(),
        "similarity": draws.difference(*(mean(one["similarity"].to_list()) for one in (student, teacher))).as_dict(),
        "examples": _examples(rows, both, student, teacher),
    }
    return made


def _statistics(replies: list[str], references: list[str]) -> Any:
    """[rows, 18]: chrF's sufficient statistics of each row."""
    from sacrebleu.metrics.chrf import CHRF  # noqa: PLC0415

    return np.array(CHRF()._extract_corpus_statistics(replies, [references]), np.float64)  # pyright: ignore


def _examples(rows: list[dict[str, Any]], both: pl.Series, student: pl.DataFrame, teacher: pl.DataFrame) -> list[dict[str, str]]:
    asked = [row["messages"][-1]["content"] for row, there in zip(rows, both, strict=True) if there]
    shown = zip(asked, teacher["reply"], student["reply"], strict=True)
    return [{"user": user, "teacher": said, "student": mine} for user, said, mine in list(shown)[:5]]


def write_parity(work: Path, report: Path) -> dict[str, Any] | None:
    """`parity.json` beside the report, where the benchmark had a teacher; its content."""
    found = parity(work)
    if found is not None:
        write_json(report / FILE, json.loads(json.dumps(found)))
    return found


def sentence(found: Mapping[str, Any]) -> str:
    """For people."""
    if not found["rows"]:
        return "The teacher answered none of the test rows: it may have been switched off. Nothing can be said of parity."
    return (
        f"On {found['rows']} test rows the student says what the teacher says in {_percent(found['same'])} of the replies; "
        f"chrF between them is {_number(found['chrf'])}. Against what people accepted, student minus teacher: similarity "
        f"{_number(found['similarity'], 3)}, chrF {_number(found['chrf_to_reference'])}."
    )


def _percent(found: Mapping[str, float | None]) -> str:
    return f"{100 * (found['value'] or 0):.0f} % ({100 * (found['low'] or 0):.0f} to {100 * (found['high'] or 0):.0f})"


def _number(found: Mapping[str, float | None], digits: int = 1) -> str:
    if found["value"] is None:
        return "unknown"
    low, high = found["low"], found["high"]
    return f"{found['value']:.{digits}f}" + (
        f" ({low:.{digits}f} to {high:.{digits}f})" if low is not None and high is not None else ""
    )
