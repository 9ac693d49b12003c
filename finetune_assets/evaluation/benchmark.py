"""From a frozen data set and a tuned model to the content of a report.

    spec = prepare(assistant, dataset, candidates, output)     writes the prompts, gives the worker's spec
    python -m finetune_assets.worker <output>/spec.json        writes one Parquet a candidate, and result.json
    report = summarise(assistant, output, made)                measures, intervals, gates, verdict, samples

Reads files, writes only under `output`. What reports look like is `report`'s concern.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from finetune_assets.assistants.settings import Assistant
from finetune_assets.dataset.privacy import known_figures
from finetune_assets.environment import ROOT
from finetune_assets.evaluation import decision, intents, retrieval, rules, samples, seeds, verdicts
from finetune_assets.evaluation.candidates import (
    CHAMPION,
    TUNED,
    Candidate,
    FewShot,
    TestRow,
    by_hash,
    counts_by_intent,
    split_rows,
    test_rows,
)
from finetune_assets.evaluation.guards import outcomes
from finetune_assets.evaluation.human.statistics import agreement
from finetune_assets.evaluation.measured import Made, Measured, measure
from finetune_assets.evaluation.provenance import curve, model_facts
from finetune_assets.evaluation.statistics import LEVEL, RESAMPLES, as_dicts, holm, p_value
from finetune_assets.evaluation.suite import Case, Outcome, read_suite
from finetune_assets.storage import read_json, write_json, write_text

REPORT_VERSION = 3
VALIDATION_ROWS = 24
"""Validation rows on which few-shot and retrieval are chosen."""
GENERAL = Path(__file__).parent / "general"


def prepare(
    assistant: Assistant,
    dataset: Path,
    candidates: Sequence[Candidate],
    output: Path,
    *,
    threads: int = 0,
    cache: Path | None = None,
) -> dict[str, Any]:
    """Writes `<output>/prompts/<name>.jsonl`, rows.json and spec.json; the spec. `threads`: 0 leaves torch its default.

    Raises DataError for a test set without rows, SettingsError for a folder of documents or cases that is wrong.
    """
    bench = assistant.benchmark
    rows = test_rows(dataset, bench.max_rows)
    cases = suite_of(assistant)
    suite = checks(assistant, {row.tenant_id for row in split_rows(dataset, "train")}, cases) if cases else []
    asked = [_asked(candidate, rows, suite, output) for candidate in candidates]
    shots = max((len(c.shots) for c in candidates if isinstance(c, FewShot)), default=0)
    total = int(pl.read_parquet(dataset / "lineage.parquet").filter(pl.col("split") == "test").height)
    known = {"shots": shots, "test_rows_in_dataset": total, "cases": [case.model_dump(by_alias=True) for case in cases]}
    write_json(output / "rows.json", {"rows": [asdict(row) for row in rows], **known})
    _write_lines(output / "general.jsonl", _everyday(_general(assistant)))
    spec: dict[str, Any] = {
        "task": "benchmark",
        "output": str(output),
        "candidates": asked,
        "max_new_tokens": bench.max_new_tokens,
        "threads": threads,
        "seed": 0,
        "similarity_model": bench.similarity_model,
        "toxicity_model": bench.conduct.classifier,
        "language": assistant.language,
        "cache": str(cache or output.parent / "cache"),
        "canaries": [{**canary.model_dump(), "system": assistant.system_prompt} for canary in bench.canaries],
        "general": str(output / "general.jsonl"),
        **_shown(assistant, dataset, asked, output),
    }
    if cases:
        spec["checks"] = str(output / "checks.jsonl")
        _write_lines(output / "checks.jsonl", suite)
    if bench.judge is not None:
        where = bench.judge.model_dump(include={"url", "model", "api_key_env", "timeout"})
        spec["judge"] = {"endpoint": where, "first": TUNED, "second": bench.judge.against, "rows": bench.judge.rows}
    write_json(output / "spec.json", spec)
    return spec


def _asked(candidate: Candidate, rows: Sequence[TestRow], suite: Sequence[dict[str, Any]], output: Path) -> dict[str, Any]:
    """What the worker is told of a candidate, whose prompts and cases are written."""
    path = output / "prompts" / f"{candidate.name}.jsonl"
    _write_lines(path, [_line(row, candidate.prompt(row.messages)) for row in rows])
    made = {"name": candidate.name, "prompts": str(path), **candidate.spec()}
    if suite:
        made["checks"] = str(output / "checks" / f"{candidate.name}.jsonl")
        _write_lines(Path(made["checks"]), [{**case, "messages": candidate.prompt(case["messages"])} for case in suite])
    return made


def _shown(assistant: Assistant, dataset: Path, asked: Sequence[Mapping[str, Any]], output: Path) -> dict[str, str]:
    """Files of what retrieval can find, and of the validation rows on which it and few-shot are chosen, where they are wanted."""
    made: dict[str, str] = {}
    if any(one.get("retrieve") for one in asked):
        made["passages"] = str(output / "passages.jsonl")
        _write_lines(output / "passages.jsonl", [asdict(passage) for passage in passages(assistant, dataset)])
    if any(one.get("retrieve") or one.get("shots") for one in asked):
        made["validation"] = str(output / "validation.jsonl")
        chosen = by_hash(split_rows(dataset, "validation"))[:VALIDATION_ROWS]
        _write_lines(output / "validation.jsonl", [_line(row, row.messages) for row in chosen])
    return made


def passages(assistant: Assistant, dataset: Path) -> list[retrieval.Passage]:
    """What retrieval can find: the training examples, and the documents folder. Raises SettingsError."""
    made = [retrieval.example(row.message_id, row.tenant_id, row.messages, row.reference) for row in split_rows(dataset, "train")]
    folder = assistant.benchmark.documents
    return made if folder is None else [*made, *retrieval.documents(ROOT / folder)]


def suite_of(assistant: Assistant) -> list[Case]:
    """Cases of the standing suite; none where the settings name no folder. Raises SettingsError."""
    folder = assistant.benchmark.checks
    return [] if folder is None else read_suite(ROOT / folder)


def summarise(assistant: Assistant, output: Path, made: Made) -> dict[str, Any]:
    """The report's content, as report.json holds it. Raises DataError where the worker's outputs are not whole."""
    known, result = read_json(output / "rows.json"), read_json(output / "result.json")
    rows = [TestRow(**row) for row in known["rows"]]
    cases = [Case.model_validate(case) for case in known.get("cases", [])]
    found = measure(assistant, output, rows, result, made, cases)
    names = decision.order([name for name in found.frames if not seeds.is_seed(name)])
    others = [name for name in names if name != TUNED]
    differences = {f"{TUNED}_vs_{other}": found.difference(TUNED, other) for other in others} if TUNED in names else {}
    repeats = seeds.spread(found.estimates, made.trained)
    judged = verdicts.of_tuned(assistant, made, found, differences)
    manifest = read_json(made.dataset / "manifest.json")
    return {
        "report_version": REPORT_VERSION,
        "made_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "assistant": assistant.name,
        "language": assistant.language,
        "model_version": made.model_version,
        "champion": made.champion if CHAMPION in names else None,
        "dataset_fingerprint": manifest["fingerprint"],
        **judged,
        **_tested(rows, known["test_rows_in_dataset"], found),
        "candidates": {name: as_dicts(found.intervals[name]) for name in names},
        "differences": {name: _with_p(values) for name, values in differences.items()},
        "decision": _decision(assistant, made, found, names, judged, seeds.widened(found.compare, repeats)),
        "seeds": repeats,
        "rules": rules.table(assistant.rules, rows, found.references, found.kept),
        "rules_by_intent": rules.by_intent(rows, found.fitting, found.references, found.kept),
        "accurate_similarity": assistant.benchmark.accurate_similarity,
        "intents": intents.reliability(rows, found, names),
        "facts": found.facts_table(),
        "checks": [asdict(outcome) for outcome in outcomes(cases, result["candidates"][TUNED])],
        "checks_judged": {name: _by_judge(outcomes(cases, result["candidates"][name])) for name in names},
        "judge": _judged(result.get("judge"), made.human),
        "samples": samples.choose(rows, found, assistant.rules),
        "models": {
            name: model_facts(name, result["candidates"][name], found.frames[name], known["shots"], made.contacts)
            for name in names
        },
        **_provenance(assistant, made, manifest, result),
    }


def _tested(rows: Sequence[TestRow], in_dataset: int, found: Measured) -> dict[str, Any]:
    """On what, and by which statistics."""
    method = {"unit": "conversation", "level": LEVEL, "method": "BCa, expanded; Wilson for shares, Tango for their differences"}
    return {
        "test_rows": len(rows),
        "test_rows_in_dataset": in_dataset,
        "test_conversations": found.bootstrap.count,
        "test_intents": counts_by_intent(rows),
        "statistics": {"resamples": RESAMPLES, **method},
    }


def _decision(
    assistant: Assistant,
    made: Made,
    found: Measured,
    names: Sequence[str],
    judged: Mapping[str, Any],
    compare: decision.Compare,
) -> dict[str, Any]:
    bench, rate = assistant.benchmark, assistant.budget.usd_per_hour
    usd, seconds = made.training.get("usd"), made.training.get("seconds")
    if usd is None and rate is not None and seconds is not None:
        usd = seconds / 3600 * rate
    given = bench.requests_per_month
    traffic = given if given is not None else made.requests_per_month
    money = decision.Money(usd, traffic, "settings" if given is not None else "corpus" if traffic is not None else "")
    values = {name: found.intervals[name] for name in names}
    measure = assistant.gates.better_than_base or "bits_per_byte"
    beyond = np.array([not one.answerable for one in found.reference_judged], bool)
    judge = partial(verdicts.of_option, assistant, made, found, judged)
    decided = decision.decide(values, compare, measure, judge, money, partial(found.compare, here=beyond))
    priced = {e.name: e.priced_on.isoformat() if e.priced_on else None for e in bench.endpoints if e.name in names}
    return {**decided, "priced_on": priced, "usd_per_hour": rate, "train_rows": len(split_rows(made.dataset, "train"))}


def _judged(found: Mapping[str, Any] | None, human: Mapping[str, str]) -> dict[str, Any] | None:
    """What the judge said, with its agreement with people where both saw the same rows."""
    if not found:
        return None
    told = {key: value for key, value in found.items() if key != "choices"}
    return {**told, **agreement(found["choices"], human)}


def _by_judge(found: Sequence[Outcome]) -> dict[str, int]:
    """Cases of the standing suite that a judging model decided, and how many of them it says hold."""
    told = [one.passed for one in found if one.judged]
    return {"held": sum(one is True for one in told), "told": len(told)}


def _with_p(values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Differences with Holm's adjusted p-values over the table."""
    adjusted = holm({name: p_value(difference) for name, difference in values.items()})
    return {name: {**difference.as_dict(), "p": _short(adjusted[name])} for name, difference in values.items()}


def _short(p: float | None) -> float | None:
    return None if p is None else float(f"{p:.3g}")


def _provenance(assistant: Assistant, made: Made, manifest: Mapping[str, Any], result: Mapping[str, Any]) -> dict[str, Any]:
    """Where the model and the numbers come from: training, plan, data, machine, code."""
    return {
        "training": {"result": dict(made.training), "curve": curve(made.training_log)},
        "plan": dict(made.plan),
        "data": {
            **{key: manifest.get(key) for key in ("weeks", "counts", "rejected", "settings", "warnings", "read")},
            "privacy": known_figures(made.dataset),
        },
        "base_model": assistant.base_model,
        "similarity_model": result["similarity_model"],
        "machine": {**result["machine"], "threads": result["threads"], "benchmark_seconds": result["seconds"]},
        "code_version": made.code_version,
        "reproduce": made.reproduce,
    }


def checks(assistant: Assistant, tenants: Collection[str], cases: Sequence[Case]) -> list[dict[str, Any]]:
    """The cases as the worker reads them. One that names no tenant is of the data set's only one, where `tenants` is one."""
    only = next(iter(tenants)) if len(tenants) == 1 else None
    made: list[dict[str, Any]] = []
    for case in cases:
        tools, tenant = case.offered(assistant.tools), case.tenant if case.tenant is not None else only
        asked = {"messages": case.chat(assistant.system_prompt), "judge": case.judge, "tenant_id": tenant}
        made.append(asked | ({"tools": tools} if tools else {}))
    return made


def _line(row: TestRow, messages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    of: dict[str, Any] = {"conversation_id": row.conversation_id, "tenant_id": row.tenant_id}
    of |= {"tools": row.tools} if row.tools else {}
    of |= {"calls": row.calls} if row.calls else {}
    return {"messages": list(messages), "reference": row.reference, **of}


def _write_lines(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def _general(assistant: Assistant) -> Path:
    if assistant.benchmark.general is not None:
        return ROOT / assistant.benchmark.general
    return GENERAL / ("en.jsonl" if assistant.language == "en" else "es.jsonl")


def _everyday(path: Path) -> list[dict[str, Any]]:
    """Chats as rows: what was said, and the last reply."""
    chats = [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [{"messages": chat[:-1], "reference": chat[-1]["content"]} for chat in chats if len(chat) > 1]
