"""The ledger: one job a spec, one number a version, one claim a release, one move a generation."""

import itertools
import socket
import sqlite3
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy as sa

from finetune_assets.corpus.sources import read_source
from finetune_assets.corpus.validation import validate
from finetune_assets.errors import LedgerError
from finetune_assets.registry import Job, Ledger, rollouts
from finetune_assets.registry.ledger import LIBPQ
from finetune_assets.registry.schema import metadata, prepare
from finetune_assets.serving import control
from finetune_assets.serving.writer import store


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A fresh database of each kind; Postgres is a real one."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'ledger.db'}"
    return str(request.getfixturevalue("postgres"))


@pytest.fixture
def ledger(url: str) -> Iterator[Ledger]:
    book = Ledger(url)
    yield book
    book.close()


def spec(name: str = "s1") -> dict[str, object]:
    return {
        "assistant": "dental",
        "tenant_id": None,
        "dataset_id": "ds-1",
        "dataset_fingerprint": "f" * 16,
        "provider": "local",
        "base_model": "data/base_model",
        "hyperparameters": {"epochs": 1},
        "plan": {},
        "spec_hash": name,
    }


def finished(ledger: Ledger, name: str = "s1") -> Job:
    return ledger.set_job(ledger.open_job(spec(name)).id, "succeeded")


def test_the_same_spec_is_the_same_job_until_it_fails(ledger: Ledger) -> None:
    job = ledger.open_job(spec())
    assert ledger.open_job(spec()).id == job.id
    ledger.set_job(job.id, "failed", error="out of memory")
    again = ledger.open_job(spec())
    assert (again.attempt, again.status) == (2, "pending")
    ledger.set_job(again.id, "succeeded")
    assert ledger.open_job(spec()).id == again.id


def test_two_specs_of_one_beginning_are_told_apart(ledger: Ledger) -> None:
    ledger.open_job(spec("0123456789abcdef"))
    with pytest.raises(LedgerError, match="of another spec, 0123456789abcdef, not of 0123456789ab0000"):
        ledger.open_job(spec("0123456789ab0000"))


def test_processes_that_open_at_once_get_one_job(url: str) -> None:
    def open_one(_: int) -> str:
        book = Ledger(url)
        try:
            return book.open_job(spec()).id
        finally:
            book.close()

    with ThreadPoolExecutor(6) as pool:
        assert len(set(pool.map(open_one, range(12)))) == 1


def test_a_release_is_claimed_once(ledger: Ledger) -> None:
    job = finished(ledger)
    with ThreadPoolExecutor(4) as pool:
        won = list(pool.map(lambda n: ledger.claim_release(job.id, f"run:{n}"), range(8)))
    assert sum(won) == 1
    owner = ledger.job(job.id).released_by
    assert not ledger.claim_release(job.id, "run:x", previous="run:other")
    assert ledger.claim_release(job.id, "run:x", previous=owner)
    assert ledger.job(job.id).release_attempt == 2
    assert [waiting.id for waiting in ledger.unreleased()] == [job.id]
    ledger.release_done(job.id)
    assert ledger.unreleased() == []


def test_versions_are_numbered_and_equal_content_is_one_version(ledger: Ledger, tmp_path: Path) -> None:
    job = finished(ledger)
    first = ledger.mint_version(job, "a" * 64, tmp_path)
    assert (first.version, first.path) == ("v1-aaaaaaaa", str(tmp_path / "v1-aaaaaaaa"))
    assert ledger.mint_version(job, "a" * 64, tmp_path) == first
    assert ledger.mint_version(job, "b" * 64, tmp_path).version == "v2-bbbbbbbb"


def test_a_rollout_moves_only_from_the_generation_seen_and_leaves_its_events(ledger: Ledger, tmp_path: Path) -> None:
    version = ledger.mint_version(finished(ledger), "a" * 64, tmp_path).version
    ledger.register("dental", version, "serve", ["better"], "r.html")
    idle = ledger.rollout("dental")
    shadow = rollouts.start(idle, version, "serve")
    assert ledger.move(idle, shadow, "started", ("because", "ana"), {"requests": 1}).candidate == version
    with pytest.raises(LedgerError, match="moved on"):
        ledger.move(idle, shadow, "started", ("because", "bob"))
    seen = ledger.rollout("dental")
    assert (seen.step, seen.share, seen.generation) == ("shadow", 0.0, 1)

    def back(who: str) -> bool:
        try:
            ledger.move(seen, rollouts.rollback(seen), "rolled_back", ("bad", who))
        except LedgerError:
            return False
        return True

    with ThreadPoolExecutor(4) as pool:  # everybody presses the button at once
        assert sum(pool.map(back, ["ana", "bob", "eva", "leo"])) == 1
    events = ledger.events("dental")
    assert [event["event"] for event in events] == ["verdict", "started", "rolled_back"]
    assert (events[1]["actor"], events[1]["evidence"], events[1]["step"]) == ("ana", {"requests": 1}, "shadow")


def test_a_verdict_that_is_newer_than_the_decision_stops_the_move(ledger: Ledger, tmp_path: Path) -> None:
    """Read before, changed since: no version gets more users; the way back and a hold are open."""
    version = ledger.mint_version(finished(ledger), "a" * 64, tmp_path).version
    ledger.register("dental", version, "serve", ["better"], "r.html")
    idle = ledger.rollout("dental")
    shadow = rollouts.start(idle, version, "serve")
    ledger.register("dental", version, "do_not_serve", ["again"], "r.html")
    with pytest.raises(LedgerError, match="is do_not_serve now"):
        ledger.move(idle, shadow, "started", ("because", "ana"))
    assert ledger.rollout("dental") == idle
    ledger.register("dental", version, "serve", ["again"], "r.html")
    seen = ledger.move(idle, shadow, "started", ("because", "ana"))
    ledger.register("dental", version, "cannot_tell", ["again"], "r.html")
    for steps in ([10, 100], [100]):
        with pytest.raises(LedgerError, match="is cannot_tell now"):
            ledger.move(seen, rollouts.advance(seen, "passed", steps, person=True), "advanced", ("fine", "ana"))
    held = ledger.move(seen, rollouts.hold(seen, "person"), "held", ("wait", "ana"))
    assert ledger.move(held, rollouts.rollback(held), "rolled_back", ("bad", "ana")).candidate is None


def test_verdicts_that_come_at_once_follow_each_other(ledger: Ledger, tmp_path: Path) -> None:
    version = ledger.mint_version(finished(ledger), "a" * 64, tmp_path).version
    with ThreadPoolExecutor(4) as pool:
        said = ["serve", "do_not_serve", "cannot_tell", "review"]
        list(pool.map(lambda one: ledger.register("dental", version, one, [one], "r.html"), said))
    events = ledger.events("dental")
    assert sorted(event["reason"] for event in events) == sorted(f"benchmark says {one}" for one in said)
    before = [None, *(event["reason"].removeprefix("benchmark says ") for event in events)]
    assert [event["previous"] for event in events] == before[:-1]
    assert ledger.version("dental", version).verdict == before[-1]


def test_unknown_things_are_named(ledger: Ledger, tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="job-x"):
        ledger.job("job-x")
    with pytest.raises(LedgerError, match="v9"):
        ledger.version("dental", "v9")
    with pytest.raises(LedgerError, match="none of pending"):
        ledger.set_job(ledger.open_job(spec()).id, "validating_files")
    (tmp_path / "file").write_text("")
    with pytest.raises(LedgerError, match="cannot be used") as raised:
        Ledger(f"sqlite:///{tmp_path}/file/x/ledger.db")
    assert "FINETUNE_DATABASE_URL" in str(raised.value)


def test_the_password_is_not_shown() -> None:
    with pytest.raises(LedgerError) as raised:
        Ledger("postgresql://me:hunter2@127.0.0.1:1/x")
    assert "hunter2" not in str(raised.value)


def test_an_older_ledger_gets_its_new_columns_and_loses_nothing(url: str) -> None:
    old = Ledger(url)
    with old.engine.begin() as connection:
        connection.execute(sa.text("DROP TABLE ledger_schema"))
        connection.execute(sa.text("DROP TABLE ratings"))
        connection.execute(sa.text("DROP INDEX requests_of_a_reply"))
        connection.execute(sa.text("ALTER TABLE requests DROP COLUMN first_token_seconds"))
        connection.execute(sa.text("ALTER TABLE requests ADD COLUMN of_a_newer_program INTEGER"))
        connection.execute(sa.text("DROP TABLE rollouts"))
        connection.execute(
            sa.text(
                "CREATE TABLE rollouts (assistant VARCHAR(80) PRIMARY KEY, champion VARCHAR(80), generation INTEGER NOT NULL, "
                "updated_at TIMESTAMP NOT NULL)"
            )
        )
        connection.execute(sa.text("INSERT INTO rollouts VALUES ('dental', 'v1-aaaaaaaa', 3, '2026-01-05 10:00:00')"))
    old.close()

    def look(_: int) -> rollouts.Rollout:
        book = Ledger(url)
        try:
            return book.rollout("dental")
        finally:
            book.close()

    with ThreadPoolExecutor(4) as pool:  # processes of the new program that start at once
        for found in pool.map(look, range(4)):
            assert (found.champion, found.generation, found.step, found.share) == ("v1-aaaaaaaa", 3, "idle", 0.0)
    new = Ledger(url)
    with new.engine.connect() as connection:
        there = sa.inspect(connection)
        for table in metadata.sorted_tables:
            assert {column.name for column in table.columns} <= {column["name"] for column in there.get_columns(table.name)}
            assert {index.name for index in table.indexes} <= {index["name"] for index in there.get_indexes(table.name)}
        assert "of_a_newer_program" in {column["name"] for column in there.get_columns("requests")}
    new.close()


def test_a_ledger_that_is_up_to_date_is_opened_with_one_question(url: str) -> None:
    Ledger(url).close()
    asked: list[str] = []
    engine = sa.create_engine(sa.make_url(url))
    sa.event.listen(engine, "before_cursor_execute", lambda *event: asked.append(event[2]))
    prepare(engine)
    engine.dispose()
    assert [sql.split()[0] for sql in asked if "ledger_schema" in sql or "TABLE" in sql] == ["SELECT"]


def dump(url: str, folder: Path) -> Callable[[], str]:
    """A copy made by the database's own tool while it is in use; restores it and returns the copy's URL."""
    at = sa.make_url(url)
    if at.get_backend_name() == "sqlite":
        with closing(sqlite3.connect(at.database or "")) as source, closing(sqlite3.connect(folder / "copy.db")) as copy:
            source.backup(copy)  # what `.backup` of sqlite3 does
        return lambda: f"sqlite:///{folder / 'copy.db'}"
    tools = Path(pytest.importorskip("pgserver").__file__).parent / "pginstall" / "bin"
    plain = at.set(drivername="postgresql")
    made = plain.set(database=f"{at.database}_copy")

    def run(tool: str, *arguments: str) -> None:
        subprocess.run([tools / tool, *arguments], check=True, capture_output=True)

    shown = plain.render_as_string(hide_password=False)
    run("pg_dump", "--format=custom", f"--file={folder / 'ledger.dump'}", shown)

    def restore() -> str:
        run("psql", "--quiet", f"--command=CREATE DATABASE {made.database}", shown)
        target = made.render_as_string(hide_password=False)
        run("pg_restore", "--exit-on-error", f"--dbname={target}", str(folder / "ledger.dump"))
        return target

    return restore


def test_a_backup_made_in_use_is_restored_whole(url: str, tmp_path: Path) -> None:
    """Versions, rollout, events and keys come back as they were; what was done after the backup is not in it; and it goes on."""
    book = Ledger(url)
    job = finished(book)
    version = book.mint_version(job, "c" * 64, tmp_path)
    book.register("dental", version.version, "serve", ["good"], "report.html")
    control.start(book, "dental", version.version, "good", "ana")
    ended = threading.Event()

    def writing() -> None:
        for n in itertools.count():
            if ended.is_set():
                return
            store(book.engine, [("conversations", {"conversation_id": f"c{n}"}), ("messages", {"message_id": f"m{n}"})])

    writer = threading.Thread(target=writing)
    writer.start()
    restore = dump(url, tmp_path)
    ended.set()
    writer.join()
    before = (book.versions(), book.rollout("dental"), book.events("dental"))
    control.rollback(book, "dental", "after the backup", "ana")
    copy = Ledger(restore())
    assert (copy.versions(), copy.rollout("dental"), copy.events("dental")) == before
    with copy.engine.connect() as connection:
        counts = [connection.execute(sa.text(f"SELECT count(*) FROM {name}")).scalar() for name in ("conversations", "messages")]
    assert counts[0] == counts[1]  # a transaction is in it whole or not at all
    assert control.rollback(copy, "dental", "it goes on", "bob").after.generation == before[1].generation + 1
    copy.close()
    book.close()


def test_what_the_router_writes_is_a_source_of_the_corpus(url: str) -> None:
    book = Ledger(url)
    at = "2026-11-02T10:00:00+00:00"
    talk = {"conversation_id": "c1", "tenant_id": "t", "user_id": "u", "vertical": "dental", "channel": "api"}
    message = {"conversation_id": "c1", "intent": None, "created_at": at}
    said = {"feedback_id": "f1", "tenant_id": "t", "conversation_id": "c1", "message_id": "m2", "feedback_type": "negative"}
    rows = [
        ("conversations", {**talk, "satisfaction_score": None, "started_at": at, "ended_at": None}),
        ("messages", {**message, "message_id": "m1", "role": "user", "content": "¿Hay hora?"}),
        ("messages", {**message, "message_id": "m2", "role": "assistant", "content": "No."}),
        ("ai_rlhf_feedback", {**said, "rating": 1, "expected_response": "Sí, a las diez.", "comment": None, "created_at": at}),
    ]
    for _ in range(2):  # again after a crash: nothing is doubled
        store(book.engine, rows)
    book.close()
    valid = validate(read_source([url]))
    assert (len(valid.conversations), len(valid.messages), len(valid.feedback), len(valid.rejected)) == (1, 2, 1, 0)
    assert valid.feedback["week"].to_list() == ["2026-11-02"]


def test_a_postgres_that_says_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes the connection, and that is all."""
    monkeypatch.setitem(LIBPQ, "connect_timeout", 2)  # the least that libpq heeds
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with pytest.raises(LedgerError, match="timeout expired"):
            Ledger(f"postgresql://someone@127.0.0.1:{port}/x")
    with pytest.raises(LedgerError, match="refused"):
        Ledger(f"postgresql://someone@127.0.0.1:{port}/x?connect_timeout=2")  # the URL's own goes before
