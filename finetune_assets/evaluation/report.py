"""report.json, report.html (one file, nothing loaded from elsewhere) and report.md (short, for Dagster's metadata) from a
report's content.

The pages speak the assistant's language; `templates/` holds their shape, style and texts.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from finetune_assets.evaluation import plots
from finetune_assets.evaluation.candidates import BASE, TUNED
from finetune_assets.evaluation.decision import order
from finetune_assets.evaluation.measures import COMPARABLE, MEASURES
from finetune_assets.evaluation.texts import SIGNED, TEMPLATES, Texts
from finetune_assets.storage import write_json, write_text

Report = dict[str, Any]
GLANCE = ("accuracy", "rules", "faithful", "bits_per_byte", "seconds_p50")
MOST_GLANCE = 4
QUALITY = (*(name for name in MEASURES if name in COMPARABLE), "forgetting", "overfitting", "parity")
SEEDED = ("accuracy", "rules", "faithful", "similarity", "chrf", "bits_per_byte")
"""Measures whose noise of retraining is shown."""
COST = ("seconds_p50", "seconds_p95", "tokens_per_second", "usd_per_1000", "parameters", "bytes")
MARKDOWN = (
    "bits_per_byte",
    "perplexity",
    "accuracy",
    "rules",
    "tool_calls",
    "faithful",
    "invented",
    "similarity",
    "similarity_floor",
    "chrf",
    "bleu",
    "rouge_l",
    "empty",
    "repeated",
    "unfinished",
    "toxic",
    "refused",
    "personal_data",
    "other_tenant",
    "forgetting",
    "seconds_p50",
    "seconds_p95",
    "usd_per_1000",
)
MOST_MARKDOWN = 6_000  # bytes
ALPHA = 0.05


def write_report(report: Report, folder: Path) -> dict[str, Path]:
    """Writes report.html, report.md and, last, report.json; their paths by ending."""
    paths = {ending: folder / f"report.{ending}" for ending in ("html", "md", "json")}
    write_text(paths["html"], html(report))
    write_text(paths["md"], markdown(report))
    write_json(paths["json"], report)
    return paths


def whole(report: Report) -> Report:
    """A report of an earlier version of this project, with what it does not know as null: erasures write old reports again."""
    unknown: dict[str, Any] = {"value": None, "low": None, "high": None}
    candidates = {
        name: {measure: values.get(measure, unknown) for measure in MEASURES} for name, values in report["candidates"].items()
    }
    decision = {"settled": True, **report["decision"]}
    absent: dict[str, Any] = {"intents": [], "seeds": None, "accurate_similarity": None, "checks_judged": {}}
    return {**absent, **report, "candidates": candidates, "decision": decision}


def html(report: Report) -> str:
    """The page."""
    report = whole(report)
    texts = Texts(report["language"])
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["human"] = human
    template = environment.get_template("report.html.j2")
    return template.render(
        report=report,
        t=texts,
        plots=plots,
        names=order(list(report["candidates"])),
        measures=MEASURES,
        glance=[name for name in GLANCE if report["candidates"][TUNED][name]["value"] is not None][:MOST_GLANCE],
        SIGNED=SIGNED,
        beats_base=beats_base(report),
        funnel=funnel(report),
        quality=QUALITY,
        cost=COST,
        seeded=SEEDED,
        settled=settled,
        advice=_advice(report),
        bars=bars,
        rejected=flat(report["data"]["rejected"] or {}),
    )


def markdown(report: Report) -> str:
    """Verdict, reasons, gates and measures, under MOST_MARKDOWN bytes."""
    report, t = whole(report), Texts(report["language"])
    names = order(list(report["candidates"]))
    lines = [f"## {t('verdict.' + report['verdict'])}", "", t(f"verdict_line.{report['verdict']}"), ""]
    lines += [f"- {reason}" for reason in report["reasons"]]
    lines += ["", f"| {t('text.measure')} | {' | '.join(t.candidate(name) for name in names)} | {t('text.difference')} |"]
    lines += ["|---" * (len(names) + 2) + "|"]
    versus = report["differences"].get(f"{TUNED}_vs_{BASE}", {})
    for measure in MARKDOWN:
        cells = [t.value(measure, report["candidates"][name][measure]["value"]) for name in names]
        if any(cell != "–" for cell in cells):
            difference = versus.get(measure)
            shown = _difference(t, measure, difference) if difference else ""
            lines.append(f"| {t('measure.' + measure)} | {' | '.join(cells)} | {shown} |")
    lines += ["", t("text.measured", rows=report["test_rows"], conversations=report["test_conversations"]), ""]
    lines += ["", t(_advice(report), option=t("decision.option." + report["decision"]["recommendation"])), ""]
    text = "\n".join(lines)
    while len(text.encode()) > MOST_MARKDOWN:
        text = text[: len(text) - 200] + "…\n"
    return text


def _advice(report: Report) -> str:
    return "decision.use" if report["decision"]["settled"] else "decision.wait"


def _difference(t: Texts, measure: str, difference: Mapping[str, float | None]) -> str:
    if difference["value"] is None:
        return "–"
    bounds = t.range(measure, dict(difference), signed=True)
    return f"{t.value(measure, difference['value'], signed=True)} ({bounds})"


def settled(measure: str, difference: Mapping[str, float | None]) -> str:
    """`better` or `worse` where the whole interval says so, also after Holm's correction, else `open`. A `p` that is null: too
    few conversations; one that is not there: a report of a version that knew none."""
    low, high, way = difference["low"], difference["high"], MEASURES[measure].better
    p = difference.get("p", 0.0)
    if low is None or high is None or way == "neither" or low <= 0 <= high or p is None or p > ALPHA:
        return "open"
    return "better" if (low > 0) == (way == "higher") else "worse"


def beats_base(report: Report) -> bool:
    """Whether the tuned model beats the base by more than chance in the measure that decides."""
    measure = report["decision"]["measure"]
    difference = report["differences"].get(f"{TUNED}_vs_{BASE}", {}).get(measure)
    return bool(difference) and settled(measure, difference) == "better"


def funnel(report: Report) -> list[tuple[str, int, float]]:
    """(step, count, share of the first) from the replies that were read to the rows that were measured."""
    counts = report["data"]["counts"] or {}
    split = counts.get("split", {})
    steps = [
        ("read", report["data"].get("read")),
        ("examples", counts.get("examples")),
        ("train", split.get("train")),
        ("test", split.get("test")),
        ("measured", report["test_rows"]),
    ]
    known = [(name, int(n)) for name, n in steps if isinstance(n, int)]
    most = max((n for _, n in known), default=0) or 1
    return [(name, n, n / most) for name, n in known]


def bars(counts: Mapping[str, Any] | None, most: int = 12) -> list[tuple[str, int, float]]:
    """(name, count, share of the largest), largest first; what is beyond `most` together as `…`."""
    pairs = sorted(((str(k), int(v)) for k, v in (counts or {}).items()), key=lambda pair: (-pair[1], pair[0]))
    if len(pairs) > most:
        pairs = [*pairs[: most - 1], ("…", sum(n for _, n in pairs[most - 1 :]))]
    largest = max((n for _, n in pairs), default=0) or 1
    return [(name, n, n / largest) for name, n in pairs]


def flat(counts: Mapping[str, Any]) -> dict[str, int]:
    """Counts of a tree of counts by its leaves' names: {"examples": {"reply_length": 3}} -> {"reply_length": 3}."""
    made: dict[str, int] = {}
    for name, value in counts.items():
        for leaf, n in flat(cast("Mapping[str, Any]", value)).items() if isinstance(value, Mapping) else [(name, int(value))]:
            made[leaf] = made.get(leaf, 0) + n
    return made


def human(name: str) -> str:
    """`personal_data` -> `personal data`."""
    return name.replace("_", " ")
