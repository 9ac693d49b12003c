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
from finetune_assets.evaluation.candidates import BASE, CHAMPION, TUNED
from finetune_assets.evaluation.decision import SMALL, always_on, order
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
    if "judged" not in decision:
        judged = {key: report[key] for key in ("verdict", "reasons")} if decision["recommendation"] == TUNED else None
        decision |= {"judged": judged, "ready": decision["ready"] if judged else None}
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
        verdict_line=verdict_line(report, texts),
        changed=changed(report),
        volume=volume(report),
        prompting=prompting(report),
        always_on=always_on(report["decision"].get("usd_per_hour")),
        never=[texts.candidate(name) for name in never(report)],
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
    decision = report["decision"]
    lines = [f"## {t('verdict.' + report['verdict'])}", "", verdict_line(report, t), ""]
    lines += [f"- {reason}" for reason in report["reasons"]]
    unjudged = " " + t("decision.unjudged") if decision["judged"] is None else ""
    lines += ["", t(_advice(report), option=t("decision.option." + decision["recommendation"])) + unjudged]
    versus = [(other, report["differences"][f"{TUNED}_vs_{other}"]) for other in (BASE, CHAMPION) if _compared(report, other)]
    titles = [t.candidate(name) for name in names] + [t(f"text.difference_{other}") for other, _ in versus]
    lines += ["", f"| {t('text.measure')} | {' | '.join(titles)} |", "|---" * (len(titles) + 1) + "|"]
    for measure in MARKDOWN:
        cells = [t.value(measure, report["candidates"][name][measure]["value"]) for name in names]
        if any(cell != "–" for cell in cells):
            cells += [interval(t, measure, found[measure], signed=True) if measure in found else "" for _, found in versus]
            lines.append(f"| {t('measure.' + measure)} | {' | '.join(cells)} |")
    lines += ["", t("text.measured", rows=report["test_rows"], conversations=report["test_conversations"]), ""]
    text = "\n".join(lines)
    while len(text.encode()) > MOST_MARKDOWN:
        text = text[: len(text) - 200] + "…\n"
    return text


def verdict_line(report: Mapping[str, Any], t: Texts) -> str:
    """The sentence under the verdict. One that cannot tell says whether something was too close, or could not be measured."""
    open_gates = [gate for gate in report["gates"] if gate["outcome"] == "cannot_tell"]
    unknown = [t(f"gate.{gate['name']}").lower() for gate in open_gates if gate["value"] is None]
    if report["verdict"] != "cannot_tell" or not unknown:
        return t(f"verdict_line.{report['verdict']}")
    key = "unmeasured" if len(unknown) == len(open_gates) else "partly_unmeasured"
    return t(f"verdict_line.{key}", gates=", ".join(unknown))


def _advice(report: Report) -> str:
    if not report["decision"]["settled"]:
        return "decision.wait"
    return "decision.leads" if report["decision"]["ready"] is False else "decision.use"


def recommended(report: Report) -> str:
    """The option that leads, and what stands against it: `rag (not ready)`, `base (judged by no gate)`."""
    found = report["decision"]
    return found["recommendation"] + {True: "", False: " (not ready)", None: " (judged by no gate)"}[found["ready"]]


def _compared(report: Report, other: str) -> bool:
    return f"{TUNED}_vs_{other}" in report["differences"]


def changed(report: Report) -> dict[str, list[str]]:
    """Measures by how the tuned model differs from the champion: `better`, `worse` or `open`; empty without a champion."""
    if not _compared(report, CHAMPION):
        return {}
    found: dict[str, list[str]] = {"better": [], "worse": [], "open": []}
    for measure, difference in report["differences"][f"{TUNED}_vs_{CHAMPION}"].items():
        if difference["value"] is not None and MEASURES[measure].better != "neither":
            found[settled(measure, difference)].append(measure)
    return found


def interval(t: Texts, measure: str, found: Mapping[str, float | None], *, signed: bool = False) -> str:
    """`value (low to high)`, without what is not known; `signed`: of a difference."""
    if found["value"] is None:
        return "–"
    bounds = t.range(measure, dict(found), signed=signed)
    return t.value(measure, found["value"], signed=signed) + (f" ({bounds})" if bounds else "")


def settled(measure: str, difference: Mapping[str, float | None]) -> str:
    """`better` or `worse` where the whole interval says so, also after Holm's correction, else `open`. A `p` that is null: too
    few conversations; one that is not there: a report of a version that knew none."""
    low, high, way = difference["low"], difference["high"], MEASURES[measure].better
    p = difference.get("p", 0.0)
    if low is None or high is None or way == "neither" or low <= 0 <= high or p is None or p > ALPHA:
        return "open"
    return "better" if (low > 0) == (way == "higher") else "worse"


def volume(report: Report) -> str:
    """Whether the rows were `enough` to beat the base by more than chance in the measure that decides, `short` of it, or `open`:
    where the difference may be chance, or there is none to look at."""
    measure = report["decision"]["measure"]
    found = report["differences"].get(f"{TUNED}_vs_{BASE}", {}).get(measure)
    if not found or found["low"] is None or found["high"] is None or found.get("p", 0.0) is None:
        return "open"
    if found["low"] == found["high"] == 0:  # the same replies
        return "short"
    return {"better": "enough", "worse": "short"}.get(settled(measure, found), "open")


def never(report: Report) -> list[str]:
    """Candidates against which the training is never paid back by cheaper replies, where all prices are known."""
    decision, priced = report["decision"], {name: v["usd_per_1000"]["value"] for name, v in report["candidates"].items()}
    if decision["training_usd"] is None or priced[TUNED] is None:
        return []
    return [name for name, requests in decision["break_even"].items() if requests is None and priced[name] is not None]


def prompting(report: Report) -> str:
    """Whether the base learns from its prompt: `helps`, `helps_not`, `too_small` (it does not, and is small), `open`."""
    helps, parameters = report["decision"]["prompting_helps"], report["candidates"].get(BASE, {}).get("parameters", {})
    if helps is False and (parameters.get("value") or SMALL) < SMALL:
        return "too_small"
    return {True: "helps", False: "helps_not"}.get(helps, "open")


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
