"""`finetune erase` and `finetune explain`: forgetting a person, and what became of a message."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import click

from finetune_assets.cli.console import quiet
from finetune_assets.environment import Environment
from finetune_assets.errors import DataError, SettingsError, SourceError

if TYPE_CHECKING:
    import dagster as dg
    from rich.console import Console

    from finetune_assets.erasure import Plan

LIMIT = 50
"""Conversations that one erasure may remove without a word: an id that thousands share ("web") is hardly one person."""


@click.command()
@click.option("--user", help="The user's id as the source has it, or the pseudonym u_… of the store.")
@click.option("--conversation", help="A conversation's id, as the source, the store or the router's client has it.")
@click.option("--requests", is_flag=True, help="Everyone whom the source's table erasure_requests names, and who waits.")
@click.option("--dry-run", is_flag=True, help="Show what would be destroyed, and end.")
@click.option("--limit", default=LIMIT, show_default=True, help="Refuse to erase more conversations than this.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout; needs --yes or --dry-run.")
def erase(  # noqa: PLR0913, PLR0917
    user: str | None, conversation: str | None, requests: bool, dry_run: bool, limit: int, yes: bool, as_json: bool
) -> None:
    """Remove a person's data for good: from the store, every data set, and every later build.

    Corpus rows, staged and frozen data sets, reports, caches and Dagster's sample tables lose the rows; a data set is rewritten
    under a new fingerprint and leaves a tombstone. The source may still hold them: they are never read again. Models cannot
    unlearn: those trained on the rows are named and marked, and their retrain is requested.

    Without --user, --conversation and --requests: lists the erasures so far, who waits, and whose retrain is due.
    """
    given = [user is not None, conversation is not None, requests]
    listed = not any(given)
    if sum(given) > 1:
        raise SettingsError("Give one of --user, --conversation and --requests; a user's erasure takes all their conversations.")
    if as_json and not (yes or dry_run or listed):
        raise SettingsError("--json cannot ask; add --yes to erase, or --dry-run to see what would be erased.")
    environment = Environment.read()
    with quiet(environment.home) as (terminal, output):
        from rich.console import Console

        console = Console(file=terminal, highlight=False, soft_wrap=True)
        outcome = _list(console) if listed else _erase(console, (user, conversation), dry_run, limit, yes)
        left = outcome.get("refused", [])
        if as_json:
            print(json.dumps(outcome), file=output)
    if left:
        sys.exit(1)


def _list(console: Console) -> dict[str, Any]:
    from finetune_assets.registry import erasures
    from finetune_assets.resources import LedgerResource

    with LedgerResource().open() as ledger:
        known = [erasures.summary(one) for one in erasures.all_erasures(ledger)]
        rewritten = [vars(one) | {"erased_at": one.erased_at.isoformat()} for one in erasures.rewritten(ledger)]
        versions = [{"assistant": v.assistant, "version": v.version} for v in erasures.marked_versions(ledger)]
        due = sorted({one["assistant"] for one in rewritten if erasures.retrain_due(ledger, one["assistant"])})
    for one in known:
        state = f"done {one['completed_at'][:16]}" if one["completed_at"] else "[red]begun, not finished: start it again[/]"
        if one["waits"]:
            state = "[yellow]asked for in the source, left out of builds; what is stored waits for: finetune erase --requests[/]"
        console.print(f"{one['subject']}  {state}  " + ", ".join(f"{n} {name}" for name, n in one["removed"].items()))
    for one in versions:
        console.print(f"{one['version']} of {one['assistant']} was trained on rows that were erased since")
    console.print(f"Retrain due: {', '.join(due) or 'none'}" if known else "Nobody was erased so far.")
    return {"erasures": known, "datasets": rewritten, "versions": versions, "retrain_due": due}


def _erase(console: Console, who: tuple[str | None, str | None], dry_run: bool, limit: int, yes: bool) -> dict[str, Any]:
    """One subject's outcome; for the requests of the source (`who` is nobody) `erased` and `refused`, a list each."""
    import dagster as dg

    from finetune_assets.automation.local_run import store_lock
    from finetune_assets.erasure import erase, look, subject_of
    from finetune_assets.registry import erasures
    from finetune_assets.resources import LedgerResource, SourceResource, StoreResource
    from finetune_assets.resources.history import forget
    from finetune_assets.serving.writer import transfer

    resource, book = StoreResource(), LedgerResource()
    store, key = resource.store, resource.key
    requests = who == (None, None)
    with store_lock(store.home, lambda text: console.print(text, markup=False)), book.open() as ledger:
        transfer(store.home / "serving" / "journal", ledger.engine)  # what a router that was stopped has left there
        if requests:
            book.erased(key, SourceResource().requests())
            subjects = [one.subject for one in erasures.all_erasures(ledger) if one.completed_at is None]
        else:
            subjects = [subject_of(*who, key)]
        outcomes: list[dict[str, Any]] = []
        refused: list[str] = []
        for subject in subjects:
            plan = look(store, ledger, subject, key)
            _show(console, plan)
            if plan.empty and not requests and not plan.begun:
                console.print(_in_source(subject, key), markup=False)
            if dry_run:
                outcomes.append({**plan.as_dict(), "state": "planned"})
                continue
            problem = _too_many(subject, len(plan.traces.conversations), limit)
            if problem and not requests:
                raise DataError(problem)
            if problem:  # the others are not kept waiting
                console.print(f"[red]refused[/] {problem}")
                refused.append(subject)
                continue
            with dg.DagsterInstance.get() as instance:
                _check_idle(instance)
                if not yes and not _confirmed(console, plan):
                    console.print("Nothing was changed.")
                    sys.exit(1)
                outcomes.append(erase(store, ledger, plan, key, lambda needles, into=instance: forget(into, needles)))
            _told(console, outcomes[-1])
    if not requests:
        return outcomes[0]
    if not subjects:
        console.print("Nobody waits to be forgotten.")
    return {"planned" if dry_run else "erased": outcomes, "refused": refused}


def _too_many(subject: str, found: int, limit: int) -> str | None:
    if found <= limit:
        return None
    return (
        f"{subject} has {found} conversations, --limit is {limit}: is this one person, or an id that many share? "
        f"If it is right, add --limit {found}."
    )


def _check_idle(instance: dg.DagsterInstance) -> None:
    """Raises DataError while a run may write rows."""
    import dagster as dg

    from finetune_assets.automation.retrain import ACTIVE

    runs = instance.get_runs(dg.RunsFilter(statuses=ACTIVE))
    active = [run for run in runs if run.job_name in ("prepare_corpus", "train")]
    if active:
        names = ", ".join(f"{run.run_id[:8]} ({run.job_name})" for run in active[:5])
        raise DataError(f"{len(active)} run(s) may be writing rows now: {names}. Erase when they have ended, or cancel them.")


def _show(console: Console, plan: Plan) -> None:
    facts = plan.as_dict()
    if plan.empty:
        console.print(f"{plan.subject}: nothing of this subject is in the store{'; it was erased before' if plan.begun else ''}.")
        return
    console.print(f"[bold]{plan.subject}[/]: this destroys for good")
    rows = ", ".join(f"{n} {name}" for name, n in facts["rows"].items() if n)
    console.print(f"  corpus      {rows or 'nothing'} in {len(facts['weeks'])} week(s)")
    for one in facts["datasets"]:
        console.print(f"  data set    {one['assistant']} {one['fingerprint']}: {one['rows']} line(s); rewritten without them")
    if facts["files"]:
        console.print(f"  files       {facts['files']} of reports, jobs and caches lose what is theirs")
    for table, n in facts["ledger_rows"].items():
        console.print(f"  ledger      {n} row(s) of {table}")
    for one in facts["versions"]:
        console.print(
            f"  [yellow]stays[/]       {one['version']} of {one['assistant']} was trained on them: marked, retrain requested"
        )
    for job in facts["open_jobs"]:
        console.print(f"  [yellow]runs[/]        {job} is in training on them: cancel it, or its version is marked as well")
    for job in facts["remote_jobs"]:
        console.print(f"  [yellow]elsewhere[/]   {job} has a copy at its provider: delete its files there")
    for one in facts["cannot_tell"]:
        console.print(
            f"  [yellow]unknown[/]     {one['version']} of {one['assistant']}: its data set was pruned, nobody can tell"
        )


def _in_source(subject: str, key: bytes) -> str:
    """What is said of a subject that the store does not know: a person not yet read, or an id that was mistyped."""
    from finetune_assets.corpus.erasure import conversations_in
    from finetune_assets.corpus.sources import read_source
    from finetune_assets.resources import SourceResource

    try:
        found = conversations_in(read_source(SourceResource().addresses()), subject, key)
    except (SourceError, SettingsError) as error:
        return f"Whether the source has something of it cannot be told: {error}"
    if found:
        return f"The source has {found} conversation(s) of it, which no build has read."
    return "Nor has the source a conversation of it. Is the id mistyped?"


def _confirmed(console: Console, plan: Plan) -> bool:
    if not sys.stdin.isatty():
        raise SettingsError("This destroys data and there is nobody to ask; add --yes, or look first with --dry-run.")
    console.print("Type [bold]erase[/] to go on: ", end="")
    return sys.stdin.readline().strip() == "erase"


def _told(console: Console, outcome: dict[str, Any]) -> None:
    for one in outcome["datasets"]:
        if one["rewritten_as"] != one["fingerprint"]:
            then = one["rewritten_as"] or "nothing, since no training row is left"
            console.print(f"Data set {one['fingerprint']} of {one['assistant']} is a tombstone now; in its place: {then}")
    for name in outcome["retrain_due"]:
        console.print(f"Retrain due: finetune run --assistant {name} (the weekly schedule and the feedback sensor know)")
    if outcome["found"]:
        console.print("Erased. No later build reads these rows, even if the source still holds them.")
    else:
        console.print("Nothing was found, and nothing erased. No later build reads rows of this id, should the source have some.")


@click.command()
@click.argument("identifier", metavar="MESSAGE_ID")
@click.option("--assistant", "names", multiple=True, help="Only this assistant's data set (can be repeated). Default: all.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def explain(identifier: str, names: tuple[str, ...], as_json: bool) -> None:
    """What became of a message and why: read, rejected, scrubbed, kept where, or dropped by which rule for which better twin.

    Also takes the id of a conversation or of feedback. Ends with 1 for an id that is nowhere.
    """
    from rich.console import Console

    from finetune_assets.corpus.erasure import Erased
    from finetune_assets.explain import Asked
    from finetune_assets.explain import explain as explained
    from finetune_assets.resources import LedgerResource, SourceResource, StoreResource

    resource = StoreResource()
    with LedgerResource().open() as ledger:
        asked = Asked(identifier.strip(), names, resource.key)
        facts = explained(resource.store, ledger, asked, lambda: SourceResource().read(Erased()))
    if as_json:
        print(json.dumps(facts, ensure_ascii=False, default=str))
    else:
        _explained(Console(highlight=False, soft_wrap=True), facts)
    if facts["kind"] == "unknown":
        sys.exit(1)


_STATES = {
    "kept": "[green]kept[/]",
    "dropped": "[red]dropped[/]",
    "not_selected": "not its own",
    "not_read": "[yellow]not read[/]",
}


def _explained(console: Console, facts: dict[str, Any]) -> None:
    from rich.markup import escape

    say = console.print
    kind = facts["kind"]
    if kind == "unknown":
        say(f"{escape(facts['id'])} is nowhere. Looked in {', '.join(facts['looked'])}.")
        if facts.get("source"):
            say(f"[yellow]The source could not be asked:[/] {escape(facts['source'])}")
        if facts["nearest"]:
            say(f"Nearest ids: {escape(', '.join(facts['nearest']))}")
        return
    if kind in ("erased", "unread"):
        when = f" on {facts['at']}" if facts.get("at") else ""
        say(f"[bold]{escape(facts['id'])}[/] {kind}{when}: {escape(facts['why'])}")
        return
    if kind in ("message", "conversation"):
        whose = f"{escape(facts['tenant_id'])} ({escape(facts['vertical'])})"
        say(f"[bold]{escape(facts[kind + '_id'])}[/] of {whose}, week {facts['week']}")
    if kind == "message":
        _told_message(console, facts)
    elif kind == "conversation":
        for one in facts["messages"]:
            say(f"  {one['message_id']} {one['role']}: {escape(one['text'])}")
            if one["why"] and one["role"] == "assistant":
                say(f"      no example: {escape(one['why'])}")
            _told_fates(console, one["assistants"], "      ")
    elif kind == "feedback":
        given = f", expected: {escape(facts['expected_response'])}" if facts["expected_response"] else ""
        say(f"[bold]{escape(facts['id'])}[/] {facts['feedback_type']} on {facts['message_id']}, {facts['at'][:16]}{given}")
        if facts["message"]:
            _told_message(console, facts["message"])
    for one in facts.get("rejected", ()):
        verb = f"[red]{'rejected' if one['action'] == 'dropped' else one['action']}[/]"
        say(f"  {verb} {one['table']} {escape(str(one['id']))} (week {one['week']}): {one['reason']}, {escape(one['detail'])}")


def _told_message(console: Console, facts: dict[str, Any]) -> None:
    from rich.markup import escape

    console.print(f"  {facts['role']} in {facts['conversation_id']}, {facts['said_at'][:16]}: {escape(facts['text'])}")
    if facts["scrubbed"]:
        console.print(f"  personal data replaced: {', '.join(facts['scrubbed'])}")
    for one in facts["feedback"]:
        given = f", expected: {escape(one['expected_response'])}" if one["expected_response"] else ""
        console.print(f"  feedback {escape(one['feedback_id'])}: {one['feedback_type']} on {one['at'][:16]}{given}")
    for one in facts["repaired"]:
        console.print(f"  {one['action']}: {one['reason']}, {escape(one['detail'])}")
    if not facts["example"]:
        console.print(f"  no example: {escape(facts['why'])}")
        return
    console.print(f"  answers ({facts['intent']}): {escape(facts['asked'])}")
    _told_fates(console, facts["assistants"], "  ")
    if not facts["assistants"]:
        console.print("  no assistant has a data set yet: finetune run --assistant NAME")


def _told_fates(console: Console, fates: list[dict[str, Any]], indent: str) -> None:
    from rich.markup import escape

    for one in fates:
        if one["state"] == "not_selected" and len(fates) > 1:
            continue
        reason = f" {one['reason']}" if one.get("reason") else ""
        mark = f" ({one['fingerprint'][:8]})" if one.get("fingerprint") else ""
        console.print(
            f"{indent}{one['assistant']}{mark}: {_STATES.get(one['state'], one['state'])}{reason} — {escape(one['why'])}"
        )
        if one.get("kept_text"):
            place = f" ({one['kept_place']})" if one.get("kept_place") else ""
            console.print(f"{indent}    kept instead{place}: {escape(one['kept_text'])}")
        for kind in ("preferences", "kto"):
            if one.get(kind):
                console.print(f"{indent}    {kind}: {', '.join(one[kind])}")


COMMANDS: list[click.Command] = [erase, explain]
