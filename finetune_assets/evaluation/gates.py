"""What a version must reach to be served: each gate decides on an interval, never on a point.

    limit       passes where the whole 95 % interval is on the right side of the limit, fails where the whole interval is on the
                wrong side;
                in between nobody can tell, and it says about how many test rows would settle it
    events      (empty, repeated, toxic, refused, personal data) the same, but none at all in the test set passes: no test set of
                a usable size proves a share of zero. Where the limit is zero, one find is a failure
    better      passes where the whole interval of the paired difference is above the margin (zero by default), fails where none
                of it is: superiority
    not worse   (than the champion) passes where the whole interval of the paired improvement is above minus the margin, fails
                where none of it is: non-inferiority
    number      (training loss, parity, canaries, standing suite) one number, compared as it is; secrets and cases that could not
                be asked, of which nothing is known, make an interval of it

Rows without a reply are no evidence: counted are the conversations that an interval stands on, and under `MIN_CONVERSATIONS` it
means little, so gates that stand on one cannot tell. What is switched on and cannot be measured is told with its reason: not
applicable where it never can (likelihoods behind an address), cannot tell where it could (a secret or a suite that was not
answered). Verdict: one failure means do not serve; else one gate that cannot tell means cannot tell; else serve. All gates have
to pass, so testing several of them makes no false "serve" more likely, and no correction for their number is due
(intersection-union test, Berger 1982). The table of differences is another matter: there Holm's correction is applied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from finetune_assets.assistants.settings.evaluation import Gates
from finetune_assets.evaluation.measures import LIKELIHOODS, MEASURES, improvement
from finetune_assets.evaluation.statistics import MIN_CONVERSATIONS, NOTHING, Interval, rows_needed
from finetune_assets.evaluation.texts import Finding, Texts

Outcome = Literal["passed", "failed", "cannot_tell", "not_applicable"]
Verdict = Literal["serve", "do_not_serve", "cannot_tell"]

GATES = {
    "training_loss": "Training loss under `gates.max_training_loss`.",
    "perplexity": "Perplexity of the references under `gates.max_perplexity`, with its whole interval.",
    "reply_seconds": "Median seconds of a reply under `gates.max_reply_seconds`.",
    "rules": "Share of the assistant's rules that replies keep, above `gates.min_rules` with its whole interval.",
    "faithful": "Share of replies that state nothing but what the conversation supports, above `gates.min_faithful`.",
    "personal_data": "No known kind of personal data in replies.",
    "empty": "Empty replies.",
    "repeated": "Replies that repeat themselves.",
    "toxic": "Replies that insult, by the lists and the classifier of `benchmark.conduct`, at most `gates.max_toxic`.",
    "refused": "Replies that refuse to answer, at most `gates.max_refused`.",
    "other_tenant": "Replies with what is another tenant's, under `gates.max_other_tenant`.",
    "above_similarity_floor": "Replies are nearer to their reference than to a shuffled one, with the whole interval.",
    "better_than_base": "Better than the base in the assistant's chosen measure by `gates.base_margin`, with the whole interval.",
    "not_worse_than_champion": "Not worse than the champion by more than `gates.champion_margin`, with the whole interval.",
    "keeps_details": "Not fewer of the conversation's details taken over than by the base.",
    "forgetting": "Bits per byte in everyday talk risen by less than `gates.max_forgetting` against the base.",
    "overfitting": "Loss of the test rows above the training's by at most `gates.max_overfitting`.",
    "parity": "The same reply alone, as served, as in the benchmark.",
    "canaries": "No secret of `benchmark.canaries` learnt by heart.",
    "checks": "Cases of the standing suite that hold, at least `gates.min_checks`.",
}
"""Every gate and what it asks for, in the order in which they are decided: the names of the checks on `registered_model`."""
MOST_ROWS = 100_000
"""Test rows beyond which nobody would go on collecting: a value that near to its limit is the limit."""
NUMBERS = ("training_loss", "reply_seconds", "parity", "canaries", "checks")
"""Gates that no further test row would settle."""


@dataclass(frozen=True)
class Gate:
    """What one gate found."""

    name: str
    measure: str
    outcome: Outcome
    interval: Interval
    limit: float | None
    reason: str
    rows_needed: int | None = None

    @property
    def passed(self) -> bool | None:
        """True, False, or null where it cannot be told or does not apply."""
        return {"passed": True, "failed": False}.get(self.outcome)

    def as_dict(self) -> dict[str, Any]:
        """For report.json."""
        return {
            "name": self.name,
            "measure": self.measure,
            "outcome": self.outcome,
            "passed": self.passed,
            **self.interval.as_dict(),
            "limit": self.limit,
            "reason": self.reason,
            "rows_needed": self.rows_needed,
        }


@dataclass(frozen=True)
class Evidence:
    """What the gates look at."""

    tuned: Mapping[str, Interval]
    versus_base: Mapping[str, Interval]
    training_loss: float | None
    rows: int
    """Test rows that the tuned model answered."""
    conversations: int
    """Of those rows."""
    rules_set: int
    """Rules in the assistant's YAML."""
    rules_fitting: int
    """Rules that the references themselves keep."""
    versus_champion: Mapping[str, Interval] | None = None
    """Null where there is no champion, or it is the model itself."""
    asked: int | None = None
    """Test rows, answered or not; null: all were."""
    at_address: bool = False
    """Whether the tuned model answers behind an address, which gives no likelihoods."""
    canaries: bool = False
    """Whether the settings name secrets."""
    suite: bool = False
    """Whether they name a standing suite."""


def decide(settings: Gates, evidence: Evidence, texts: Texts) -> list[Gate]:
    """All gates that are switched on, in the order of the settings."""
    judge = _Judge(evidence, texts)
    made: list[Gate | None] = [
        judge.training(settings.max_training_loss),
        judge.limit("perplexity", "perplexity", settings.max_perplexity),
        judge.limit("reply_seconds", "seconds_p50", settings.max_reply_seconds, needs_rows=False),
        judge.rules(settings.min_rules),
        judge.limit("faithful", "faithful", settings.min_faithful),
        judge.events("personal_data", settings.max_personal_data),
        judge.events("empty", settings.max_empty),
        judge.events("repeated", settings.max_repeated),
        judge.events("toxic", settings.max_toxic),
        judge.events("refused", settings.max_refused),
        judge.events("other_tenant", settings.max_other_tenant, needed=False),
        judge.better("above_similarity_floor", "similarity_gain", evidence.tuned.get("similarity_gain", NOTHING))
        if settings.above_similarity_floor
        else None,
        judge.better_than_base(settings.better_than_base, settings.base_margin),
        judge.not_worse(settings.not_worse_than_champion, settings.champion_margin),
        judge.keeps_details() if settings.keeps_details else None,
        judge.guard("forgetting", settings.max_forgetting),
        judge.guard("overfitting", settings.max_overfitting),
        judge.guard("parity", settings.min_parity),
        judge.canaries() if settings.canaries and evidence.canaries else None,
        judge.checks(settings.min_checks) if evidence.suite else None,
    ]
    return [gate for gate in made if gate is not None]


def verdict(gates: Sequence[Gate]) -> Verdict:
    """`serve` where every gate that applies passed."""
    outcomes = {gate.outcome for gate in gates}
    if "failed" in outcomes:
        return "do_not_serve"
    return "cannot_tell" if "cannot_tell" in outcomes else "serve"


TELLING = (
    "canaries",
    "other_tenant",
    "better_than_base",
    "not_worse_than_champion",
    "keeps_details",
    "checks",
    "faithful",
    "rules",
    "above_similarity_floor",
    "toxic",
    "personal_data",
    "overfitting",
    "forgetting",
    "parity",
    "perplexity",
    "training_loss",
    "reply_seconds",
)
"""Gates in the order in which their reasons tell most; the others follow."""


def reasons(gates: Sequence[Gate], evidence: Evidence, texts: Texts) -> list[str]:
    """What decided: failures first, then what cannot be told; where all is well, what passed. Then what was not judged."""
    ordered = sorted(gates, key=lambda gate: TELLING.index(gate.name) if gate.name in TELLING else len(TELLING))
    open_ones = [gate for gate in ordered if gate.outcome == "cannot_tell"]
    found = [gate.reason for gate in ordered if gate.outcome == "failed"]
    if open_ones and evidence.conversations < MIN_CONVERSATIONS:
        needed = max((gate.rows_needed or 0 for gate in open_ones), default=0)
        count = {"rows": texts.number(evidence.rows, 0), "conversations": texts.number(evidence.conversations, 0)}
        if evidence.asked is not None and evidence.rows < evidence.asked:
            found.append(texts("why.unanswered", **count, asked=texts.number(evidence.asked, 0)))
        found.append(texts("why.few", **count, least=texts.number(MIN_CONVERSATIONS, 0), n=texts.number(needed, 0)))
    found += [gate.reason for gate in open_ones]
    if not found:
        found = [gate.reason for gate in ordered if gate.outcome == "passed"]
    return found + [gate.reason for gate in ordered if gate.outcome == "not_applicable"]


class _Judge:
    def __init__(self, evidence: Evidence, texts: Texts) -> None:
        self.evidence, self.texts = evidence, texts

    def training(self, limit: float | None) -> Gate | None:
        if limit is None:
            return None
        loss = self.evidence.training_loss
        if loss is None:
            return self._unjudged("training_loss", "loss", limit, "gate.no_loss")
        interval = Interval(loss, None, None)
        return self._gate("training_loss", "loss", "passed" if loss < limit else "failed", interval, limit)

    def limit(self, name: str, measure: str, limit: float | None, *, needs_rows: bool = True) -> Gate | None:
        if limit is None:
            return None
        interval = self.evidence.tuned.get(measure, NOTHING)
        if interval.value is None and self.evidence.at_address and measure in LIKELIHOODS:
            return self._unjudged(name, measure, limit, "gate.at_address")
        sign = -1 if MEASURES[measure].better == "lower" else 1
        return self._gate(name, measure, self._side(interval, limit, sign, needs_rows), interval, limit)

    def rules(self, limit: float | None) -> Gate | None:
        if limit is None:
            return None
        if self.evidence.rules_fitting == 0:
            return self._unjudged(
                "rules", "rules", limit, "gate.no_rules" if self.evidence.rules_set == 0 else "gate.no_fitting_rules"
            )
        return self.limit("rules", "rules", limit)

    def events(self, measure: str, limit: float | None, *, needed: bool = True) -> Gate | None:
        if limit is None:
            return None
        interval = self.evidence.tuned.get(measure, NOTHING)
        if interval.value is None and not needed:
            return self._unjudged(measure, measure, limit, "gate.nothing")
        if interval.value is None:
            return self._gate(measure, measure, "cannot_tell", interval, limit)
        if interval.value == 0:
            outcome: Outcome = "passed" if self._enough(interval) else "cannot_tell"
        elif limit == 0:
            outcome = "failed"
        else:
            outcome = self._side(interval, limit, -1, True)
        return self._gate(measure, measure, outcome, interval, limit)

    def better(self, name: str, measure: str, gain: Interval, margin: float = 0.0) -> Gate:
        """`gain`: more is better."""
        return self._gate(name, measure, self._above(gain, margin), gain, margin)

    def better_than_base(self, measure: str | None, margin: float) -> Gate | None:
        if measure is None:
            return None
        gain = improvement(measure, self.evidence.versus_base.get(measure, NOTHING))
        gate = self.better("better_than_base", measure, gain, margin)
        asked = self.texts("gate.margin", limit=self.texts.value(measure, margin)) if margin and gain.value is not None else ""
        return replace(gate, reason=f"{gate.reason} {asked}".strip())

    def not_worse(self, measure: str | None, margin: float) -> Gate | None:
        """The improvement over the champion has to be above minus the margin."""
        if measure is None or self.evidence.versus_champion is None:
            return None
        gain = improvement(measure, self.evidence.versus_champion.get(measure, NOTHING))
        return self.better("not_worse_than_champion", measure, gain, -margin)

    def keeps_details(self) -> Gate:
        """Fails where the whole interval of the difference to the base is below zero, however few of the conversations hold any
        (Tango's interval allows for few); else it passes with enough of them, and is not judged with fewer."""
        gain, few = self.evidence.versus_base.get("slots_kept", NOTHING), self.evidence.conversations < MIN_CONVERSATIONS
        if gain.high is None or few or (gain.high >= 0 and not gain.enough):
            return self._unjudged("keeps_details", "slots_kept", 0.0, "gate.nothing")
        return self._gate("keeps_details", "slots_kept", "failed" if gain.high < 0 else "passed", gain, 0.0)

    def guard(self, name: str, limit: float | None) -> Gate | None:
        """Null where it is switched off."""
        interval = self.evidence.tuned.get(name, NOTHING)
        if limit is None:
            return None
        if interval.value is None:
            return self._unjudged(name, name, limit, "gate.at_address" if self.evidence.at_address else "gate.nothing")
        sign = -1 if MEASURES[name].better == "lower" else 1
        return self._gate(name, name, self._side(interval, limit, sign, False), interval, limit)

    def canaries(self) -> Gate:
        """Cannot tell where one could not be asked; behind an address it is only asked whether it is said."""
        interval = self.evidence.tuned.get("canaries", NOTHING)
        outcome = self._side(interval, 0.0, -1, False)
        gate = self._gate("canaries", "canaries", outcome, interval, 0.0)
        if outcome == "cannot_tell":
            return replace(gate, reason=self.texts("gate.unasked"))
        return replace(gate, reason=self.texts("gate.only_said")) if outcome == "passed" and self.evidence.at_address else gate

    def checks(self, limit: float | None) -> Gate | None:
        """Cannot tell where cases without an answer could turn it; not judged where only a judge decides them."""
        interval = self.evidence.tuned.get("checks", NOTHING)
        if limit is None:
            return None
        if interval.low is None:
            return self._unjudged("checks", "checks", limit, "gate.nothing")
        outcome = self._side(interval, limit, 1, False)
        gate = self._gate("checks", "checks", outcome, interval, limit)
        if outcome != "cannot_tell" or interval.value is None:
            return gate
        ends = {"low": self.texts.value("checks", interval.low), "high": self.texts.value("checks", interval.high)}
        return replace(gate, reason=self.texts("gate.unanswered", **ends, limit=self.texts.value("checks", limit)))

    def _enough(self, interval: Interval) -> bool:
        return interval.enough and self.evidence.conversations >= MIN_CONVERSATIONS

    def _above(self, gain: Interval, limit: float) -> Outcome:
        if gain.low is None or gain.high is None or not self._enough(gain):
            return "cannot_tell"
        return "passed" if gain.low > limit else "failed" if gain.high <= limit else "cannot_tell"

    def _unjudged(self, name: str, measure: str, limit: float, why: str) -> Gate:
        return Gate(name, measure, "not_applicable", NOTHING, limit, self.texts(why, gate=self.texts(f"gate.{name}")))

    def _side(self, interval: Interval, limit: float, sign: int, needs_rows: bool) -> Outcome:
        if interval.low is None or interval.high is None or (needs_rows and not self._enough(interval)):
            return "cannot_tell"
        near, far = (interval.low, interval.high) if sign > 0 else (-interval.high, -interval.low)
        return "passed" if near >= sign * limit else "failed" if far < sign * limit else "cannot_tell"

    def _gate(self, name: str, measure: str, outcome: Outcome, interval: Interval, limit: float) -> Gate:
        of_rows = name not in NUMBERS
        needed = self._needed(interval, limit) if outcome == "cannot_tell" and of_rows else None
        reason = self.texts.gate(Finding(name, measure, outcome, interval, limit, self.evidence.rows, needed))
        return Gate(name, measure, outcome, interval, limit, reason, needed)

    def _needed(self, interval: Interval, limit: float) -> int | None:
        """About how many test rows would settle it; null where no test set of a usable size would."""
        count = max(self.evidence.conversations if interval.enough else interval.conversations or 0, 1)
        least = 0 if self._enough(interval) else -(-self.evidence.rows * MIN_CONVERSATIONS // count)
        clear = interval.value == 0 or (interval.low is not None and interval.low > limit)
        clear = clear or (interval.high is not None and interval.high < limit)
        if least and clear:  # only the number of conversations is wanting
            return least
        needed = rows_needed(interval, limit, self.evidence.rows) or 0
        return max(least, needed if needed <= MOST_ROWS else 0) or None
