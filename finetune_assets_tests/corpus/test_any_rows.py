"""Whatever rows a platform exports: no error, nothing lost, nothing twice, and what is stored can be read again.

Any Unicode with lone surrogates and NUL, messages of a megabyte, dates from 1900 to 9999, deep nesting, wrong types; and a crash
between any two writes on the way from a source to its data set.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import polars as pl
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from finetune_assets.assistants import Assistant
from finetune_assets.corpus.examples import build_examples
from finetune_assets.corpus.ingest import ingest_conversations, ingest_feedback, stale_weeks
from finetune_assets.corpus.sources import SourceTables, read_source
from finetune_assets.dataset import choose, freeze, latest, load_staged, stage
from finetune_assets.dataset.selection import judge
from finetune_assets.storage import Store, read_json
from finetune_assets_tests.corpus.exports import KEY, Row, at, export, judgement, made
from finetune_assets_tests.dataset.small_corpus import sentence

Tables = dict[str, list[Row]]


def nested(depth: int) -> Any:
    value: Any = "x"
    for number in range(depth):
        value = [value] if number % 2 else {"a": value}
    return value


TEXTS = st.one_of(
    st.text(st.characters(), max_size=20),  # surrogates and NUL are characters
    st.sampled_from(["\ud800", "a\x00b", "\ufffd", "\u200b", "\u202e", "mi correo es ana@example.org", "{{", "[PHONE_2]", ""]),
    st.builds(lambda text, times: text * times, st.sampled_from(["hola ", "ñ😀", "612345678 ", "a@b.es "]), st.just(150_000)),
)
TIMES = st.one_of(
    st.datetimes(datetime(1900, 1, 1), datetime(9999, 12, 31), timezones=st.just(UTC)).map(lambda time: time.isoformat()),
    st.sampled_from(["1900-01-01T00:00:00Z", "9999-12-31T23:59:59.999999+14:00", "0001-01-01", "24:00", "2026-02-30T10:00:00Z"]),
    st.integers(-(2**70), 2**70),
)
WRONG = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**30), 10**30),
    st.floats(),
    TEXTS,
    TIMES,
    st.integers(1, 150).map(nested),
    st.dictionaries(st.text(max_size=3), st.none(), max_size=2),
)


@st.composite
def hostile(draw: st.DrawFn) -> Tables:
    """An ordinary export of which some cells hold anything, some are missing, and some rows are there twice."""
    tables = export(4)
    for rows in tables.values():
        for row in rows:
            for name in draw(st.lists(st.sampled_from(sorted(row)), max_size=2)):
                if draw(st.booleans()):
                    row[name] = draw(TEXTS if name in ("content", "expected_response", "comment") else WRONG)
                elif name not in ("conversation_id", "message_id", "feedback_id"):
                    row[name] = None
        rows += [dict(rows[n]) for n in draw(st.lists(st.integers(0, len(rows) - 1), max_size=2))]
    return tables


def written(folder: Path, tables: Tables) -> Path:
    folder.mkdir(parents=True)
    for table, rows in tables.items():
        lines = (json.dumps(row, default=lambda value: value.isoformat()) for row in rows)
        (folder / f"{table}.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return folder


def build(store: Store, source: SourceTables) -> list[str]:
    weeks = stale_weeks(store, source).stale
    ingest_conversations(store, source, weeks, KEY)
    ingest_feedback(store, source, weeks, KEY)
    build_examples(store, weeks)
    return weeks


@settings(max_examples=8, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(hostile(), st.randoms(use_true_random=False))
def test_any_export_is_read_counted_and_stored_whole(tables: Tables, shuffle: random.Random) -> None:
    with TemporaryDirectory() as folder:
        home = Path(folder)
        store, source = Store(home / "home"), read_source([str(written(home / "source", tables))])
        build(store, source)
        read = dict.fromkeys(tables, 0)
        counted = [read_json(path) for path in (store.home / "corpus").rglob("*counts.json")]
        for numbers in counted:
            for table in set(numbers["read"]) & set(tables):
                assert numbers["read"][table] == numbers["kept"][table] + numbers["dropped"][table]
                read[table] += numbers["read"][table]
        assert read == {table: len(rows) for table, rows in tables.items()}
        for path in store.home.rglob("part.parquet"):
            text = json.dumps(pl.read_parquet(path).to_dicts(), ensure_ascii=False, default=str)
            assert "\x00" not in text
            assert "ana@example.org" not in text
            text.encode()  # no lone surrogate
        assert stale_weeks(store, read_source([str(home / "source")])).stale == []
        mixed = {table: shuffle.sample(rows, len(rows)) for table, rows in tables.items()}
        other = Store(home / "other")
        build(other, read_source([str(written(home / "mixed", mixed))]))
        assert made(other.home) == made(store.home)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_feedback_in_any_order_says_the_same_by_the_stated_rule(data: st.DataObject) -> None:
    """A correction counts, the newest one; else the newest thumb, of two at one instant the bad one."""
    given_ = data.draw(
        st.lists(
            st.tuples(
                st.sampled_from(["positive", "negative"]),
                st.sampled_from([None, " ", "mensaje 1", "Mejor así.", "O así, mejor."]),
                st.integers(0, 3),
            ),
            min_size=1,
            max_size=6,
        )
    )
    rows = [
        judgement(n, 1, 0, feedback_type=kind, expected_response=text, created_at=at(minutes=60 + minute))
        for n, (kind, text, minute) in enumerate(given_)
    ]
    examples = pl.DataFrame({"message_id": ["msg_0001"], "reply": ["mensaje 1"], "tenant_id": ["clinic_a"]})
    orders = [rows, data.draw(st.permutations(rows))]
    columns = ("feedback_id", "tenant_id", "message_id", "feedback_type", "expected_response", "created_at")
    types = {"expected_response": pl.String}
    frames = [pl.DataFrame([{name: row[name] for name in columns} for row in order], schema_overrides=types) for order in orders]
    one, other = (judge(examples, frame, ["clinic_a"]).messages.row(0, named=True) for frame in frames)
    assert one == other
    corrections = [(minute, text) for _, text, minute in given_ if text and text.strip() not in ("", "mensaje 1")]
    newest = max(minute for _, _, minute in given_)
    last = {kind for kind, _, minute in given_ if minute == newest}
    assert one["verdict"] == ("negative" if "negative" in last else "positive")
    if corrections:
        latest_ones = {text for minute, text in corrections if minute == max(minute for minute, _ in corrections)}
        assert one["expected"] in latest_ones
    else:
        assert one["expected"] is None


# --- a crash between any two writes


def spoken(extra: int = 0) -> Tables:
    tables = export(24 + extra, 2)
    for number, row in enumerate(tables["messages"]):
        row["content"] = f"{'¿' if row['role'] == 'user' else 'Claro, '}{sentence(number, 'said')}"
    tables["messages"][1]["content"] += " Mi correo es ana@example.org" + "." * extra
    tables["feedback"] = [judgement(n, 4 * n + 1, 2 * n, feedback_type="positive") for n in range(6)]
    tables["feedback"][0] |= {"feedback_type": "negative", "expected_response": f"Mejor {sentence(1, 'better')}"}
    return tables


def dental() -> Assistant:
    return Assistant(name="dental", select={"vertical": "dental"}, min_examples=1, minimum={"train_rows": 1})


def everything(store: Store, source: Path) -> str:
    """From the source to the frozen data set; its fingerprint."""
    build(store, read_source([str(source)]))
    stage(store, dental(), choose(store, dental()))
    return freeze(store, dental(), load_staged(store, dental()))["fingerprint"]


class Killed(BaseException):
    """What ends the process, as far as the code can tell."""


def dying(writes: int) -> tuple[Callable[..., None], list[int]]:
    rename, done = os.replace, [0]

    def replace(*paths: Any) -> None:
        if done[0] == writes:
            raise Killed
        done[0] += 1
        rename(*paths)

    return replace, done


EVERY = [(1, 9), *(pytest.param(first, 4, marks=pytest.mark.slow) for first in range(4))]


@pytest.mark.parametrize(("first", "step"), EVERY)
def test_a_crash_between_any_two_writes_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: int, step: int
) -> None:
    """Each of these writes is the last one of some run; the next run ends where an undisturbed one does."""
    old, new = written(tmp_path / "old", spoken()), written(tmp_path / "new", spoken(2))
    clean = Store(tmp_path / "clean")
    everything(clean, new)
    wanted = made(clean.home / "corpus")
    mark = latest(clean, "dental")
    writes = first
    while True:
        store = Store(tmp_path / f"home{writes}")
        everything(store, old)
        replace, done = dying(writes)
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replace)
            try:
                everything(store, new)
            except Killed:
                pass
            else:
                break
        assert done == [writes]
        found = latest(store, "dental")
        assert found is not None
        assert read_json(found / "manifest.json")["fingerprint"] == found.name
        assert mark is not None
        assert everything(store, new) == mark.name
        corpus = {name: text for name, text in made(store.home / "corpus").items() if not name.startswith("index/")}
        assert corpus == {name: text for name, text in wanted.items() if not name.startswith("index/")}
        assert stale_weeks(store, read_source([str(new)])).stale == []
        writes += step
    assert writes >= 16
