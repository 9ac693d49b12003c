from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from finetune_assets import storage
from finetune_assets.corpus import index, ingest
from finetune_assets.corpus.cells import typed
from finetune_assets.corpus.examples import build_examples
from finetune_assets.corpus.ingest import ingest_conversations, ingest_feedback, stale_weeks
from finetune_assets.corpus.parts import Part
from finetune_assets.corpus.sources import read_source
from finetune_assets.corpus.spool import Spool, size_of
from finetune_assets.errors import SourceError
from finetune_assets.storage import Store
from finetune_assets_tests.corpus.exports import (
    KEY,
    Row,
    at,
    conversation,
    everything_under,
    judgement,
    made,
    message,
    write_table,
)

Tables = dict[str, list[Row]]


def week_of(number: int) -> Tables:
    """Two conversations in the week, and a judgement on a message of the week before."""
    c, m = number * 2, number * 8
    tables: Tables = {
        "conversations": [conversation(c + n, started_at=at(weeks=number), ended_at=None) for n in range(2)],
        "messages": [message(m + n, c + n // 4, created_at=at(weeks=number, minutes=n)) for n in range(8)],
        "feedback": [],
    }
    if number:
        tables["feedback"] = [judgement(number, m - 7, c - 2, created_at=at(weeks=number), comment="ana@example.org")]
    return tables


def write_week(folder: Path, number: int, tables: Tables | None = None) -> None:
    for table, rows in (tables or week_of(number)).items():
        (folder / table).mkdir(parents=True, exist_ok=True)
        write_table(folder / table / f"{number}.jsonl", table, rows)


def export(folder: Path, weeks: int) -> Path:
    for number in range(weeks):
        write_week(folder, number)
    return folder


def update(store: Store, folder: Path) -> list[str]:
    return update_all(store, [folder])


def update_all(store: Store, folders: list[Path]) -> list[str]:
    source = read_source([str(folder) for folder in folders])
    weeks = stale_weeks(store, source).stale
    ingest_conversations(store, source, weeks, KEY)
    ingest_feedback(store, source, weeks, KEY)
    build_examples(store, weeks)
    return weeks


@pytest.fixture
def read_parts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files whose rows are read."""
    names: list[str] = []
    read = Part.read

    def noted(part: Part) -> Any:
        names.append("/".join(Path(part.place).parts[-2:]).removesuffix(".jsonl"))
        return read(part)

    monkeypatch.setattr(Part, "read", noted)
    return names


def test_a_new_week_reads_its_own_files_and_the_conversations_it_judges(tmp_path: Path, read_parts: list[str]) -> None:
    store = Store(tmp_path / "home")
    update(store, export(tmp_path / "source", 9))
    read_parts.clear()
    write_week(tmp_path / "source", 9)
    assert update(store, tmp_path / "source") == ["2026-11-02", "2026-11-09"]  # the judged week's placeholders may change
    tables = ("conversations", "messages", "feedback")
    judged = ["conversations/7", "messages/7"]  # what week 8's feedback is about
    assert sorted(read_parts) == sorted([*(f"{table}/{n}" for table in tables for n in (8, 9)), *judged])
    read_parts.clear()
    assert update(store, tmp_path / "source") == []
    assert read_parts == []
    whole = Store(tmp_path / "whole")
    update(whole, tmp_path / "source")
    assert made(store.home) == made(whole.home)


def undated_week(number: int) -> Tables:
    """`week_of` with rows that have no usable time: a conversation and its message, an orphan, a judgement."""
    tables = week_of(number)
    none = {"created_at": None}
    tables["conversations"] += [conversation(500 + number, started_at=None, ended_at=None, user_id="user_x")]
    tables["messages"] += [message(500 + number, 500 + number, **none), message(700 + number, 700 + number, **none)]
    tables["feedback"] += [judgement(500 + number, number * 8 + 5, number * 2 + 1, conversation_id=None, **none)]
    return tables


@pytest.mark.parametrize("weeks", [3, 8])
def test_rows_without_a_week_are_read_once(tmp_path: Path, read_parts: list[str], weeks: int) -> None:
    store, folder = Store(tmp_path / "home"), tmp_path / "source"
    for number in range(weeks):
        write_week(folder, number, undated_week(number))
    update(store, folder)
    read_parts.clear()
    write_week(folder, weeks, undated_week(weeks))
    update(store, folder)
    assert {int(name.split("/")[1]) for name in read_parts} == {weeks - 2, weeks - 1, weeks}  # as many as without such rows
    assert len(read_parts) == 8
    unknown = pl.read_parquet(store.corpus("rejected", "unknown") / "conversations.parquet")
    assert unknown["table"].value_counts(sort=True).rows() == [("messages", 2 * weeks + 2), ("conversations", weeks + 1)]
    whole = Store(tmp_path / "whole")
    update(whole, folder)
    assert made(store.home) == made(whole.home)


def test_a_row_without_a_week_is_judged_again_when_what_it_belongs_to_changes(tmp_path: Path) -> None:
    store, folder = Store(tmp_path / "home"), tmp_path / "source"
    for number in range(3):
        write_week(folder, number, undated_week(number))
    update(store, folder)
    later = undated_week(1)
    later["conversations"][-1]["user_id"] = "user_y"  # its message and it are now another person's
    later["conversations"].append(conversation(701, started_at=at(weeks=1), ended_at=None))  # the orphan has a week
    write_week(folder, 1, later)
    update(store, folder)
    rejected = pl.read_parquet(store.corpus("rejected", "unknown") / "conversations.parquet")
    assert rejected.filter(pl.col("id") == "msg_0701").is_empty()
    assert rejected.filter(pl.col("conversation_id") == "conv_0501")["user"].n_unique() == 1
    assert rejected["user"].drop_nulls().n_unique() == 2
    whole = Store(tmp_path / "whole")
    update(whole, folder)
    assert made(store.home) == made(whole.home)


def test_a_touched_file_of_equal_bytes_is_not_read_and_one_of_equal_size_and_time_only_by_a_full_check(
    tmp_path: Path, read_parts: list[str]
) -> None:
    store, folder = Store(tmp_path / "home"), export(tmp_path / "source", 2)
    update(store, folder)
    read_parts.clear()
    path = folder / "messages" / "0.jsonl"
    os.utime(path, (1, 1))
    assert stale_weeks(store, read_source([str(folder)])).stale == []
    assert read_parts == []
    path.write_text(path.read_text().replace("mensaje 1", "mensaje X"))
    os.utime(path, (1, 1))
    assert stale_weeks(store, read_source([str(folder)])).stale == []
    assert stale_weeks(store, read_source([str(folder)]), full=True).conversations == ["2026-09-07"]


def test_rows_that_move_between_files_make_nothing_stale(tmp_path: Path) -> None:
    store, folder = Store(tmp_path / "home"), export(tmp_path / "source", 3)
    update(store, folder)
    for table in ("conversations", "messages", "feedback"):
        files = sorted((folder / table).glob("*.jsonl"))
        whole = "".join(path.read_text() for path in reversed(files))
        for path in files:
            path.unlink()
        (folder / table / "all.jsonl").write_text(whole)
    assert stale_weeks(store, read_source([str(folder)])).stale == []


def test_a_row_that_comes_late_and_repeats_an_id_of_another_week_is_seen(tmp_path: Path) -> None:
    store, folder = Store(tmp_path / "home"), export(tmp_path / "source", 6)
    update(store, folder)
    early = conversation(10, started_at=at(), ended_at=None)  # the id of one of week 5, now begun in week 0
    write_table(folder / "conversations" / "late.jsonl", "conversations", [early])
    assert update(store, folder) == ["2026-09-07", "2026-10-12"]
    whole = Store(tmp_path / "whole")
    update(whole, folder)
    assert made(store.home) == made(whole.home)


@pytest.mark.parametrize("first", ["a", "b"])
def test_conversations_of_two_tenants_with_one_id_are_dropped_in_both_weeks_until_one_vanishes(
    tmp_path: Path, first: str
) -> None:
    others = [tmp_path / "others"]
    export(others[0], 6)
    for name, number in (("a", 0), ("b", 3)):
        own = conversation(70, tenant_id=f"clinic_{name}", started_at=at(weeks=number), ended_at=None)
        said = [message(n, 70, message_id=f"{name}{n}", content=f"de {name}", created_at=at(weeks=number + n)) for n in range(3)]
        write_week(tmp_path / name, number, {"conversations": [own], "messages": said, "feedback": []})
    store = Store(tmp_path / "home")

    def settled(*names: str) -> set[str]:
        """Whose messages are stored, the same as if all had come at once."""
        folders = [tmp_path / name for name in names] + others
        update_all(store, folders)
        whole = Store(tmp_path / f"whole{len(names)}{len(list(tmp_path.iterdir()))}")
        update_all(whole, folders)
        assert made(store.home) == made(whole.home)
        stored = "".join(str(pl.read_parquet(file).to_dicts()) for file in store.home.glob("corpus/conversations/*/part.parquet"))
        return {name for name in ("a", "b") if f"de {name}" in stored}

    assert settled(first) == {first}
    assert settled("a", "b") == set()
    assert settled(first) == {first}


def test_the_index_holds_no_text_and_no_id(tmp_path: Path) -> None:
    store, folder = Store(tmp_path / "home"), export(tmp_path / "source", 2)
    update(store, folder)
    held = {name: text for name, text in everything_under(store.home).items() if name.startswith("corpus/index/")}
    assert len(held) >= 8
    for text in held.values():
        assert not [word for word in ("mensaje", "conv_0", "msg_0", "user_0", "example.org") if word in text]


OFTEN = (0, 1, 2, 3, 5, 8, 13)


@pytest.mark.parametrize("kill_at", [*OFTEN, *(pytest.param(n, marks=pytest.mark.slow) for n in range(30) if n not in OFTEN)])
def test_a_crash_at_any_write_then_a_rerun_gives_what_an_uninterrupted_run_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kill_at: int
) -> None:
    store, folder = Store(tmp_path / "home"), export(tmp_path / "source", 2)
    update(store, folder)
    write_week(folder, 2)
    late = [message(900, 0, content="mi correo es eva@example.org", created_at=at(minutes=3))]
    write_table(folder / "messages" / "late.jsonl", "messages", late)
    writes, replacing = 0, storage.replacing

    def dying(path: Path) -> Any:
        nonlocal writes
        writes += 1
        if writes == kill_at + 1:
            raise KeyboardInterrupt
        return replacing(path)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "replacing", dying)
        try:
            update(store, folder)
        except KeyboardInterrupt:
            assert writes == kill_at + 1
        else:
            assert kill_at > 10
    update(store, folder)
    assert stale_weeks(store, read_source([str(folder)])).stale == []
    whole = Store(tmp_path / "whole")
    update(whole, folder)
    assert made(store.home) == made(whole.home)


def test_a_source_that_breaks_off_changes_nothing(tmp_path: Path) -> None:
    store, folder = Store(tmp_path / "home"), export(tmp_path / "source", 2)
    update(store, folder)
    before = everything_under(store.home)
    write_week(folder, 2)
    with (folder / "messages" / "2.jsonl").open("a") as file:
        file.write('{"message_id": "cut o')
    with pytest.raises(SourceError, match="cut off"):
        stale_weeks(store, read_source([str(folder)]))
    assert everything_under(store.home) == before


def test_weeks_are_written_in_groups_that_fit_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = export(tmp_path / "source", 5)
    small, large = Store(tmp_path / "small"), Store(tmp_path / "large")
    update(large, folder)
    loads: list[int] = []
    load = index.Snapshot.load

    def noted(snapshot: index.Snapshot, wanted: dict[str, pl.DataFrame]) -> Any:
        loads.append(sum(frame.height for frame in wanted.values()))
        return load(snapshot, wanted)

    monkeypatch.setattr(index.Snapshot, "load", noted)
    monkeypatch.setattr(ingest, "GROUP_SHARE", 1e-9)
    monkeypatch.setattr(index, "SPOOL_SHARE", 0.0)
    update(small, folder)
    assert len(loads) == 10  # five weeks, two tables
    assert max(loads) < 25
    assert made(small.home) == made(large.home)


@pytest.mark.parametrize("held", [0, 2.5, 9])
def test_the_spool_gives_back_what_it_took_from_memory_and_from_its_file(held: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune_assets.corpus.spool.CHUNK_ROWS", 2)
    monkeypatch.setattr("finetune_assets.corpus.spool.CHUNKS", 3)
    frames = [typed(pl.DataFrame({"message_id": [f"{a}-{n}" for n in range(5)]}), "messages") for a in range(4)]
    spool = Spool(int(size_of(frames[0]) * held))
    spool.start("part")
    for frame in frames:
        spool.add("part", frame)
    whole = pl.concat(frames)
    for rows in ([0, 4, 5, 13, 19], list(range(20)), [7], list(range(3, 17)), list(range(0, 20, 3))):
        taken = pl.concat(spool.take("part", pl.Series(rows, dtype=pl.Int64).to_numpy()))
        assert taken.equals(whole[rows])
    assert pl.concat(spool.frames("part")).equals(whole)
    spool.drop("part")
    assert "part" not in spool


def test_a_judgement_without_a_text_needs_its_message_only(tmp_path: Path) -> None:
    tables: Tables = {
        "conversations": [conversation(n) for n in range(2)],
        "messages": [message(n, n // 4) for n in range(8)],
        "feedback": [judgement(0, 1, 0, expected_response=None), judgement(1, 5, 1, expected_response="Sí.")],
    }
    write_week(tmp_path / "source", 0, tables)
    snapshot = index.look(Store(tmp_path / "home"), read_source([str(tmp_path / "source")]), 2**30)
    found = snapshot.load(snapshot.closure("feedback", snapshot.weeks()))
    assert found.messages["message_id"].to_list() == [message(n, 0)["message_id"] for n in (1, 4, 5, 6, 7)]
    assert len(found.conversations) == len(found.feedback) == 2
