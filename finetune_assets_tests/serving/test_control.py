"""What follows from a judgement, by itself and by a person, on a real ledger."""

from __future__ import annotations

import datetime
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote_plus

import pytest
import sqlalchemy as sa
from click.testing import CliRunner

from finetune_assets.assistants.settings.serving import RolloutSettings
from finetune_assets.cli import main
from finetune_assets.environment import Environment
from finetune_assets.errors import RolloutRefused
from finetune_assets.registry.tables import rollout_events
from finetune_assets.registry.traffic import feedback, requests
from finetune_assets.serving import control, experiments, guards
from finetune_assets.serving.assignment import assign, keep, takes_part
from finetune_assets.serving.judge import judge
from finetune_assets.serving.observed import exposed, observe
from finetune_assets.serving.server import Server, Settings
from finetune_assets.serving.talks import Talk
from finetune_assets_tests.serving.shop import Shop

QUICK = RolloutSettings(min_requests=100, min_users=20, min_hours=1, steps=[10, 50, 100])


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    return Shop(tmp_path)


def traffic(  # noqa: PLR0917
    shop: Shop, arm: str, count: int, bad: float = 0.0, negative: float | None = None, seconds: float = 0.1, part: str = ""
) -> None:
    """Requests of one arm in the current step, each of its own user, spread over two hours; the bad ones evenly among them."""
    with shop.ledger() as book:
        state = book.rollout("aurora")
        start = datetime.datetime(2026, 11, 1)
        shadow = state.step == "shadow" and arm == "candidate"
        rows, said = list[dict[str, Any]](), list[dict[str, Any]]()
        for n in range(count):
            name = f"{state.salt}-{state.step}-{arm}{part}-{n}"
            at = start + datetime.timedelta(hours=2 * n / count)
            outcome = "error" if int((n + 1) * bad) > int(n * bad) else "ok"
            base = {"assistant": "aurora", "generation": state.generation, "step": state.step, "rollout": state.salt}
            row = {**base, "request_id": name, "user": name, "message_id": f"m-{name}", "conversation_id": name}
            row |= {"kind": "shadow" if shadow else "live", "assigned_arm": arm, "served_arm": arm, "kept": False}
            row |= {"version": "v", "outcome": outcome, "status": 200, "seconds": seconds, "created_at": at}
            rows.append(row)
            if negative is not None:
                kind = "negative" if int((n + 1) * negative) > int(n * negative) else "positive"
                said.append({"feedback_id": name, "message_id": f"m-{name}", "feedback_type": kind})
        with book.engine.begin() as connection:
            connection.execute(sa.insert(requests), rows)
            if said:
                connection.execute(sa.insert(feedback), said)


def step(shop: Shop, settings: RolloutSettings = QUICK) -> control.Move | None:
    with shop.ledger() as book:
        return control.step(book, "aurora", settings, "test")


def at(shop: Shop) -> tuple[str | None, str, str]:
    with shop.ledger() as book:
        state = book.rollout("aurora")
    return state.champion, state.step, state.status


def test_every_step_needs_its_own_proof(shop: Shop) -> None:
    version = shop.version("a")
    shop.roll_out(version)
    assert step(shop) is None  # nothing seen
    traffic(shop, "champion", 200)
    traffic(shop, "candidate", 200)
    assert step(shop).event == "advanced"  # type: ignore[union-attr]
    assert at(shop) == (None, "10", "running")
    traffic(shop, "champion", 270)
    traffic(shop, "candidate", 30)
    assert step(shop) is None  # too few, and nobody has said anything: time alone never advances
    traffic(shop, "champion", 1800, negative=0.25, part="more")
    traffic(shop, "candidate", 200, negative=0.15, part="more")
    assert step(shop).event == "advanced"  # type: ignore[union-attr]
    traffic(shop, "champion", 400, negative=0.25)
    traffic(shop, "candidate", 400, negative=0.15)
    assert step(shop).event == "promoted"  # type: ignore[union-attr]
    assert at(shop) == (version, "idle", "idle")
    with shop.ledger() as book:
        events = book.events("aurora")
        assert [event["event"] for event in events] == ["verdict", "started", "advanced", "advanced", "promoted"]
        assert {guard["name"] for guard in events[-1]["evidence"]["guards"]} >= {
            "errors",
            "latency",
            "negative_feedback",
            "assignment",
        }
        assert control.offer(book, "aurora", version, "again", "test") == "unchanged"


@pytest.mark.parametrize(
    ("candidate", "why"),
    [
        ({"bad": 0.2}, "requests failed: too many errors"),
        ({"negative": 0.7}, "negative feedback per user"),
        ({"seconds": 2.0}, "95 % of replies"),
    ],
)
def test_a_bad_candidate_goes_back_by_itself_and_does_not_return_by_itself(
    shop: Shop, candidate: dict[str, Any], why: str
) -> None:
    version = shop.version("a")
    shop.roll_out(version, "50")
    traffic(shop, "champion", 300, **{"negative": 0.2})
    traffic(shop, "candidate", 300, **{"negative": 0.2, **candidate})
    move = step(shop)
    assert move is not None
    assert (move.event, at(shop)) == ("rolled_back", (None, "idle", "idle"))
    assert why in move.reason
    with shop.ledger() as book:
        assert "rolled back or replaced before" in control.offer(book, "aurora", version, "again", "test")
        assert control.offer_waiting(book, "aurora", "test") is None
        assert control.start(book, "aurora", version, "a person has looked at it", "ana").after.step == "shadow"


def test_what_no_model_takes_is_no_failure(shop: Shop) -> None:
    """A third of the candidate's requests: as errors they would take it back."""
    shop.roll_out(shop.version("a"), "50")
    traffic(shop, "champion", 300)
    traffic(shop, "candidate", 300, bad=0.3)
    with shop.ledger() as book:
        with book.engine.begin() as connection:
            connection.execute(sa.update(requests).where(requests.c.outcome == "error").values(outcome="refused", status=400))
        judged = judge(book, book.rollout("aurora"), QUICK)
    assert judged.requests == 210
    assert next(guard for guard in judged.guards if guard.name == "errors").outcome != "failed"
    assert step(shop) is None


def test_failing_like_the_champion_says_nothing_of_the_candidate(shop: Shop) -> None:
    shop.roll_out(shop.version("a"), "50")
    traffic(shop, "champion", 300, bad=0.5, negative=0.2)
    traffic(shop, "candidate", 300, bad=0.5, negative=0.2)
    assert step(shop) is None
    held = step(shop, QUICK.model_copy(update={"ask_after_hours": 1.0}))
    assert held is not None
    assert (held.event, held.judgement and held.judgement.outcome) == ("held", "not_measurable")


@pytest.mark.parametrize("step_", ["shadow", "10", "50"])
def test_failing_far_more_than_a_champion_that_fails_too_is_failing(shop: Shop, step_: str) -> None:
    shop.roll_out(shop.version("a"), step_)
    traffic(shop, "champion", 1800, bad=0.06)
    traffic(shop, "candidate", 200, bad=0.6)
    move = step(shop)
    assert move is not None
    assert (move.event, at(shop)) == ("rolled_back", (None, "idle", "idle"))
    assert "the champion fails too, but certainly less often" in move.reason


def test_inconclusive_asks_a_person_and_never_goes_on_by_itself(shop: Shop) -> None:
    shop.roll_out(shop.version("a"), "50")
    traffic(shop, "champion", 120, negative=0.2)
    traffic(shop, "candidate", 120, negative=0.25)
    assert step(shop) is None
    patient = QUICK.model_copy(update={"ask_after_hours": 1.0})
    held = step(shop, patient)
    assert held is not None
    assert (held.event, held.judgement and held.judgement.outcome) == ("held", "inconclusive")
    assert step(shop, patient) is None
    with shop.ledger() as book:
        with pytest.raises(RolloutRefused, match="Say why"):
            control.advance(book, "aurora", QUICK, "  ", "ana")
        assert control.advance(book, "aurora", QUICK, "enough for us", "ana").event == "promoted"
        last = book.events("aurora")[-1]
    assert (last["actor"], last["reason"], last["evidence"]["outcome"]) == ("ana", "enough for us", "inconclusive")


def set_times(shop: Shop, arm: str, hours: list[float]) -> None:
    """When the arm's requests of the current step came: the first at hours[0] after noon, …; the others all at noon."""
    noon = datetime.datetime(2026, 11, 1, 12)
    with shop.ledger() as book, book.engine.begin() as connection:
        state = book.rollout("aurora")
        mine = (requests.c.step == state.step) & (requests.c.assigned_arm == arm)
        names = connection.execute(sa.select(requests.c.request_id).where(mine).order_by(requests.c.request_id)).scalars().all()
        connection.execute(sa.update(requests).where(mine).values(created_at=noon))
        for name, after in zip(names, hours, strict=False):
            at = noon + datetime.timedelta(hours=after)
            connection.execute(sa.update(requests).where(requests.c.request_id == name).values(created_at=at))


@pytest.mark.parametrize("jumps", [[24 * 365], [-24 * 365], [90, -90, 400], [0.5]])
def test_a_clock_that_is_set_takes_no_step(shop: Shop, jumps: list[float]) -> None:
    """Everything came within one hour; a few rows say days before or after. They are hours with traffic, no more."""
    day = QUICK.model_copy(update={"min_hours": 6})
    shop.roll_out(shop.version("a"), "50")
    traffic(shop, "champion", 400, negative=0.25)
    traffic(shop, "candidate", 400, negative=0.15)
    set_times(shop, "candidate", jumps)
    assert step(shop, day) is None
    with shop.ledger() as book:
        judged = judge(book, book.rollout("aurora"), day)
    assert (judged.outcome, judged.patience_over) == ("gathering", False)
    assert f"{1 + len(jumps) - (jumps == [0.5])} of 6 hours with traffic" in judged.text
    set_times(shop, "candidate", [*jumps, *range(1, 6)])
    assert step(shop, day).event == "promoted"  # type: ignore[union-attr]


def test_patience_begins_with_the_step_and_again_when_a_person_releases_it(shop: Shop) -> None:
    """Not with the first request: a step without any traffic asks too. What the clock of the rows says decides nothing."""
    shop.roll_out(shop.version("a"), "50")

    def began(hours_ago: float) -> None:
        at = datetime.datetime.now(datetime.UTC).replace(tzinfo=None) - datetime.timedelta(hours=hours_ago)
        with shop.ledger() as book, book.engine.begin() as connection:
            newest = sa.select(sa.func.max(rollout_events.c.id)).scalar_subquery()
            connection.execute(sa.update(rollout_events).where(rollout_events.c.id == newest).values(created_at=at))

    began(167)
    traffic(shop, "champion", 20)
    set_times(shop, "champion", [24.0 * 400])
    assert step(shop) is None
    began(169)
    assert step(shop).event == "held"  # type: ignore[union-attr]
    with shop.ledger() as book:
        control.release(book, "aurora", "let it gather", "ana")
    assert step(shop) is None
    began(169)
    assert step(shop).event == "held"  # type: ignore[union-attr]
    with shop.ledger() as book:
        control.release(book, "aurora", "let it gather", "ana")
    began(-24 * 365)  # the ledger's clock was set back since: hours with requests count on
    traffic(shop, "candidate", 30, part="late")
    set_times(shop, "candidate", [float(hour) for hour in range(30)])
    assert step(shop) is None
    assert step(shop, QUICK.model_copy(update={"ask_after_hours": 30.0})).event == "held"  # type: ignore[union-attr]


def test_a_person_says_yes_where_it_is_asked_for(shop: Shop) -> None:
    asked = QUICK.model_copy(update={"approval": "every"})
    shop.roll_out(shop.version("a"))
    traffic(shop, "champion", 200)
    traffic(shop, "candidate", 200)
    assert step(shop, asked).event == "asked"  # type: ignore[union-attr]
    assert step(shop, asked) is None
    assert at(shop) == (None, "shadow", "awaiting_approval")
    with shop.ledger() as book:
        assert control.advance(book, "aurora", asked, "fine", "ana").after.step == "10"


def test_the_offline_verdict_is_read_at_each_step(shop: Shop) -> None:
    first, second = shop.two_versions("50")
    for arm in ("champion", "candidate"):
        traffic(shop, arm, 400, negative=0.2)
    with shop.ledger() as book:
        book.register("aurora", second, "do_not_serve", ["benchmarked again"], "report.html")
        with pytest.raises(RolloutRefused, match="is do_not_serve, not serve"):
            control.advance(book, "aurora", QUICK, "all guards are fine", "ana")
    move = step(shop)
    assert move is not None
    assert (move.event, at(shop)) == ("rolled_back", (first, "idle", "idle"))
    assert "no longer serve but do_not_serve" in move.reason


def test_the_way_back_reads_the_verdict_too(shop: Shop) -> None:
    first, _ = shop.two_versions("done")
    with shop.ledger() as book:
        book.register("aurora", first, "cannot_tell", ["benchmarked again"], "report.html")
        for to in (None, first):
            with pytest.raises(RolloutRefused, match="is cannot_tell, not serve"):
                control.rollback(book, "aurora", "complaints", "ana", to)
        assert control.rollback(book, "aurora", "complaints", "ana", "base").after.champion is None


def test_a_person_does_not_go_over_a_guard_that_failed(shop: Shop) -> None:
    shop.roll_out(shop.version("a"), "50")
    traffic(shop, "candidate", 300, bad=0.3)
    with shop.ledger() as book, pytest.raises(RolloutRefused, match="failed"):
        control.advance(book, "aurora", QUICK, "never mind", "ana")


def test_two_people_press_rollback_at_once(shop: Shop) -> None:
    first, second = shop.version("a"), shop.version("b")
    shop.roll_out(first, "done")
    shop.roll_out(second, "50")
    said: list[str] = []

    def press(who: str) -> None:
        with shop.ledger() as book:
            try:
                said.append(control.rollback(book, "aurora", "it is bad", who).event)
            except RolloutRefused as refused:
                said.append(str(refused))

    people = [threading.Thread(target=press, args=(who,)) for who in ("ana", "bob", "eva", "leo")]
    for one in people:
        one.start()
    for one in people:
        one.join()
    press("max")  # the slowest of them: nothing is rolled out any more
    assert said.count("rolled_back") == 1
    assert sum("was rolled back a moment ago by" in text for text in said) == 4
    with shop.ledger() as book:
        state = book.rollout("aurora")
        assert (state.champion, state.candidate) == (first, None)
        assert control.rollback(book, "aurora", "that one too", "ana", to="base").after.champion is None


def test_a_button_pressed_on_an_old_page_does_nothing(shop: Shop) -> None:
    """Two people advance, or one rolls back what another has: who looked at an earlier state is told what happened since."""
    first, second = shop.version("a"), shop.version("b")
    shop.roll_out(first, "done")
    shop.roll_out(second)
    with shop.ledger() as book:
        seen = book.rollout("aurora").generation
        assert control.advance(book, "aurora", QUICK, "fine", "ana", seen).after.step == "10"
        for again in (
            lambda: control.advance(book, "aurora", QUICK, "fine", "bob", seen),
            lambda: control.hold(book, "aurora", "wait", "bob", seen),
            lambda: control.release(book, "aurora", "go", "bob", seen),
        ):
            with pytest.raises(RolloutRefused, match="moved since you looked: advanced by ana: fine"):
                again()
        control.rollback(book, "aurora", "complaints", "bob", seen=seen)  # the way back is open from every page of this rollout
        with pytest.raises(RolloutRefused, match="rolled back a moment ago by bob"):
            control.rollback(book, "aurora", "complaints", "eva", seen=seen)
        control.start(book, "aurora", second, "try again", "ana")
        with pytest.raises(RolloutRefused, match="rolled back a moment ago by bob"):
            control.rollback(book, "aurora", "complaints", "eva", seen=seen)
        newest = control.rollback(book, "aurora", "complaints", "eva", seen=book.rollout("aurora").generation).after
        assert newest.champion == first
        assert control.rollback(book, "aurora", "that one too", "eva", seen=newest.generation).after.champion is None


def test_nobody_goes_back_to_a_version_whose_files_are_gone(shop: Shop) -> None:
    first, second = shop.version("a"), shop.version("b")
    shop.roll_out(first, "done")
    shop.roll_out(second, "done")
    models = shop.home / "models" / "aurora"
    (models / second).mkdir(parents=True)  # the store is here, the first one's folder was removed
    with shop.ledger() as book:
        for to in (None, first):
            with pytest.raises(RolloutRefused, match="files of v1-aaaaaaaa are gone"):
                control.rollback(book, "aurora", "complaints", "ana", to)
        (models / first).mkdir()
        assert control.rollback(book, "aurora", "complaints", "ana").after.champion == first
        (models / second).rmdir()
        assert control.rollback(book, "aurora", "all of them", "ana", "base").after.champion is None


def test_no_way_back_leads_to_a_version_that_never_served(shop: Shop) -> None:
    first, second, third = shop.version("a"), shop.version("b"), shop.version("c")
    shop.roll_out(first, "done")
    shop.roll_out(second, "10")
    with shop.ledger() as book:
        control.rollback(book, "aurora", "too many errors", "guards")
        for never in (second, third):  # taken back a moment ago; never rolled out
            with pytest.raises(RolloutRefused, match="never served everybody"):
                control.rollback(book, "aurora", "try it", "ana", to=never)
        assert book.rollout("aurora").champion == first


def test_the_next_version_waits_while_users_see_a_candidate(shop: Shop) -> None:
    first = shop.version("a")
    shop.roll_out(first, "50")
    second = shop.version("b")
    with shop.ledger() as book:
        assert "waits for the end" in control.offer(book, "aurora", second, "new", "test")
        assert control.offer_waiting(book, "aurora", "test") is None
        control.rollback(book, "aurora", "bad", "ana")
        assert "in shadow" in (control.offer_waiting(book, "aurora", "test") or "")
        assert book.rollout("aurora").candidate == second


def test_what_a_person_holds_in_shadow_is_replaced_by_a_person_alone(shop: Shop) -> None:
    first, second = shop.version("a"), shop.version("b")
    shop.roll_out(first)
    with shop.ledger() as book:
        control.hold(book, "aurora", "the clinic is closed", "ana")
        assert "held in shadow by a person" in control.offer(book, "aurora", second, "new", "test")
        state = book.rollout("aurora")
        assert (state.candidate, state.status) == (first, "held")
        assert control.start(book, "aurora", second, "take the new one", "ana").after.candidate == second


def test_a_champion_that_was_left_does_not_return_by_itself(shop: Shop) -> None:
    first, second = shop.two_versions("done")
    shop.roll_out(shop.version("c"), "10")
    with shop.ledger() as book:
        assert control.rollback(book, "aurora", "both are bad", "ana", to=first).after.champion == first
        assert control.offer_waiting(book, "aurora", "test") is None
        assert "replaced before" in control.offer(book, "aurora", second, "again", "test")
        seen = book.rollout("aurora").generation
        assert control.rollback(book, "aurora", "that one too", "ana", seen=seen).after.champion is None
        assert control.offer_waiting(book, "aurora", "test") is None
        assert control.start(book, "aurora", second, "looked at", "ana").after.candidate == second


def test_conversations_under_way_at_a_step_are_no_wrong_split(shop: Shop) -> None:
    """1,200 people are talking when 10 % become 50 %, and go on for three turns; one in three begins another conversation too."""
    shop.roll_out(shop.version("a"), "10")
    with shop.ledger() as book:
        before = book.rollout("aurora")
    shop.advance()
    with shop.ledger() as book:
        after = book.rollout("aurora")
    row: dict[str, Any] = {"assistant": "aurora", "rollout": after.salt, "generation": after.generation, "step": after.step}
    row |= {"kind": "live", "version": "v", "outcome": "ok", "status": 200, "tenant_id": "t", "seconds": 0.1}
    rows: list[dict[str, Any]] = []

    def say(user: str, arm: str, kept: bool) -> None:
        at = datetime.datetime(2026, 11, 1) + datetime.timedelta(seconds=len(rows))
        more = {"request_id": f"r{len(rows)}", "user": user, "created_at": at, "kept": kept}
        rows.append({**row, **more, "assigned_arm": arm, "served_arm": arm})

    changed = dict.fromkeys(("champion", "candidate"), 0)
    for n in range(1200):
        user = f"u{n}"
        now, then = assign(after, "t", user), assign(before, "t", user)
        talk = Talk(user, "t", user, then.name, before.salt, before.step, False, datetime.datetime.now(datetime.UTC))
        changed[now.name] += now.name == then.name
        for _ in range(3):
            arm, kept = keep(after, now, talk)
            assert (arm.name, kept) == (then.name, True)
            talk = replace(talk, arm=arm.name, step=after.step, kept=kept)
            say(user, arm.name, kept)
        if n % 3 == 0:
            say(user, now.name, False)
    with shop.ledger() as book:
        with book.engine.begin() as connection:
            connection.execute(sa.insert(requests), rows)
        judged = judge(book, after, QUICK)
    split = next(guard for guard in judged.guards if guard.name == "assignment")
    assert split.outcome == "passed"
    assert split.seen > 300
    assert guards.assignment(changed["candidate"], changed["champion"], 0.5).outcome == "not_measurable"  # who kept an arm


def test_two_tenants_users_of_one_name_are_two_people(shop: Shop) -> None:
    first, second = shop.two_versions("50")
    for tenant in ("clinica_aurora", "clinica_sol"):
        traffic(shop, "candidate", 30, negative=0.5, part=tenant)
    with shop.ledger() as book:
        with book.engine.begin() as connection:
            for tenant in ("clinica_aurora", "clinica_sol"):
                its = requests.c.request_id.contains(tenant)
                connection.execute(
                    sa.update(requests)
                    .where(its)
                    .values(
                        tenant_id=tenant, user=sa.func.substr(requests.c.request_id, sa.func.length(requests.c.request_id) - 1)
                    )
                )
        state = book.rollout("aurora")
        seen = observe(book, state).candidate
        assert (seen.users, len(seen.negative), exposed(book, "aurora", state.salt or "")) == (60, 60, 60)
        with pytest.raises(RolloutRefused, match="TENANT/USER: ana may be somebody else"):
            experiments.begin(book, "aurora", (first, second), 0.5, {"tenants": [], "users": ["sol/eva", "ana"]}, ("try", "ana"))
    chosen = {"tenants": ["staging"], "users": ["clinica_sol/ana"]}
    asked = [("clinica_sol", "ana"), ("clinica_aurora", "ana"), ("staging", "eva")]
    assert [takes_part(chosen, *one) for one in asked] == [True, False, True]
    older = {"tenants": [], "users": ["ana", "x/eva"]}  # began when users were named without their tenants
    assert [takes_part(older, *one) for one in [("sol", "ana"), ("sol", "eva"), ("sol", "x/eva")]] == [True, False, False]


def test_errors_are_judged_when_nothing_before_them_is_under_way(shop: Shop) -> None:
    """Six errors at once, while good replies take ten seconds: it is known how many that is when those asked with them are in."""
    shop.roll_out(shop.version("a"), "50")
    traffic(shop, "champion", 50, seconds=10.0)
    traffic(shop, "candidate", 6, bad=1.0, seconds=0.01)
    now = datetime.datetime.now(datetime.UTC).replace(tzinfo=None)
    mine = (requests.c.assigned_arm == "candidate") & (requests.c.outcome == "error")

    def errors(seconds_ago: float) -> str:
        with shop.ledger() as book:
            with book.engine.begin() as connection:
                at = now - datetime.timedelta(seconds=seconds_ago)
                connection.execute(sa.update(requests).where(mine).values(created_at=at))
                connection.execute(sa.update(requests).where(~mine).values(created_at=now - datetime.timedelta(seconds=2)))
            judged = judge(book, book.rollout("aurora"), QUICK)
        return next(guard.outcome for guard in judged.guards if guard.name == "errors")

    assert [errors(12.1), errors(59), errors(61)] == ["gathering", "gathering", "failed"]  # it never answered well
    traffic(shop, "candidate", 1, seconds=10.0, part="good")
    assert [errors(3), errors(11.9), errors(12.1)] == ["gathering", "gathering", "failed"]


def test_both_arms_are_judged_over_the_same_time_while_requests_are_under_way(shop: Shop) -> None:
    """Both fail for the first two minutes of twenty, and good replies take 40 s: the champion's last FIRST began later."""
    shop.roll_out(shop.version("a"), "50")
    newest = datetime.datetime.now(datetime.UTC).replace(tzinfo=None) + datetime.timedelta(minutes=2)  # however slow the test is
    with shop.ledger() as book:
        state = book.rollout("aurora")
        base = {"assistant": "aurora", "rollout": state.salt, "generation": state.generation, "tenant_id": "t", "user": "u"}
        base |= {
            "step": state.step,
            "kind": "live",
            "kept": False,
            "version": "v",
            "status": 200,
            "outcome": "ok",
            "seconds": 40.0,
        }
        rows = list[dict[str, Any]]()
        for arm, each in (("candidate", 2), ("champion", 6)):
            for n in range(1200 * each):
                outcome = "error" if n < 120 * each else "ok"
                at = newest - datetime.timedelta(seconds=1200 - (n + 1) / each)
                one = {"request_id": f"{arm}-{n:05}", "assigned_arm": arm, "served_arm": arm}
                rows.append({**base, **one, "created_at": at, "outcome": outcome})
        shadow = {"request_id": "shadow", "assigned_arm": "candidate", "served_arm": "candidate", "created_at": newest}
        rows.append({**base, **shadow, "step": "shadow", "kind": "shadow", "seconds": 300.0})  # keeps nobody waiting
        with book.engine.begin() as connection:
            connection.execute(sa.insert(requests), rows)
        seen = observe(book, state)
        mine, theirs = seen.candidate, seen.champion
        assert (len(mine.last), len(theirs.last), sum(mine.last), sum(theirs.last)) == (1160 * 2, guards.FIRST, 240, 0)
        assert sum(theirs.first) == 720
        assert not guards.worse(mine.last, theirs.last, 0.25)
        assert guards.worse(mine.last, theirs.last[1:], 0.25)  # of different times
        with book.engine.begin() as connection:  # more than FIRST come while one is answered
            slow = requests.c.request_id == "champion-07199"
            connection.execute(sa.update(requests).where(slow).values(seconds=1000.0))
        assert len(observe(book, state).champion.last) == 200 * 6


def test_an_experiment_is_for_chosen_people_and_promotes_nothing(shop: Shop) -> None:
    first, second = shop.version("a"), shop.version("b")
    shop.roll_out(first, "done")
    with shop.ledger() as book:
        with pytest.raises(RolloutRefused, match="Name the tenants"):
            experiments.begin(book, "aurora", (first, second), 0.5, {"tenants": [], "users": []}, ("try", "ana"))
        experiments.begin(book, "aurora", (first, second), 0.5, {"tenants": ["staging"], "users": []}, ("try", "ana"))
        with pytest.raises(RolloutRefused, match="already"):
            experiments.begin(book, "aurora", (first, second), 0.5, {"tenants": ["staging"], "users": []}, ("try", "ana"))
        found = experiments.result(book, "aurora", QUICK)
        assert found is not None
        assert (found.a.version, found.b.version, found.b.requests) == (first, second, 0)
        server = Server(Environment.read(shop.environment), Settings(port=0), print)
        assert server.asked_for("aurora") == {first, second}  # what the engine loads before anybody asks
        server.close()
        experiments.end(book, "aurora", QUICK, ("done", "ana"))
        assert experiments.result(book, "aurora", QUICK) is None
        assert book.rollout("aurora").champion == first


def test_an_experiment_takes_proven_versions_and_ends_when_one_is_rolled_back(shop: Shop) -> None:
    first, second = shop.two_versions("10")
    bad = shop.version("c", verdict="do_not_serve")
    people = {"tenants": ["staging"], "users": []}
    with shop.ledger() as book:
        with pytest.raises(RolloutRefused, match=f"{bad}: do_not_serve"):
            experiments.begin(book, "aurora", (first, bad), 0.5, people, ("try", "ana"))
        experiments.begin(book, "aurora", (first, bad), 0.5, people, ("try", "ana"), unproven=True)
        assert book.events("aurora")[-1]["evidence"] == {"unproven": {bad: "do_not_serve"}}
        control.rollback(book, "aurora", "complaints", "ana")
        assert experiments.current(book, "aurora") is not None  # neither of its versions
        experiments.end(book, "aurora", QUICK, ("done", "ana"))
        experiments.begin(book, "aurora", ("base", first), 0.5, people, ("try", "ana"))
        control.rollback(book, "aurora", "complaints", "ana", to="base")
        assert experiments.current(book, "aurora") is None
        ended, back = book.events("aurora")[-2:]
        assert (ended["event"], ended["version"], ended["reason"]) == ("experiment_ended", first, f"{first} was rolled back")
        assert (ended["evidence"]["a"]["version"], ended["evidence"]["b"]["version"]) == ("base", first)
        assert ended["evidence"]["said"].startswith("Not settled yet")
        assert back["event"] == "rolled_back"
        control.start(book, "aurora", second, "again", "ana")
        experiments.begin(book, "aurora", (first, second), 0.5, people, ("try", "ana"))
        control.rollback(book, "aurora", "complaints", "ana", seen=book.rollout("aurora").generation)
        assert experiments.current(book, "aurora") is None


def test_a_ledger_that_cannot_be_written_is_told_and_nothing_is_changed(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the page and on the command line: a sentence, not an error 500 and not a traceback."""
    shop.roll_out(shop.version("a"))
    with shop.served("--no-judge") as served, shop.ledger() as book:
        with book.engine.begin() as connection:  # the events are written in the same transaction as the state
            connection.execute(sa.text("ALTER TABLE rollout_events RENAME TO hidden"))
        answer = served.client.post("/dashboard/aurora/hold", data={"who": "ana", "reason": "wait"})
        assert answer.status_code == 303
        assert "nothing was changed, since the ledger cannot be written" in unquote_plus(answer.headers["location"])
        for name, value in shop.environment.items():
            monkeypatch.setenv(name, value)
        refused = CliRunner().invoke(main, ["rollout", "hold", "aurora", "--reason", "wait"])
        assert refused.exit_code == 1
        assert "Nothing was changed, since the ledger did not answer" in refused.output
        assert book.rollout("aurora").status == "running"
