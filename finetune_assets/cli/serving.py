"""`finetune serve`, `rollout`, `experiment`, `keys`, `simulate`, `retention`: from a version to its users, and what stays."""

from __future__ import annotations

import getpass
import json
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from finetune_assets.cli.retention import retention
from finetune_assets.environment import ROOT, Environment

if TYPE_CHECKING:
    from finetune_assets.assistants import Assistant
    from finetune_assets.assistants.settings.serving import RolloutSettings
    from finetune_assets.registry import Ledger
    from finetune_assets.serving.control import Move

ASSISTANT = click.argument("assistant")
REASON = click.option("--reason", required=True, help="Why; it stays in the history.")
WHO = click.option("--who", default=getpass.getuser, show_default="your user name", help="Who says so.")
JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextmanager
def _ledger() -> Generator[Ledger]:
    from sqlalchemy.exc import SQLAlchemyError

    from finetune_assets.errors import LedgerError
    from finetune_assets.registry import Ledger

    ledger = Ledger(Environment.read().database_url)
    try:
        yield ledger
    except SQLAlchemyError as error:
        why = str(error).splitlines()[0]
        raise LedgerError(f"Nothing was changed, since the ledger did not answer: {why}. Try again in a moment.") from None
    finally:
        ledger.close()


def _assistant(name: str) -> Assistant:
    from finetune_assets.assistants import load_assistant
    from finetune_assets.serving.models import tenants
    from finetune_assets.storage import Store

    environment = Environment.read()
    return load_assistant(environment.assistants, name, tenants(Store(environment.home)))


def _limits(name: str) -> RolloutSettings | None:
    """Null where the assistant's file cannot be read: the way back does not depend on it."""
    from finetune_assets.errors import FinetuneError

    try:
        return _assistant(name).rollout
    except FinetuneError:
        return None


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Another address needs an API key first.")
@click.option("--port", default=8000, show_default=True)
@click.option("--workers", default=1, show_default=True, type=click.IntRange(1, 64))
@click.option("--judge/--no-judge", default=True, show_default=True, help="Judge open rollouts here, not only in Dagster.")
@click.option("--simulation", is_flag=True, help="Clients may set the time of their requests (`finetune simulate`).")
def serve(host: str, port: int, workers: int, judge: bool, simulation: bool) -> None:
    """The router: chats, feedback, dashboard and metrics over HTTP. Ctrl-C or SIGTERM ends it in order."""
    from finetune_assets.serving.server import Server, Settings

    environment = Environment.read()
    if not reads_itself(environment):
        _say(
            "What people say here, and their corrections, reach no data set: FINETUNE_SOURCE does not name the router's database "
            "(FINETUNE_DATABASE_URL, default sqlite:///<FINETUNE_HOME>/ledger.db). Add it there, after a comma."
        )
    Server(environment, Settings(host, port, workers, judge, simulation), _say).run()


def reads_itself(environment: Environment) -> bool:
    """Whether the ledger's database is a source of the corpus too."""
    import sqlalchemy as sa

    def place(url: str) -> tuple[str, str | None, int | None, str | None]:
        at = sa.make_url(url)
        if at.get_backend_name() == "sqlite":
            return "sqlite", None, None, str((ROOT / (at.database or "")).resolve())
        return at.get_backend_name(), at.host, at.port or 5432, at.database

    mine = place(environment.database_url)
    return any(place(url.replace("postgres://", "postgresql://")) == mine for url in environment.sources if "://" in url)


@click.group()
def rollout() -> None:
    """A person's hand on the rollout: where it stands, on, stop, back."""


@rollout.command("status")
@click.argument("assistant", required=False)
@JSON
def rollout_status(assistant: str | None, as_json: bool) -> None:
    """Live version, candidate, step and guards of one assistant, or of all."""
    from finetune_assets.assistants import assistant_names
    from finetune_assets.serving.directory import Directory
    from finetune_assets.serving.judge import judge

    rows: list[dict[str, Any]] = []
    with _ledger() as ledger:
        directory = Directory(Environment.read(), ledger)
        known = sorted({*assistant_names(Environment.read().assistants), *(state.assistant for state in ledger.rollouts())})
        for name in [assistant] if assistant else known:
            state = ledger.rollout(name)
            judged = judge(ledger, state, _assistant(name).rollout) if state.is_open else None
            live = directory.rollout(name).champion or "base model"  # of a tenant's own assistant perhaps its vertical's
            rows.append({**vars(state), "live": live, "judged": judged.as_dict() if judged else None})
    if as_json:
        print(json.dumps({"rollouts": rows}, default=str))
        return
    for row in rows:
        live = row["live"]
        if not row["candidate"]:
            click.echo(f"{row['assistant']}: {live} serves everybody; no rollout (generation {row['generation']})")
            continue
        at = "shadow" if row["step"] == "shadow" else f"{row['step']} %"
        click.echo(f"{row['assistant']}: {row['candidate']} at {at}, {row['status'].replace('_', ' ')}; live: {live}")
        judged_row = row["judged"]
        head = f"{judged_row['outcome'].replace('_', ' ')}: {judged_row['requests']} requests, {judged_row['users']} people"
        click.echo(f"  {head}, {judged_row['hours']} hours with traffic in this step")
        for guard in judged_row["guards"]:
            click.echo(f"  {guard['name']:<18} {guard['outcome'].replace('_', ' '):<15} {guard['text']}")


def _told(move: Move) -> None:
    after = move.after
    share = f"{after.candidate} at {after.step}, {after.status.replace('_', ' ')}" if after.candidate else "no rollout"
    live = after.champion or "base model"
    click.echo(f"{after.assistant}: {move.event.replace('_', ' ')}; live: {live}; {share} (generation {after.generation})")


@rollout.command("start")
@ASSISTANT
@click.argument("version")
@REASON
@WHO
def rollout_start(assistant: str, version: str, reason: str, who: str) -> None:
    """Bring a version into shadow; the `rollout` asset does the same for a new one. Its stored verdict must be `serve`."""
    from finetune_assets.serving import control

    with _ledger() as ledger:
        _told(control.start(ledger, assistant, version, reason, who))


def _moved(assistant: str, move: Callable[[Ledger, Assistant], Move]) -> None:
    with _ledger() as ledger:
        _told(move(ledger, _assistant(assistant)))


@rollout.command("advance")
@ASSISTANT
@REASON
@WHO
def rollout_advance(assistant: str, reason: str, who: str) -> None:
    """Say yes to the next step: where an approval is asked, or guards are inconclusive. Never over a guard that failed."""
    from finetune_assets.serving import control

    _moved(assistant, lambda ledger, settings: control.advance(ledger, assistant, settings.rollout, reason, who))


@rollout.command("hold")
@ASSISTANT
@REASON
@WHO
@click.option("--release", is_flag=True, help="End the hold instead.")
def rollout_hold(assistant: str, reason: str, who: str, release: bool) -> None:
    """Keep the share where it is until somebody decides."""
    from finetune_assets.serving import control

    act = control.release if release else control.hold
    _moved(assistant, lambda ledger, _: act(ledger, assistant, reason, who))


@rollout.command("rollback")
@ASSISTANT
@REASON
@WHO
@click.option("--to", help="A version that has been champion, or `base`. Default: the one before.")
def rollout_rollback(assistant: str, reason: str, who: str, to: str | None) -> None:
    """Back at once: the candidate is taken from everybody; without a rollout, the champion before is back."""
    from finetune_assets.serving import control

    with _ledger() as ledger:
        _told(control.rollback(ledger, assistant, reason, who, to, settings=_limits(assistant)))


@rollout.command("history")
@ASSISTANT
@JSON
def rollout_history(assistant: str, as_json: bool) -> None:
    """Every change of an assistant's rollout, with who and why."""
    with _ledger() as ledger:
        events = ledger.events(assistant)
    if as_json:
        print(json.dumps({"events": events}, default=str))
        return
    for event in events:
        what = f"{event['event'].replace('_', ' '):<16} {event['version'] or '-':<16} {event['step'] or '-':<8}"
        click.echo(f"{event['created_at']:%Y-%m-%d %H:%M:%S} {what} {event['reason']} ({event['actor']})")


@click.group()
def experiment() -> None:
    """Two versions side by side for chosen tenants or users, in staging; nobody else sees them."""


@experiment.command("begin")
@ASSISTANT
@click.option("--a", "first", required=True, help="Version A, or `base`.")
@click.option("--b", "second", required=True, help="Version B, or `base`.")
@click.option("--share", default=0.5, show_default=True, help="Share of the people that get B.")
@click.option("--tenant", "tenant_ids", multiple=True, help="All users of this tenant; may be repeated.")
@click.option("--user", "user_ids", multiple=True, help="One user, as TENANT/USER; may be repeated.")
@click.option("--unproven", is_flag=True, help="Also a version whose verdict is not `serve`; the history keeps which.")
@REASON
@WHO
def experiment_begin(  # noqa: PLR0913, PLR0917
    assistant: str,
    first: str,
    second: str,
    share: float,
    tenant_ids: tuple[str, ...],
    user_ids: tuple[str, ...],
    unproven: bool,
    reason: str,
    who: str,
) -> None:
    """Begin one; one at a time of each assistant."""
    from finetune_assets.serving import experiments

    people = {"tenants": list(tenant_ids), "users": list(user_ids)}
    with _ledger() as ledger:
        experiments.begin(ledger, assistant, (first, second), share, people, (reason, who), unproven=unproven)
    click.echo(
        f"{assistant}: {first} (A) against {second} (B), {share:.0%} get B; result: /dashboard/{assistant}/experiment, or "
        f"finetune experiment result {assistant}"
    )


@experiment.command("result")
@ASSISTANT
@JSON
def experiment_result(assistant: str, as_json: bool) -> None:
    """What was observed so far, and what the guards say of B against A; the dashboard has it as a page."""
    from finetune_assets.serving import experiments

    with _ledger() as ledger:
        found = experiments.result(ledger, assistant, _assistant(assistant).rollout)
    if as_json:
        print(json.dumps({"experiment": found.as_dict() if found else None}))
        return
    if found is None:
        click.echo(f"{assistant} has no experiment; those that are over: finetune rollout history {assistant}")
        return
    for name, side in (("A", found.a), ("B", found.b)):
        negative = "" if side.negative is None else f", {side.negative:.1%} negative"
        said = f"{side.judged_by} gave feedback{negative}"
        click.echo(f"{name} {side.version}: {side.requests} requests, {side.users} people, {side.failed} failed, {said}")
    click.echo(found.text)
    for guard in found.judged.guards:
        click.echo(f"  {guard.name:<18} {guard.outcome.replace('_', ' '):<15} {guard.text}")


@experiment.command("end")
@ASSISTANT
@REASON
@WHO
def experiment_end(assistant: str, reason: str, who: str) -> None:
    """End it; its result stays in the history."""
    from finetune_assets.serving import experiments

    with _ledger() as ledger:
        found = experiments.end(ledger, assistant, _assistant(assistant).rollout, (reason, who))
    click.echo(f"{assistant}: the experiment is over. {found.text}")


@click.group()
def keys() -> None:
    """API keys of the router, one or more a tenant."""


@keys.command("add")
@click.option("--tenant", help="The tenant it speaks for; `*`: an administrator's (dashboard, metrics, every tenant).")
@click.option("--metrics", is_flag=True, help="Instead of a tenant: a key that reads /metrics and nothing else, for Prometheus.")
@click.option("--name", default="", help="Whose it is: who acts with it, in the dashboard's history and in the log.")
def keys_add(tenant: str | None, metrics: bool, name: str) -> None:
    """Make a key. It is shown once; only its hash is stored."""
    from finetune_assets.serving.directory import ADMIN, METRICS, Directory
    from finetune_assets.serving.keys import add

    if bool(tenant) is metrics:
        raise click.UsageError("Say whose: --tenant NAME, --tenant '*' for an administrator, or --metrics.")
    with _ledger() as ledger:
        if tenant not in (None, ADMIN) and Directory(Environment.read(), ledger).assistant_of(str(tenant)) is None:
            _say(f"No assistant answers for tenant {tenant} yet; until one does, whoever asks with this key gets 404.")
        print(add(ledger, tenant or METRICS, name))


@keys.command("list")
def keys_list() -> None:
    """Keys, by the first letters of their hash."""
    from finetune_assets.serving.keys import listed

    with _ledger() as ledger:
        for row in listed(ledger):
            state = f"revoked {row['revoked_at']:%Y-%m-%d}" if row["revoked_at"] else "valid"
            click.echo(f"{row['key_hash'][:12]}  {row['tenant_id']:<24} {row['name']:<24} {row['created_at']:%Y-%m-%d}  {state}")


@keys.command("revoke")
@click.argument("key_hash")
def keys_revoke(key_hash: str) -> None:
    """Take a key back, by the first letters of its hash; every worker knows it within a second."""
    from finetune_assets.serving.keys import revoke

    with _ledger() as ledger:
        click.echo(f"Revoked: {revoke(ledger, key_hash)}")


@click.command()
@click.option("--assistant", required=True)
@click.option("--url", default="http://127.0.0.1:8000", show_default=True, help="A router started with --simulation.")
@click.option("--users", default=6000, show_default=True, type=click.IntRange(1))
@click.option("--days", default=7.0, show_default=True, help="Simulated time that the traffic is spread over.")
@click.option("--concurrency", default=32, show_default=True, type=click.IntRange(1, 512))
@click.option("--feedback", "feedback_share", default=0.8, show_default=True, help="Share of the replies that are judged.")
@click.option("--bad", default=0.0, show_default=True, help="Share of the candidate's replies that fail, for the router to find.")
@click.option("--seed", default=0, show_default=True)
@JSON
def simulate(  # noqa: PLR0913, PLR0917
    assistant: str,
    url: str,
    users: int,
    days: float,
    concurrency: int,
    feedback_share: float,
    bad: float,
    seed: int,
    as_json: bool,
) -> None:
    """A simulated week of people who ask what people asked in the data, and judge the replies. Ends when the rollout does."""
    from finetune_assets.serving.simulate import Plan, simulate_week

    plan = Plan(assistant, url, users, days, concurrency, feedback_share, bad, seed)
    outcome = simulate_week(Environment.read(), plan, _say)
    if as_json:
        print(json.dumps(outcome, default=str))


COMMANDS: list[click.Command] = [serve, rollout, experiment, keys, simulate, retention]
