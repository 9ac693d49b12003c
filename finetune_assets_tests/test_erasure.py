"""Erasing a person: nothing of theirs stays anywhere in the store, later builds leave them out, and it may be killed anywhere."""

from __future__ import annotations

import datetime
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl
import pytest
import sqlalchemy as sa

from finetune_assets import erasure
from finetune_assets.assets.metadata import sample_table
from finetune_assets.assistants import Assistant
from finetune_assets.cli import main
from finetune_assets.corpus.erasure import Erased, find_traces, key_check, user_subject
from finetune_assets.corpus.examples import build_examples
from finetune_assets.corpus.ingest import ingest_conversations, ingest_feedback, stale_weeks
from finetune_assets.corpus.sources import SourceTables, Tables, read_source
from finetune_assets.dataset import choose, freeze, latest, stage
from finetune_assets.dataset.leaks import check_leaks
from finetune_assets.dataset.manifest import TOMBSTONE, new_feedback, read_manifest, standing
from finetune_assets.environment import ROOT
from finetune_assets.errors import DataError, LedgerError, SourceError
from finetune_assets.registry import Ledger, erasures
from finetune_assets.registry.traffic import requests
from finetune_assets.resources import LedgerResource, SourceResource
from finetune_assets.resources.history import forget
from finetune_assets.storage import Store, write_json
from finetune_assets_tests.corpus import exports
from finetune_assets_tests.dataset.small_corpus import sentence

KEY = exports.KEY
GONE = "+59170123456"  # the user that is erased: three conversations in two weeks, with feedback and a rejected row
ASSISTANT = Assistant(name="dental", select={"vertical": "dental"}, min_examples=5, system_prompt="Eres amable.")
SLOW = [pytest.mark.slow, pytest.mark.timeout(1200)]  # some eighty erasures
Crash = Callable[[], None]


def write_source(folder: Path) -> Path:
    tables = exports.export(conversations=40)
    for number, row in enumerate(tables["conversations"]):
        if number in (3, 4, 30):
            row["user_id"] = GONE
        row["started_at"] = exports.at(weeks=number // 20, minutes=number)
    for number, row in enumerate(tables["messages"]):
        row["content"] = f"{'¿' if row['role'] == 'user' else 'Claro, '}{sentence(number, 'said')}"
        row["created_at"] = exports.at(weeks=number // 80, minutes=number / 4)
    tables["messages"][14]["content"] = None  # rejected, in a conversation of theirs
    for number, row in enumerate(tables["feedback"]):
        row["created_at"] = exports.at(weeks=1 + number // 20, minutes=number)
        row["comment"] = f"comentario: {sentence(number, 'comment')}"
        if number % 5 == 4:
            row |= {"feedback_type": "negative", "expected_response": f"Mejor {sentence(number, 'better')}"}
    return exports.write(folder, tables)


def build(store: Store, tables: SourceTables) -> str:
    weeks = stale_weeks(store, tables).stale
    ingest_conversations(store, tables, weeks, KEY)
    ingest_feedback(store, tables, weeks, KEY)
    build_examples(store, weeks)
    choice = choose(store, ASSISTANT)
    stage(store, ASSISTANT, choice)
    return str(freeze(store, ASSISTANT, choice)["fingerprint"])


class World:
    """A store with corpus, data set, a report that shows a person's row, a benchmark's work and a job's copy; and its ledger."""

    def __init__(self, folder: Path) -> None:
        self.store = Store(folder / "home")
        self.ledger = Ledger(f"sqlite:///{folder / 'ledger.db'}")

    def fill(self, source: Path) -> str:
        self.tables = read_source([str(source)])
        mark = build(self.store, self.tables)
        folder = self.store.dataset("dental", mark)
        self.ledger.record_dataset("dental", None, folder, read_manifest(folder))
        job = self.ledger.open_job(_job(mark))
        self.ledger.set_job(job.id, "succeeded")
        version = self.ledger.mint_version(job, "c0ffee00" * 8, self.store.model("dental", "x").parent)
        lineage = pl.read_parquet(folder / "lineage.parquet")
        theirs = lineage.filter(pl.col("user") == user_subject(GONE, KEY)).row(0, named=True)
        lines = (folder / f"{theirs['split']}.jsonl").read_text(encoding="utf-8").splitlines()
        row = json.loads(lines[theirs["line"]])
        reports = self.store.home / "reports" / "dental"
        shown = {"message_id": theirs["message_id"], "context": row["messages"][:-1], "reference": row["messages"][-1]["content"]}
        write_json(
            reports / version.version / "samples.json", {"samples": [shown, {"message_id": "msg_9999", "reference": "otra"}]}
        )
        write_json(reports / "work" / version.version / "rows.json", {"rows": [shown]})
        write_json(reports / "work" / version.version / "spec.json", {"task": "benchmark"})
        upload = self.store.job(job.spec_hash) / "upload.jsonl"
        upload.parent.mkdir(parents=True)
        upload.write_text("\n".join(lines) + "\n", encoding="utf-8")
        (upload.parent / "training_log.jsonl").write_text('{"step": 1, "loss": 2.0}\n', encoding="utf-8")
        return mark

    def erase(self, subject: str = GONE) -> dict[str, Any]:
        plan = erasure.look(self.store, self.ledger, user_subject(subject, KEY), KEY)
        return erasure.erase(self.store, self.ledger, plan, KEY, lambda needles: 0)

    def erased(self) -> Erased:
        return Erased(erasures.subjects(self.ledger, key_check(KEY)), KEY)

    def texts(self) -> dict[str, str]:
        """The text of every file, also of drafts that a killed process left."""
        found: dict[str, str] = {}
        for path in sorted(path for path in self.store.home.rglob("*") if path.is_file()):
            if ".parquet" in path.name:
                text = json.dumps(pl.read_parquet(path.read_bytes()).to_dicts(), ensure_ascii=False, default=str)
            else:
                text = path.read_text(encoding="utf-8", errors="replace")
            found[str(path.relative_to(self.store.home))] = text
        return found


def _job(fingerprint: str) -> dict[str, Any]:
    return {
        "assistant": "dental",
        "tenant_id": None,
        "dataset_id": f"ds-dental-{fingerprint[:16]}",
        "dataset_fingerprint": fingerprint,
        "provider": "local",
        "base_model": "data/base_model",
        "hyperparameters": {},
        "plan": {},
        "spec_hash": f"hash-{fingerprint}",
    }


def needles(tables: SourceTables) -> list[str]:
    """Everything of the person that the source holds: ids and texts."""
    talks = tables.conversations.filter(pl.col("user_id") == GONE)["conversation_id"]
    said = tables.messages.filter(pl.col("conversation_id").is_in(talks.implode()))
    judged = tables.feedback.filter(pl.col("conversation_id").is_in(talks.implode()))
    texts = [*said["content"], *judged["comment"], *judged["expected_response"]]
    return [one for one in [GONE, *talks, *said["message_id"], *judged["feedback_id"], *texts] if one]


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("world")
    return folder, World(folder).fill(write_source(folder / "source"))


@pytest.fixture
def world(filled: tuple[Path, str], tmp_path: Path) -> World:
    shutil.copytree(filled[0], tmp_path, dirs_exist_ok=True, symlinks=True)
    made = World(tmp_path)
    made.tables = read_source([str(tmp_path / "source")])
    return made


def test_nothing_of_the_person_stays(filled: tuple[Path, str], world: World) -> None:
    mark = filled[1]
    before = world.texts()
    there = [one for one in needles(world.tables) if any(one in text for text in before.values())]
    assert set(needles(world.tables)) - set(there) == {GONE}
    outcome = world.erase()
    assert outcome["rows"] == {"conversations": 3, "messages": 11, "feedback": 3, "examples": 6, "rejected": 2}
    left = {(one, name) for one in needles(world.tables) for name, text in world.texts().items() if one in text}
    assert left == set()
    assert user_subject(GONE, KEY) not in "".join(world.texts().values())
    new = latest(world.store, "dental")
    assert new is not None
    assert outcome["datasets"] == [
        {"assistant": "dental", "fingerprint": mark, "rows": outcome["datasets"][0]["rows"], "rewritten_as": new.name}
    ]
    assert check_leaks(new) == []
    assert read_manifest(new)["parents"] == [mark]
    assert [p.name for p in world.store.dataset("dental", mark).iterdir()] == [TOMBSTONE]
    samples = json.loads(next((world.store.home / "reports").rglob("samples.json")).read_text())
    assert samples == {"samples": [{"message_id": "msg_9999", "reference": "otra"}]}
    assert (world.store.job(f"hash-{mark}") / "training_log.jsonl").exists()


def test_a_stock_text_that_others_said_too_stays_in_their_rows(tmp_path: Path) -> None:
    greeting, own = "Hola, buenos días. ¿En qué puedo ayudarle?", "Mi hija tiene fiebre desde el lunes pasado."
    tables = exports.export(conversations=6)
    for number in (1, 5, 9):  # of the first three conversations; the last of these is theirs
        tables["messages"][number]["content"] = greeting
    tables["messages"][10]["content"] = own
    tables["conversations"][2]["user_id"] = GONE
    world, source = World(tmp_path), read_source([str(exports.write(tmp_path / "source", tables))])
    weeks = stale_weeks(world.store, source).stale
    ingest_conversations(world.store, source, weeks, KEY)
    upload = world.store.job("one") / "upload.jsonl"
    upload.parent.mkdir(parents=True)
    upload.write_text(f'{{"reply": "{greeting}"}}\n{{"reply": "{own}"}}\n', encoding="utf-8")
    world.erase()
    assert upload.read_text(encoding="utf-8") == f'{{"reply": "{greeting}"}}\n'


def test_what_is_left_is_what_a_build_without_the_person_makes(world: World, tmp_path: Path) -> None:
    world.erase()
    rewritten = latest(world.store, "dental")
    without = world.erased().leave_out(world.tables)
    assert without.conversations.height == world.tables.conversations.height - 3
    fresh = Store(tmp_path / "fresh")
    assert rewritten is not None
    pairs = read_manifest(rewritten)["pairs"]
    assert build(fresh, without) == rewritten.name
    made = read_manifest(fresh.dataset("dental", rewritten.name))["pairs"]
    assert made["kto_labels"]["good"] > 0
    assert {name: pairs[name] for name in ("preferences", "kto", "kto_labels")} == {
        name: made[name] for name in ("preferences", "kto", "kto_labels")
    }
    stale = stale_weeks(world.store, without)
    assert set(stale.conversations) == {exports.at().date().isoformat(), exports.at(1).date().isoformat()}
    assert build(world.store, without) == rewritten.name  # the source still holds the rows
    for table in ("conversations", "feedback", "examples", "rejected"):
        for path in sorted((fresh.home / "corpus" / table).rglob("*.parquet")):
            assert pl.read_parquet(path).equals(pl.read_parquet(world.store.home / path.relative_to(fresh.home))), path
    assert new_feedback(world.store, ASSISTANT, rewritten.name) == 0


def test_models_are_marked_and_a_retrain_is_due_until_one_was_trained(filled: tuple[Path, str], world: World) -> None:
    mark = filled[1]
    outcome = world.erase()
    assert outcome["retrain_due"] == ["dental"]
    assert outcome["versions"] == [{"assistant": "dental", "version": "v1-c0ffee00"}]
    assert [v.version for v in erasures.marked_versions(world.ledger)] == ["v1-c0ffee00"]
    assert [event["event"] for event in world.ledger.events("dental")] == ["erasure"]
    assert erasures.retrain_due(world.ledger, "dental") == mark
    with pytest.raises(DataError, match=r"a person was erased from it on \d{4}-"):
        read_manifest(world.store.dataset("dental", mark))
    new = latest(world.store, "dental")
    assert new is not None
    assert standing(world.store, "dental", mark) == new.resolve()
    world.ledger.open_job(_job(new.name))
    assert erasures.retrain_due(world.ledger, "dental") is None
    world.erase()  # again: nothing is left, nothing is marked twice
    assert [event["event"] for event in world.ledger.events("dental")] == ["erasure"]


def test_one_conversation_and_twice_in_a_row(world: World) -> None:
    subject = erasure.subject_of(None, "conv_0007", KEY)
    plan = erasure.look(world.store, world.ledger, subject, KEY)
    assert plan.traces.conversations == {"conv_0007"}
    first = latest(world.store, "dental")
    erasure.erase(world.store, world.ledger, plan, KEY, lambda needles: 0)
    second = latest(world.store, "dental")
    world.erase()
    third = latest(world.store, "dental")
    assert first
    assert second
    assert third
    assert len({first.name, second.name, third.name}) == 3
    assert standing(world.store, "dental", first.name) == third
    tables = world.erased().leave_out(world.tables)
    assert not {"conv_0007", "conv_0003"} & set(tables.messages["conversation_id"])
    assert build(world.store, tables) == third.name
    assert find_traces(world.store, subject, KEY).conversations == frozenset()


def test_a_clients_id_of_a_conversation_reaches_what_the_router_stored(world: World) -> None:
    """Its own rows as `TENANT/ID`, in the ledger and where that is the source; a longer id is another's."""
    for number, conversation in enumerate(("aurora/c7", "sol/c7", "aurora/xc7")):
        row = {"request_id": str(number), "assistant": "dental", "conversation_id": conversation, "kind": "live", "generation": 1}
        row |= {
            "step": "idle",
            "assigned_arm": "champion",
            "served_arm": "champion",
            "kept": False,
            "version": "v",
            "status": 200,
        }
        with world.ledger.engine.begin() as connection:
            at = datetime.datetime(2026, 11, 1)
            connection.execute(sa.insert(requests), {**row, "outcome": "ok", "created_at": at})
    found = {
        name: erasure.look(world.store, world.ledger, erasure.subject_of(None, name, KEY), KEY).ledger_rows
        for name in ("c7", "aurora/c7", "7")
    }
    assert found == {"c7": {"requests": 2}, "aurora/c7": {"requests": 1}, "7": {}}
    stored = pl.col("conversation_id").str.replace("conv_0007", "aurora/conv_0007")
    names = ("conversations", "messages", "feedback")
    tables = Tables(*(getattr(world.tables, name).with_columns(stored) for name in names))
    asked = Erased(frozenset([erasure.subject_of(None, "conv_0007", KEY)]), KEY)
    left = asked.leave_out(world.tables).left(tables)
    gone = set(tables.messages["conversation_id"]) - set(left.messages["conversation_id"])
    assert gone == {"aurora/conv_0007"}


def test_another_key_is_refused(world: World) -> None:
    world.erase()
    with pytest.raises(LedgerError, match="another user key"):
        erasures.subjects(world.ledger, key_check(b"another key"))


class Killed(BaseException):
    """A process that ends between two writes."""


def _killed_at(write: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lets that many changes of the disk through and then ends the process; what counts is renaming, removing, committing."""
    done = [0]

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        def change(*args: Any, **kwargs: Any) -> Any:
            if done[0] == write:
                raise Killed
            done[0] += 1
            return original(*args, **kwargs)

        return change

    for owner, name in ((os, "replace"), (os, "unlink"), (shutil, "rmtree"), (Path, "unlink")):
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))
    return done


def _interrupted(filled: Path, folder: Path, write: int, gone: list[str]) -> tuple[dict[str, str], bool]:
    """What the store holds after an erasure that was killed at a write and then done again; and whether it was killed."""
    shutil.copytree(filled, folder, symlinks=True)
    world, killed = World(folder), False
    with pytest.MonkeyPatch.context() as patch:
        _killed_at(write, patch)
        try:
            world.erase()
        except Killed:
            killed = True
    world.erase()
    (done,) = erasures.all_erasures(world.ledger)
    assert done.completed_at
    assert done.removed["messages"] == 11
    assert erasures.retrain_due(world.ledger, "dental")
    assert not [one for one in gone for text in world.texts().values() if one in text], write
    texts = {name: text for name, text in world.texts().items() if ".tmp-" not in name and not name.endswith(TOMBSTONE)}
    return {name: _timeless(name, text) for name, text in texts.items()}, killed


def _timeless(name: str, text: str) -> str:
    return "\n".join(line for line in text.splitlines() if '"created_at"' not in line) if name.endswith("manifest.json") else text


@pytest.mark.parametrize("writes", [range(5, 60, 18), pytest.param(range(200), marks=SLOW)], ids=["some", "every"])
def test_killed_between_any_two_writes(filled: tuple[Path, str], tmp_path: Path, writes: range) -> None:
    gone = needles(read_source([str(filled[0] / "source")]))
    whole, killed = _interrupted(filled[0], tmp_path / "whole", 10_000, gone)
    assert not killed
    for write in writes:
        found, killed = _interrupted(filled[0], tmp_path / str(write), write, gone)
        assert found == whole, write
        shutil.rmtree(tmp_path / str(write))
        if not killed:
            return
    assert writes.stop < 100, "the erasure makes more writes than were tried"


def test_sample_tables_of_dagster_lose_the_rows(world: World, tmp_path: Path) -> None:
    week = exports.at().date().isoformat()
    (tmp_path / "dagster").mkdir()
    with dg.DagsterInstance.local_temp(str(tmp_path / "dagster")) as instance:
        for table in ("conversations",):
            rows = sample_table(world.store, table, week, rows=20)
            assert dg.materialize([_shows(rows, table)], instance=instance).success
        traces = find_traces(world.store, user_subject(GONE, KEY), KEY)
        assert forget(instance, erasure.Needles.of(traces)) >= 2  # in the index and in the run's own file
        event = instance.get_latest_materialization_event(dg.AssetKey("conversations"))
        assert event is not None
        assert event.asset_materialization is not None
        records = event.asset_materialization.metadata["sample"].value.records  # type: ignore[union-attr]
        assert sum(record.data["messages"] == "[erased]" for record in records) == 2
        assert sum("mensaje" in str(record.data) or "Claro" in str(record.data) for record in records) == 18
    raw = b"".join(path.read_bytes() for path in (tmp_path / "dagster").rglob("*") if path.is_file())
    assert not [one for one in needles(world.tables) if len(one) > 20 and json.dumps(one)[1:-1].encode() in raw]


def _shows(rows: dg.TableMetadataValue, name: str) -> dg.AssetsDefinition:
    @dg.asset(name=name)
    def shown() -> dg.MaterializeResult:  # type: ignore[type-arg]
        return dg.MaterializeResult(metadata={"sample": rows})

    return shown


def test_the_source_resource_leaves_out_who_was_erased(world: World, tmp_path: Path) -> None:
    world.erase()
    resource = LedgerResource(url=f"sqlite:///{tmp_path / 'ledger.db'}")
    tables = SourceResource(urls=[str(tmp_path / "source")]).read(resource.erased(KEY))
    assert GONE not in tables.conversations["user_id"]


def _finetune(home: Path, *words: str, extra: dict[str, str] | None = None, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "finetune_assets.cli", "erase", *words],
        cwd=ROOT,
        env={**os.environ, "FINETUNE_HOME": str(home), "FINETUNE_USER_KEY": KEY.decode(), **(extra or {})},
        capture_output=True,
        text=True,
        check=False,
        **options,
    )


@pytest.mark.slow
def test_the_command(world: World) -> None:
    home = world.store.home
    asked = _finetune(home, "--user", GONE, stdin=subprocess.DEVNULL)
    assert asked.returncode == 2
    assert "3 conversations" in asked.stderr
    assert "--yes" in asked.stderr
    refused = _finetune(home, "--user", GONE, "--yes", "--limit", "2")
    assert refused.returncode == 1
    assert "--limit 3" in refused.stderr
    assert _finetune(home, "--user", GONE, "--json").returncode == 2
    seen = json.loads(_finetune(home, "--user", GONE, "--dry-run", "--json").stdout)
    assert seen["rows"]["conversations"] == 3
    process = subprocess.Popen(
        [sys.executable, "-m", "finetune_assets.cli", "erase", "--user", GONE, "--yes"],
        cwd=ROOT,
        env={**os.environ, "FINETUNE_HOME": str(home), "FINETUNE_USER_KEY": KEY.decode()},
    )
    while process.poll() is None and not list((home / "datasets").glob(f"*/*/{TOMBSTONE}")):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = json.loads(_finetune(home, "--user", GONE, "--yes", "--json").stdout)
    assert done["state"] == "erased"
    assert not [one for one in needles(world.tables) for text in world.texts().values() if one in text]
    assert json.loads(_finetune(home, "--json").stdout)["erasures"][0]["removed"]["conversations"] == 3


def ask(source: Path, *rows: dict[str, str | None]) -> None:
    """The table of requests in a folder of exports."""
    names = ("user_id", "conversation_id", "requested_at")
    pl.DataFrame([{name: row.get(name) for name in names} for row in rows], schema=dict.fromkeys(names, pl.String)).write_parquet(
        source / "erasure_requests.parquet"
    )


def test_requests_of_a_source_are_left_out_of_builds_recorded_once_and_applied(world: World, tmp_path: Path) -> None:
    source, book = SourceResource(urls=[str(tmp_path / "source")]), LedgerResource(url=f"sqlite:///{tmp_path / 'ledger.db'}")
    assert book.erased(KEY, source.requests()).subjects == frozenset()  # a source without the table asks for nothing
    conversation = world.tables.conversations["conversation_id"][20]
    ask(tmp_path / "source", {"user_id": f" {GONE} "}, {"user_id": GONE}, {"conversation_id": conversation})
    for _ in range(2):
        tables = source.read(book.erased(KEY, source.requests()))
        assert GONE not in tables.conversations["user_id"]
        assert conversation not in tables.conversations["conversation_id"]
    waiting = erasures.all_erasures(world.ledger)
    assert len(waiting) == 2
    assert all(one.waits and one.origin == "source" for one in waiting)

    done = world.erase()
    assert done["rows"]["conversations"] == 3
    applied = erasures.find(world.ledger, user_subject(GONE, KEY))
    assert applied is not None
    assert not applied.waits
    assert applied.completed_at is not None
    assert applied.removed["conversations"] == 3  # what was removed is on record, though the request came first
    assert book.erased(KEY, source.requests()).subjects == {one.subject for one in waiting}
    assert erasures.find(world.ledger, applied.subject) == applied  # read again, it is not opened again


def test_a_request_that_names_nobody_stops_the_read(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source")
    ask(source, {"user_id": GONE}, {"user_id": "  ", "requested_at": "2026-10-01"})
    with pytest.raises(SourceError, match="row 2 names neither"):
        SourceResource(urls=[str(source)]).requests()


def test_an_id_that_nobody_has_is_told(world: World, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    source = world.store.home.parent / "source"
    for name, value in {"HOME": world.store.home, "USER_KEY": KEY.decode(), "SOURCE": source}.items():
        monkeypatch.setenv(f"FINETUNE_{name}", str(value))
    monkeypatch.setenv("DAGSTER_HOME", str(ROOT))

    def told(*words: str) -> str:
        main(["erase", *words], standalone_mode=False)
        return "".join(capfd.readouterr())

    mistyped = told("--user", GONE[:-1], "--yes")
    assert "nothing of this subject is in the store." in mistyped
    assert "Nor has the source a conversation of it. Is the id mistyped?" in mistyped
    assert "Nothing was found, and nothing erased." in mistyped
    assert "Erased." not in mistyped
    assert '"found": false' in told("--conversation", "nowhere", "--dry-run", "--json")
    ask(source, {"user_id": GONE})
    assert "Erased." in told("--user", GONE, "--yes")
    assert "it was erased before" in (again := told("--user", GONE, "--yes"))
    assert "mistyped" not in again
    monkeypatch.setenv("FINETUNE_HOME", str(world.store.home.parent / "fresh"))
    assert "The source has 3 conversation(s) of it, which no build has read." in told("--user", GONE, "--yes")
    monkeypatch.setenv("FINETUNE_SOURCE", str(source / "nowhere"))
    assert "cannot be told: Source" in told("--user", "ana", "--yes")


@pytest.mark.slow
def test_the_command_for_requests(world: World) -> None:
    home, source = world.store.home, world.store.home.parent / "source"
    first = world.tables.conversations["conversation_id"][20]
    ask(source, {"user_id": GONE}, {"conversation_id": first})
    environment = {"FINETUNE_SOURCE": str(source)}
    refused = _finetune(home, "--requests", "--yes", "--limit", "1", "--json", extra=environment)
    assert refused.returncode == 1
    told = json.loads(refused.stdout)
    assert len(told["refused"]) == len(told["erased"]) == 1  # the others are not kept waiting
    done = json.loads(_finetune(home, "--requests", "--yes", "--json", extra=environment).stdout)
    assert [one["rows"]["conversations"] for one in done["erased"]] == [3]
    assert json.loads(_finetune(home, "--requests", "--yes", "--json", extra=environment).stdout) == {"erased": [], "refused": []}
    assert not [one for one in needles(world.tables) for text in world.texts().values() if one in text]
