"""What was answered is in the ledger: full disks, killed processes, locked databases, rows that nobody takes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError

from finetune_assets.registry import Ledger
from finetune_assets.registry.traffic import conversations, messages, requests
from finetune_assets.serving import control
from finetune_assets.serving import journal as journals
from finetune_assets.serving.journal import Journal, closed
from finetune_assets.serving.writer import transfer
from finetune_assets_tests.serving.servers import Upstream
from finetune_assets_tests.serving.shop import Shop, crowd, wait_for

pytestmark = pytest.mark.timeout(120)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="prlimit(2)")
def test_a_journal_that_cannot_be_written_costs_nothing_but_time_and_is_told(fresh: Shop) -> None:
    """Chats are answered, their rows wait in memory and are written later; feedback, which nothing else holds, is refused."""
    with fresh.served("--no-judge") as served:
        before = served.ask(user="ana")
        assert wait_for(lambda: fresh.values(requests, "request_id"))
        worker = served.children("worker")[0]
        limits = resource.prlimit(worker, resource.RLIMIT_FSIZE)
        resource.prlimit(worker, resource.RLIMIT_FSIZE, (0, limits[1]))  # the kernel refuses every write to a file
        judged = {"request_id": before.json()["id"], "feedback_type": "negative"}
        assert served.client.post("/feedback", json=judged).status_code == 503
        waiting = served.ask(user="ana")
        assert waiting.status_code == 200
        time.sleep(0.3)  # it stays unready: nothing but a write that succeeds ends it
        ready = served.client.get("/readyz")
        assert ready.status_code == 503
        assert "File too large): 4 rows wait in memory, 0 are lost" in ready.json()["problems"][0]
        resource.prlimit(worker, resource.RLIMIT_FSIZE, limits)
        assert wait_for(lambda: served.client.get("/readyz").status_code == 200, 3)
        after = served.ask(user="ana")
        assert served.client.post("/feedback", json=judged).status_code == 202
        told = re.search(r"^finetune_lost_rows_total (\S+)", served.client.get("/metrics").text, re.MULTILINE)
        assert told
        assert float(told[1]) == 0
    assert {answer.json()["id"] for answer in (before, waiting, after)} == fresh.values(requests, "request_id")
    assert any("cannot be written" in line and "File too large" in line for line in served.lines)


def test_more_rows_than_memory_holds_are_counted_as_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journals, "MOST_HELD", 1000)
    journal = Journal(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        taken = [journal.append([("requests", {"request_id": f"r{n}" * 50})], hold=True) for n in range(20)]
        assert not journal.append([("ai_rlhf_feedback", {"feedback_id": "f"})])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert taken == sorted(taken, reverse=True)
    assert 0 < sum(taken) < 20
    assert journal.lost == 20 - sum(taken)
    journal.close()
    (kept,) = [rows for _, rows in closed(tmp_path)]
    assert len(kept) == sum(taken)


def test_the_open_segment_of_a_worker_whom_nobody_asks_makes_no_other_unready(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journals, "LATE", 0.0)
    busy, quiet = Journal(tmp_path), Journal(tmp_path)
    for waits in (0, 1):  # a row that no writer takes does
        busy._look()
        assert (busy.backlog, busy.problem is not None) == (waits, bool(waits))
        quiet.append([("requests", {"request_id": "r"})])
        quiet._rotate()
    for one in (busy, quiet):
        one.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 6 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=6m", "none", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, check=False, capture_output=True).returncode != 0:
        pytest.skip("no right to mount a small file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("full", ["ledger", "all"])
def test_a_disk_that_is_full_loses_nothing_that_was_answered(
    tmp_path: Path, small_disk: Path, upstream: Upstream, full: str
) -> None:
    """The ledger, or journal and ledger, on a full disk: chats are answered; feedback is taken while the journal has room, else
    refused; the log names the cause, nothing is half done. With room again all rows come to the ledger."""
    shop = Shop(small_disk if full == "all" else tmp_path / "shop", upstream=upstream.url)
    shop.database = shop.url = f"sqlite:///{small_disk / 'ledger.db'}"
    shop.environment["FINETUNE_DATABASE_URL"] = shop.url
    first, _ = shop.two_versions("50")
    with shop.served("--no-judge", "--workers", "2") as served:
        answers = [served.ask(user=f"u{n}") for n in range(10)]
        judged = {"request_id": answers[0].json()["id"], "feedback_type": "negative"}
        assert wait_for(lambda: len(shop.values(requests, "request_id")) == 10)
        filler = small_disk / "filler"
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(b"x" * 512)
        answers += [served.ask("¿Tienen hora? " * 40, user=f"u{n}") for n in range(60)]
        assert {answer.status_code for answer in answers} == {200}
        assert served.client.post("/feedback", json=judged).status_code == (503 if full == "all" else 202)
        with shop.ledger() as book, pytest.raises(SQLAlchemyError, match="full"):
            control.rollback(book, "aurora", "patients complain", "ana")
        if full == "all":
            assert any("No space left on device" in problem for problem in served.client.get("/readyz").json()["problems"])
            assert any("journal" in line and "No space left on device" in line for line in served.lines)
        else:
            assert wait_for(lambda: any("disk is full" in line for line in served.lines), 5)
        assert len(shop.values(requests, "request_id")) < len(answers)
        filler.unlink()
        assert wait_for(lambda: shop.values(requests, "request_id") == {answer.json()["id"] for answer in answers}, 15)
        assert wait_for(lambda: served.client.get("/readyz").status_code == 200, 5)
        assert served.client.post("/feedback", json=judged).status_code == 202
        with shop.ledger() as book:
            control.rollback(book, "aurora", "patients complain", "ana")
        assert wait_for(lambda: {served.ask(user=f"u{n}").json()["model"] for n in range(10)} == {f"aurora--{first}"}, 2)
        counts = Path(f"/proc/{served.children('worker')[0]}/environ").read_bytes()
        assert b"PROMETHEUS_MULTIPROC_DIR=/dev/shm/" in counts  # written through a mapping: on a full disk that kills
    assert not any("starting it again" in line for line in served.lines)


def test_a_row_that_the_ledger_refuses_is_set_aside_and_holds_up_nobody(tmp_path: Path) -> None:
    shop = Shop(tmp_path)
    folder = tmp_path / "journal"
    journal = Journal(folder)
    journal.append([("conversations", {"conversation_id": "c1"})])
    journal.append([("requests", {"request_id": "r1"}), ("conversations", {"conversation_id": {"no": "text"}})])
    journal.close()
    later = Journal(folder)
    later.append([("conversations", {"conversation_id": "c2"})])
    with shop.ledger() as book:
        transfer(folder, book.engine)
        assert shop.values(conversations, "conversation_id") == {"c1"}  # the second segment is still its worker's
        later.close()
        transfer(folder, book.engine)
    assert shop.values(conversations, "conversation_id") == {"c1", "c2"}
    refused = [json.loads(line)[0] for file in (folder / "refused").iterdir() for line in file.read_text().splitlines()]
    assert refused == ["requests", "conversations"]
    assert {file.stat().st_mode & 0o777 for file in (folder / "refused").iterdir()} == {0o600}  # it may hold texts
    assert not list(folder.glob("*.jsonl"))


@pytest.mark.parametrize("option", ["default_transaction_read_only=on", "role=reader"])
def test_a_postgres_that_takes_no_writes_costs_time_and_no_row(tmp_path: Path, postgres: str, option: str) -> None:
    """Like a standby after a failover, or a role that lost its rights: not what the rows say."""
    folder, journal = tmp_path / "journal", Journal(tmp_path / "journal")
    journal.append([("conversations", {"conversation_id": "c1"}), ("conversations", {"conversation_id": {"no": "text"}})])
    journal.close()
    book = Ledger(postgres)
    with book.engine.begin() as connection:
        connection.execute(sa.text("DROP ROLE IF EXISTS reader"))
        connection.execute(sa.text("CREATE ROLE reader"))
    closed_to_us = sa.create_engine(postgres, connect_args={"options": f"-c {option}"}, poolclass=sa.NullPool)
    with pytest.raises(SQLAlchemyError, match=r"read-only transaction|permission denied"):
        transfer(folder, closed_to_us)
    assert not (folder / "refused").exists()
    transfer(folder, book.engine)
    with book.engine.connect() as connection:
        assert connection.execute(sa.select(conversations.c.conversation_id)).scalars().all() == ["c1"]
    book.close()
    assert len(list((folder / "refused").iterdir())) == 1


def test_no_row_is_lost_between_a_new_segment_and_its_lock(tmp_path: Path) -> None:
    """A reader beside four writers that change their segments all the time takes every row once."""
    folder, seen, done = tmp_path / "journal", [], threading.Event()

    def read() -> None:
        while not done.is_set():
            seen.extend(row for _, rows in closed(folder) for row in rows)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        writers = [Journal(folder) for _ in range(4)]
        for number in range(400):
            for writer in writers:
                writer.append([("requests", {"request_id": f"r{number}"})])
                writer._rotate()
        for writer in writers:
            writer.close()
    finally:
        done.set()
        reader.join()
    seen.extend(row for _, rows in closed(folder) for row in rows)
    assert len(seen) == 1600


@pytest.mark.slow
def test_what_was_answered_is_logged_though_the_worker_is_killed(fresh: Shop) -> None:
    with fresh.served("--no-judge", "--workers", "2") as served, crowd(served.url) as people:
        for _ in range(3):
            time.sleep(0.5)
            os.kill(served.children("worker")[0], signal.SIGKILL)
        assert wait_for(lambda: len(people.answers) > 50, 60)
    assert people.acknowledged <= fresh.values(requests, "request_id")
    assert fresh.values(messages, "conversation_id") == fresh.values(conversations, "conversation_id")


@pytest.mark.slow
def test_a_locked_ledger_costs_time_and_nothing_else(fresh: Shop) -> None:
    with fresh.served("--no-judge") as served, fresh.ledger() as book:
        with book.engine.connect() as connection:
            connection.exec_driver_sql("BEGIN IMMEDIATE")
            answers = [served.ask(user=f"u{n}") for n in range(20)]
            assert {answer.status_code for answer in answers} == {200}
            connection.rollback()
        assert wait_for(lambda: len(fresh.rows(requests)) == 20)


@pytest.mark.slow
def test_a_router_that_is_killed_loses_nothing_it_has_answered_and_no_arm(
    tmp_path: Path, upstream: Upstream, record_property: Callable[[str, object], None]
) -> None:
    """All of its processes at once, under load; what the journal holds is in the ledger after the next start."""
    shop = Shop(tmp_path, upstream=upstream.url)
    first, second = shop.two_versions("10")
    moved = shop.user_between(0.1, 0.5)
    open_one = {"metadata": {"conversation_id": "c1"}}
    with shop.served("--no-judge", "--workers", "2") as served:
        assert first in served.ask(user=moved, **open_one).json()["model"]
        with crowd(served.url) as people:
            assert wait_for(lambda: len(people.answers) > 20, 30)
            for pid in [*served.children("worker"), *served.children("writer"), served.process.pid]:
                os.kill(pid, signal.SIGKILL)
        served.process.wait()
    shop.advance()
    with shop.served("--no-judge") as served:
        assert wait_for(lambda: people.acknowledged <= shop.values(requests, "request_id"))
        people.record(record_property, shop.values(requests, "request_id"))
        assert first in served.ask(user=moved, **open_one).json()["model"]  # begun at 10 %, kept at 50 %
        assert second in served.ask(user=moved).json()["model"]
