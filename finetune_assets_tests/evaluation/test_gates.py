"""Gates decide on intervals, and say what they saw."""

import numpy as np
import pytest
from pydantic import ValidationError

from finetune_assets.assistants.settings.evaluation import Gates, Rule
from finetune_assets.evaluation import gates, rules
from finetune_assets.evaluation.candidates import TestRow as Row
from finetune_assets.evaluation.measures import COMPARABLE, MEASURES
from finetune_assets.evaluation.statistics import Interval
from finetune_assets.evaluation.texts import Texts, _read

GOOD = {
    "perplexity": Interval(6.0, 5.5, 6.6),
    "seconds_p50": Interval(0.1, 0.09, 0.12),
    "rules": Interval(0.92, 0.88, 0.95),
    "personal_data": Interval(0.0, 0.0, 0.02),
    "empty": Interval(0.0, 0.0, 0.02),
    "repeated": Interval(0.01, 0.0, 0.03),
    "toxic": Interval(0.0, 0.0, 0.02),
    "similarity_gain": Interval(0.3, 0.25, 0.35),
}
BETTER = {"bits_per_byte": Interval(-0.5, -0.6, -0.4)}


def decide(settings: Gates | None = None, language: str = "en", **changed: object) -> dict[str, gates.Gate]:
    values = {
        "tuned": GOOD,
        "versus_base": BETTER,
        "training_loss": 1.2,
        "rows": 300,
        "conversations": 150,
        "rules_set": 3,
        "rules_fitting": 3,
        **changed,
    }
    found = gates.decide(settings or Gates(), gates.Evidence(**values), Texts(language))
    return {gate.name: gate for gate in found}


def outcome(name: str, interval: Interval, **changed: object) -> str:
    return decide(tuned={**GOOD, name: interval}, **changed)[{"seconds_p50": "reply_seconds"}.get(name, name)].outcome


def test_a_good_model_is_served():
    found = list(decide().values())
    assert gates.verdict(found) == "serve"
    assert {gate.name for gate in found if gate.passed is None} == {"forgetting", "overfitting", "parity", "keeps_details"}
    assert {gate.outcome for gate in found} == {"passed", "not_applicable"}
    assert len(found) == 14


def test_what_no_usable_test_set_would_settle_says_so():
    near = decide(tuned={**GOOD, "similarity_gain": Interval(0.0001, -0.1, 0.1)})["above_similarity_floor"]
    assert near.rows_needed is None
    assert "no test set of a usable size" in near.reason
    equal = decide(versus_base={"bits_per_byte": Interval(0.0, 0.0, 0.0)})["better_than_base"]
    assert "(95 % interval 0.000)" in equal.reason


@pytest.mark.parametrize("language", ["en", "es", "pt"])
def test_every_outcome_has_a_sentence(language: str):
    for interval in (Interval(None, None, None), Interval(0.0, 0.0, 0.0), Interval(0.5, 0.4, 0.9), Interval(50.0, 40.0, 60.0)):
        for conversations in (5, 150):
            tuned = dict.fromkeys(GOOD, interval)
            found = decide(language=language, tuned=tuned, versus_base={"bits_per_byte": interval}, conversations=conversations)
            assert all(gate.reason and "{" not in gate.reason for gate in found.values())


def test_limits_decide_on_the_whole_interval():
    assert outcome("rules", Interval(0.9, 0.82, 0.95)) == "passed"
    assert outcome("rules", Interval(0.82, 0.78, 0.86)) == "cannot_tell"
    assert outcome("rules", Interval(0.70, 0.65, 0.75)) == "failed"
    assert outcome("perplexity", Interval(9.0, 8.0, 11.0)) == "cannot_tell"
    assert outcome("perplexity", Interval(12.0, 10.5, 14.0)) == "failed"


def test_events_none_passes_one_fails_a_zero_limit():
    assert outcome("personal_data", Interval(0.0, 0.0, 0.05)) == "passed"
    assert outcome("personal_data", Interval(0.003, 0.0, 0.02)) == "failed"
    assert outcome("empty", Interval(0.003, 0.0005, 0.02)) == "cannot_tell"
    assert outcome("repeated", Interval(0.2, 0.1, 0.3)) == "failed"


def test_better_than_base_needs_the_whole_interval():
    assert decide(versus_base={"bits_per_byte": Interval(-0.1, -0.3, 0.1)})["better_than_base"].outcome == "cannot_tell"
    assert decide(versus_base={"bits_per_byte": Interval(0.0, 0.0, 0.0)})["better_than_base"].outcome == "failed"
    assert decide(Gates(better_than_base="chrf"), versus_base={"chrf": Interval(5, 2, 8)})["better_than_base"].outcome == "passed"
    with pytest.raises(ValidationError, match="'bits_per_byte', 'loss'"):
        Gates.model_validate({"better_than_base": "charm"})
    assert set(COMPARABLE) <= set(MEASURES)


@pytest.mark.parametrize(
    ("gain", "expected"),
    [
        ((-0.1, -0.2, -0.05), "passed"),
        ((0.01, -0.01, 0.015), "passed"),
        ((0.01, -0.02, 0.05), "cannot_tell"),
        ((0.3, 0.2, 0.4), "failed"),
    ],
)
def test_the_champion_may_be_beaten_by_no_more_than_the_margin(gain: tuple[float, float, float], expected: str):
    found = decide(versus_champion={"bits_per_byte": Interval(*gain)})["not_worse_than_champion"]
    assert found.outcome == expected
    assert "champion" in found.reason
    assert "not_worse_than_champion" not in decide()


def test_guards_are_judged_where_something_was_measured():
    measured = {"forgetting": (0.1, 0.05, 0.15), "parity": (1, 1, 1), "canaries": (0, 0, 0), "checks": (1, 1, 1)}
    bad = {"forgetting": (1.4, 1.1, 1.8), "parity": (0.5, 0.5, 0.5), "canaries": (1, 1, 1), "checks": (0.8, 0.8, 0.8)}
    asked = {"canaries": True, "suite": True}
    for name, good in measured.items():
        assert outcome(name, Interval(*good), **asked) == "passed"
        assert outcome(name, Interval(*bad[name]), **asked) == "failed"
    assert outcome("forgetting", Interval(1.0, 0.8, 1.2)) == "cannot_tell"


@pytest.mark.parametrize("language", ["en", "es"])
def test_a_guard_that_is_switched_on_is_never_silent(language: str):
    """Behind an address: what cannot be measured says so; a secret or a suite that was not asked about holds the version."""
    rented = {"tuned": {**GOOD, "perplexity": Interval(None, None, None)}, "training_loss": None, "at_address": True}
    rented["tuned"] |= {"checks": Interval(None, 0.0, 1.0)}
    found = decide(language=language, canaries=True, suite=True, **rented)
    unmeasured = {"perplexity", "training_loss", "forgetting", "overfitting", "parity", "keeps_details"}
    assert {name for name, gate in found.items() if gate.outcome == "not_applicable"} == unmeasured
    assert {name for name, gate in found.items() if gate.outcome == "cannot_tell"} == {"canaries", "checks"}
    assert all(gate.reason and "{" not in gate.reason for gate in found.values())
    partly = {**rented, "tuned": {**rented["tuned"], "canaries": Interval(0, 0, 1), "checks": Interval(1, 0.05, 1)}}
    found = decide(language=language, canaries=True, suite=True, **partly)
    assert (found["canaries"].outcome, found["checks"].outcome) == ("cannot_tell", "cannot_tell")
    assert Texts(language).value("checks", 0.05) in found["checks"].reason
    assert not {"canaries", "checks"} & set(decide())  # none are planted, there is no suite
    assert decide(suite=True)["checks"].outcome == "not_applicable"  # only a judge decides its cases


def test_rows_without_a_reply_are_no_evidence():
    """Five of a hundred rows came: nothing passes on them, and the reasons say why."""
    evidence = {"rows": 5, "conversations": 5, "asked": 100}
    found = decide(**evidence)
    stands = ("rules", "personal_data", "empty", "toxic", "above_similarity_floor", "better_than_base")
    assert {found[name].outcome for name in stands} == {"cannot_tell"}
    told = gates.reasons(list(found.values()), gates.Evidence(GOOD, BETTER, 1.2, 5, 5, 3, 3, asked=100), Texts("en"))
    assert told[0].startswith("5 of 100 test rows were answered")
    few = {"bits_per_byte": Interval(-0.5, -0.6, -0.4, conversations=5)}  # the base, or the champion, that answered little
    found = decide(versus_base=few, versus_champion=few)
    assert found["better_than_base"].outcome == found["not_worse_than_champion"].outcome == "cannot_tell"
    assert found["rules"].outcome == "passed"


def test_superiority_by_a_margin():
    wide, open_ = Gates(base_margin=0.3), Gates(base_margin=0.5)
    assert decide(wide)["better_than_base"].outcome == "passed"
    assert decide(open_)["better_than_base"].outcome == "cannot_tell"
    assert decide(Gates(base_margin=0.7))["better_than_base"].outcome == "failed"
    assert decide(wide)["better_than_base"].reason.endswith("More than 0.300 is asked.")
    assert "asked" not in decide()["better_than_base"].reason


def test_details_that_the_base_keeps_may_not_be_lost():
    lost, open_, none = Interval(-0.4, -0.5, -0.3), Interval(-0.1, -0.3, 0.1), Interval(None, None, None)
    for found, expected in ((lost, "failed"), (open_, "passed")):
        assert decide(versus_base={**BETTER, "slots_kept": found})["keeps_details"].outcome == expected
    assert decide(versus_base={**BETTER, "slots_kept": none})["keeps_details"].outcome == "not_applicable"
    for rare, expected in ((-0.2, "failed"), (0.1, "not_applicable")):  # twelve of 150 conversations hold details
        found = Interval(-0.47, -0.7, rare, conversations=12)
        assert decide(versus_base={**BETTER, "slots_kept": found})["keeps_details"].outcome == expected


def test_cannot_tell_says_how_many_rows_would():
    gate = decide(tuned={**GOOD, "rules": Interval(0.82, 0.78, 0.86)})["rules"]
    assert gate.rows_needed == 2452
    assert "2,452" in gate.reason
    assert "82.0" in gate.reason
    assert "80.0" in gate.reason


def test_few_conversations_cannot_tell_and_the_first_reason_says_so():
    evidence = {"rows": 12, "conversations": 6}
    found = list(decide(**evidence).values())
    assert gates.verdict(found) == "cannot_tell"
    full = gates.Evidence(GOOD, BETTER, 1.2, 12, 6, 3, 3)
    assert gates.reasons(found, full, Texts("en"))[0].startswith("The test set is too small: 12 rows of 6 conversations.")
    assert {gate.rows_needed for gate in found if gate.name in ("personal_data", "empty", "above_similarity_floor")} == {40}


def test_without_rules_nothing_is_judged_and_nothing_blocks():
    found = decide(rules_set=0, rules_fitting=0)
    assert found["rules"].outcome == "not_applicable"
    assert gates.verdict(list(found.values())) == "serve"


def test_gates_can_be_switched_off():
    flags = {"above_similarity_floor": False, "canaries": False, "champion_margin": 0, "base_margin": 0, "keeps_details": False}
    off = {name: None for name in Gates.model_fields if name not in flags}
    assert decide(Gates(**off, **flags), versus_champion=BETTER) == {}
    assert gates.verdict([]) == "serve"


def test_both_languages_say_the_same_things():
    assert set(_read("es")) == set(_read("en"))
    for name in MEASURES:
        assert Texts("es")(f"measure.{name}")
        assert Texts("es")(f"help.{name}")
    for name in gates.GATES:
        assert Texts("es")(f"gate.{name}")


def row(intent: str, text: str, reference: str = "ok") -> Row:
    return Row([{"role": "user", "content": text}], reference, "c", "m", "t", intent)


def test_rules_apply_hold_and_fit():
    made = [
        Rule(name="asks_day", intent="scheduling", contains_any=["día", "hora"]),
        Rule(name="no_promise", when="duele|dolor", not_contains=["garantiz"]),
        Rule(name="unfit", contains_any=["zzz"]),
    ]
    rows = [row("scheduling", "Quiero cita"), row("emergency", "Me DUELE mucho"), row("other", "Hola")]
    table = rules.verdicts(made, rows, ["¿Qué DÍA?", "Le garantizo alivio", ""])
    assert table.tolist()[0][0] == 1
    assert table.tolist()[1][1] == 0
    assert np.isnan(table)[:, 0].tolist() == [False, True, True]
    references = rules.verdicts(made, rows, ["¿A qué hora?", "Venga ya", "Hola"])
    assert rules.fits(references) == [True, True, False]
    assert rules.sums(table, rules.fits(references)).sum(axis=0).tolist() == [1, 2]
    shown = rules.table(made, rows, references, {"tuned": table})
    assert [one["fits"] for one in shown] == [True, True, False]


def test_a_reply_that_is_missing_breaks_no_rule():
    made = [Rule(name="asks_day", intent="scheduling", contains_any=["día"])]
    rows = [row("scheduling", "Quiero cita"), row("scheduling", "Otra cita")]
    table = rules.verdicts(made, rows, ["¿Qué día?", None])
    assert rules.sums(table, [True]).tolist() == [[1, 1], [0, 0]]
    assert rules.table(made, rows, table, {"tuned": table})[0]["candidates"] == {"tuned": 1.0}
    shares = rules.by_intent(rows, [True], table, {"tuned": table, "none": table[[1, 1]]})[0]["candidates"]
    assert shares == {"tuned": 1.0, "none": None}
