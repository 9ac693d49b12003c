"""The model card of a version, in the Hugging Face model-card format: YAML front matter, then Markdown.

Everything in it comes from the lineage (manifest, training result, report), so that it is true by construction. It is in
English, as such cards are. https://huggingface.co/docs/hub/model-cards
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from finetune_assets.evaluation.candidates import BASE, CHAMPION, TUNED
from finetune_assets.evaluation.decision import order
from finetune_assets.evaluation.report import MARKDOWN, flat, human, interval, verdict_line
from finetune_assets.evaluation.texts import SIGNED, Texts

T = Texts("en")
GOOD = 0.9  # share of rules kept, from which an intent counts as one the model is good at
WEAK = 0.7
MOST_EVENTS = 20  # of a training's recoveries that are told one by one


def model_card(
    manifest: Mapping[str, Any],
    training: Mapping[str, Any],
    report: Mapping[str, Any],
    base_card: Mapping[str, Any] | None = None,
) -> str:
    """The card. `training`: result.json of the training; `base_card`: front matter of the base model's own card (licence)."""
    parts = [
        _front_matter(report, base_card or {}),
        _intended(report),
        _data(manifest),
        _training(training, report, manifest),
        _evaluation(report),
        _strengths(report),
        _limits(report),
        _cost(training, report),
        _licence(base_card or {}),
    ]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def _front_matter(report: Mapping[str, Any], base_card: Mapping[str, Any]) -> str:
    tuned = report["candidates"][TUNED]
    metrics = [
        {"type": name, "name": T(f"measure.{name}"), "value": tuned[name]["value"]}
        for name in ("bits_per_byte", "perplexity", "bleu", "chrf", "rouge_l", "similarity", "rules")
        if tuned[name]["value"] is not None
    ]
    dataset = {"name": f"{report['assistant']}, frozen test set", "type": "private", "revision": report["dataset_fingerprint"]}
    name = f"{report['assistant']}-{report['model_version']}"
    head = {
        "license": base_card.get("license", "other"),
        "language": [report["language"]],
        "base_model": report["base_model"],
        "pipeline_tag": "text-generation",
        "library_name": "transformers",
        "tags": ["finetune_assets", "conversational", "fine-tuned", str(report["assistant"])],
        "model-index": [
            {
                "name": name,
                "results": [
                    {"task": {"type": "text-generation", "name": "Dialogue"}, "dataset": dataset, "metrics": metrics},
                ],
            }
        ],
    }
    title = f"# {human(str(report['assistant']))} {report['model_version']}"
    return f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---\n\n{title}"


def _intended(report: Mapping[str, Any]) -> str:
    return (
        f"Answers the conversations of the assistant `{report['assistant']}`. **Verdict of its evaluation: "
        f"{T('verdict.' + report['verdict']).lower()}.** {verdict_line(report, T)}\n\n"
        + "\n".join(f"- {gate_line(gate)}" for gate in report["gates"])
    )


def gate_line(gate: Mapping[str, Any]) -> str:
    """One gate in English, whatever language the report has."""
    signed = gate["name"] in SIGNED
    value = T.value(gate["measure"], gate["value"], signed=signed)
    bounds = T.range(gate["measure"], {"low": gate["low"], "high": gate["high"]}, signed=signed)
    least = T.value(gate["measure"], gate["limit"], signed=signed)
    asked = f"above {least if gate['limit'] else 0}" if signed else f"limit {least}"
    interval = f", 95 % interval {bounds}" if bounds else ""
    needed = f", about {T.number(gate['rows_needed'], 0)} test rows needed" if gate["rows_needed"] else ""
    return f"{T('gate.' + gate['name'])}: {T('outcome.' + gate['outcome']).lower()} ({value}{interval}; {asked}{needed})"


def _data(manifest: Mapping[str, Any]) -> str:
    counts, weeks = manifest.get("counts") or {}, manifest.get("weeks") or []
    rejected = flat(manifest.get("rejected") or {})
    lines = [
        "## Data",
        "",
        f"Frozen data set `{manifest['fingerprint']}`" + (f", weeks {weeks[0]} to {weeks[-1]} ({len(weeks)})." if weeks else "."),
    ]
    for key, title in (("split", "Rows by split"), ("source", "Rows by source"), ("tenant", "Rows by tenant")):
        if counts.get(key):
            lines.append(f"- {title}: " + ", ".join(f"{human(str(name))} {T.number(n, 0)}" for name, n in counts[key].items()))
    if rejected:
        lines.append(
            "- Not used: "
            + ", ".join(f"{human(name)} {T.number(n, 0)}" for name, n in sorted(rejected.items(), key=lambda p: -p[1]))
        )
    held = rejected.get("no_consent", 0)
    lines.append(
        f"- Consent: rows of users who declined training are never used ({T.number(held, 0)} left out here); "
        "a source without a consent column counts as consenting."
    )
    lines.append("- Personal data were replaced by placeholders when the source was read, before anything was stored.")
    return "\n".join(lines)


def _training(training: Mapping[str, Any], report: Mapping[str, Any], manifest: Mapping[str, Any]) -> str:
    rows = [f"- Base model: `{report['base_model']}`"]
    for key in ("preset", "objective", "adapter", "train_loss", "eval_loss", "steps", "tokens", "seconds", "resumed", "seed"):
        value = training.get(key)
        if value is not None:
            rows.append(f"- {human(key).capitalize()}: {_plain(value)}")
    hyperparameters = training.get("hyperparameters")
    if isinstance(hyperparameters, Mapping):
        rows.append(
            "- Hyper-parameters: "
            + ", ".join(f"{human(str(k))} {_plain(v)}" for k, v in hyperparameters.items() if v is not None)
        )
    rows += [*_preferred(training), *_recovered(training)]
    code = (training.get("environment") or {}).get("code") or report.get("code_version")
    if code:
        rows.append(f"- Code: `{code}`; data rules: version {manifest.get('code_version', '?')}")
    if report.get("reproduce"):
        rows.append(f"- Made again by: `{report['reproduce']}`")
    return "## Training\n\n" + "\n".join(rows)


def _preferred(training: Mapping[str, Any]) -> list[str]:
    """What dpo or kto did to rows that they never saw."""
    rows: list[str] = []
    for stage in training.get("stages") or []:
        held = stage.get("heldout")
        if held and held["reward_accuracy"]["value"] is not None:
            accuracy, nats = held["reward_accuracy"], held["good_nats_per_token"]
            rows.append(
                f"- {stage['objective'].upper()} on {held['rows']:,} held-out rows: reward accuracy {accuracy['value']:.3f} "
                f"(95 % interval {accuracy['low']:.3f} to {accuracy['high']:.3f}), nats per token of good replies "
                f"{nats['before']:.3f} before and {nats['after']:.3f} after"
            )
    return rows


def _recovered(training: Mapping[str, Any]) -> list[str]:
    """What the training did about its own trouble."""
    events = training.get("recoveries") or []
    told = [f"- At step {one['step']:,} of {one['stage']}: {one.get('cause') or one['what']}; {one['did']}" for one in events]
    return told if len(told) <= MOST_EVENTS else [*told[:MOST_EVENTS], f"- {len(told) - MOST_EVENTS} more in training_log.jsonl"]


def _evaluation(report: Mapping[str, Any]) -> str:
    names = order(list(report["candidates"]))
    told = {other: report["differences"].get(f"{TUNED}_vs_{other}") for other in (BASE, CHAMPION)}
    versus = {other: found for other, found in told.items() if found}
    titles = [*(T.candidate(name) for name in names), *(f"Tuned less {T.candidate(other).lower()}" for other in versus)]
    lines = [
        "## Evaluation",
        "",
        f"{T.number(report['test_rows'], 0)} replies of {T.number(report['test_conversations'], 0)} conversations "
        "of users that the training never saw; "
        "95 % intervals from a paired bootstrap over conversations.",
        "",
        f"| Measure | {' | '.join(titles)} |",
        "|---" * (len(titles) + 1) + "|",
    ]
    for measure in MARKDOWN:
        values = [report["candidates"][name][measure] for name in names]
        if all(value["value"] is None for value in values):
            continue
        cells = [interval(T, measure, value) for value in values]
        cells += [interval(T, measure, found[measure], signed=True) if measure in found else "" for found in versus.values()]
        lines.append(f"| {T('measure.' + measure)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _strengths(report: Mapping[str, Any]) -> str:
    """Intents by the share of rules kept, where the references keep them."""
    judged = [(one["intent"], one["candidates"].get(TUNED), one["rows"]) for one in report["rules_by_intent"]]
    good = [
        f"{human(intent)} ({T('percent', n=round(100 * kept))} of its rules kept, {rows} rows)"
        for intent, kept, rows in judged
        if kept is not None and kept >= GOOD
    ]
    weak = [
        f"{human(intent)} ({T('percent', n=round(100 * kept))}, {rows} rows)"
        for intent, kept, rows in judged
        if kept is not None and kept < WEAK
    ]
    if not judged:
        return "## What it is good at\n\nNot judged: the assistant's YAML has no rules."
    lines = [
        "## What it is good at",
        "",
        ", ".join(good) + "." if good else f"No intent in which it keeps {T('percent', n=round(100 * GOOD))} of the rules.",
    ]
    return "\n".join(lines + (["", f"Weak: {', '.join(weak)}."] if weak else []))


def _limits(report: Mapping[str, Any]) -> str:
    found = report["models"][TUNED]["personal_data"]
    seen = ", ".join(f"{human(kind)} {n}" for kind, n in found.items())
    probe = (
        f"In the test replies recognisers found: {seen}."
        if seen
        else "In the test replies recognisers found none of the kinds they know."
    )
    context = report["models"][TUNED]["context"]
    lines = [T("limit.facts"), f"{T('limit.privacy')} {probe}", T("limit.similarity"), T("limit.seed")]
    lines.append(
        f"Longest context: {T.number(context, 0)} tokens; longer conversations lose their oldest turns." if context else ""
    )
    return "## Known limitations\n\n" + "\n".join(f"- {line}" for line in lines if line)


def _cost(training: Mapping[str, Any], report: Mapping[str, Any]) -> str:
    tuned, machine = report["candidates"][TUNED], report["machine"]
    where = f"{machine.get('gpu') or machine.get('processor')}, {machine.get('threads')} threads"
    usd = training.get("usd")
    spent = f", US$ {T.number(usd, 2)}" if isinstance(usd, int | float) else ""
    use = tuned["usd_per_1000"]["value"]
    busy = "" if report["models"][TUNED]["url"] else " (while the machine is busy)"
    price = (
        f", {T.value('usd_per_1000', use)} for 1,000 replies{busy}"
        if use is not None
        else "; no hourly rate is set, so no price is given"
    )
    return (
        f"## Cost\n\n- Training: {T.duration(training.get('seconds'))}{spent}\n"
        f"- Use: {T.value('seconds_p50', tuned['seconds_p50']['value'])} a reply (median, one at a time, {where}){price}\n"
        f"- Size: {T.value('bytes', tuned['bytes']['value'])}, {T.value('parameters', tuned['parameters']['value'])} parameters"
    )


def _licence(base_card: Mapping[str, Any]) -> str:
    licence = base_card.get("license")
    stated = f"The base model is under `{licence}`" if licence else "The base model's card names no licence"
    owner = "The conversations belong to the assistant's owner and are not part of this folder."
    return f"## Licence\n\n{stated}; the tuned weights inherit its terms. {owner}"


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
