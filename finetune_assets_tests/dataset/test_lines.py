"""Lines are what `json.dumps` writes, and both layouts hold the same contexts and targets."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_assets.corpus.examples import make_examples
from finetune_assets.corpus.schema import CONVERSATIONS, EXAMPLES
from finetune_assets.dataset import check_leaks, choose, freeze
from finetune_assets.dataset.formats import FILES, read_lines, read_targets, trim_context
from finetune_assets.dataset.lines import LayoutNote, lines_of
from finetune_assets.environment import ROOT
from finetune_assets.storage import Store
from finetune_assets.training.encoding import LightRenderer, encode_row
from finetune_assets_tests.dataset.small_corpus import START, Corpus, dental, sentence

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
BREAKS = {"\u2028": "\\u2028", "\u2029": "\\u2029", "\x85": "\\u0085"}


def dumped(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).translate(str.maketrans(BREAKS))


@settings(max_examples=60, deadline=None)
@given(system=TEXTS, context=st.lists(TEXTS, min_size=1, max_size=4), replies=st.tuples(TEXTS, TEXTS), label=st.booleans())
def test_lines_are_what_json_dumps_writes(system: str, context: list[str], replies: tuple[str, str], label: bool) -> None:
    turns = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(context)]
    one, other = replies
    row = {"message_id": "m", "split": "train", "context": turns, "reply": one, "chosen": one, "rejected": other}
    frame = pl.DataFrame([row | {"completion": other, "label": label}])
    head = [{"role": "system", "content": system}] if system else []
    said = [{"role": "assistant", "content": text} for text in replies]
    expected = {
        "examples": {"messages": [*head, *turns, said[0]]},
        "preferences": {"prompt": [*head, *turns], "chosen": said[:1], "rejected": said[1:]},
        "kto": {"prompt": [*head, *turns], "completion": said[1:], "label": label},
    }
    for kind, value in expected.items():
        line = lines_of(kind, frame, system)["jsonl"].item()
        assert line == dumped(value)
        assert len(line.splitlines()) == 1


@st.composite
def conversations(draw: st.DrawFn) -> tuple[pl.DataFrame, set[str], dict[str, str]]:
    """Conversations of random speakers, the message ids that are kept, and the corrected texts of some."""
    rows, ids = [], []
    for number in range(draw(st.integers(1, 3))):
        at = START + datetime.timedelta(days=number)
        messages = []
        for place in range(draw(st.integers(1, 9))):
            ids.append(f"m{number}_{place}")
            role = draw(st.sampled_from(("user", "assistant")))
            text = draw(st.sampled_from(("sí", 'di "no"', "vale", "a\nb", "¿y a las 10?")))
            when = at + datetime.timedelta(minutes=place)
            messages.append({"message_id": ids[-1], "role": role, "content": text, "intent": None, "created_at": when})
        rows.append(
            {
                **{"conversation_id": f"c{number}", "tenant_id": "t", "user": f"u{number}", "bucket": 9999, "vertical": "dental"},
                **{"channel": "web", "satisfaction_score": 5, "training_consent": True, "kind": "conversation", "started_at": at},
                **{"ended_at": at, "messages": messages},
            }
        )
    kept = {one for one in ids if draw(st.booleans())}
    corrected = {one: f"Corrección de {one}" for one in sorted(kept) if draw(st.integers(0, 3)) == 0}
    return pl.DataFrame(rows, schema=CONVERSATIONS), kept, corrected


def expanded(lines: pl.DataFrame) -> list[tuple[str, str]]:
    """(context, target) of each trained message; the context without weights."""
    found = []
    for line in lines["jsonl"].drop_nulls():
        messages = json.loads(line)["messages"]
        weighted = any("weight" in message for message in messages)
        targets = [at for at, m in enumerate(messages) if m.get("weight") == 1] if weighted else [len(messages) - 1]
        assert not weighted or all(("weight" in m) == (m["role"] == "assistant") for m in messages)
        said = [[m["role"], m["content"]] for m in messages]
        found.extend((dumped(said[:at]), said[at][1]) for at in targets)
    return sorted(found)


@settings(max_examples=150, deadline=None)
@given(conversations(), st.integers(1, 8), st.sampled_from(("", "Eres amable.")))
def test_both_layouts_hold_the_same_contexts_and_targets(
    talk: tuple[pl.DataFrame, set[str], dict[str, str]], turns: int, system: str
) -> None:
    stored, kept, corrected = talk
    examples = make_examples(stored)[0].filter(pl.col("message_id").is_in(list(kept)))
    frame = trim_context(examples, turns, 4000).with_columns(
        reply=pl.col("message_id").replace_strict(corrected, default=pl.col("reply"), return_dtype=pl.String),
        source=pl.lit("satisfied"),
        split=pl.lit("train"),
    )
    one, many = (lines_of("examples", frame, system, layout) for layout in ("per_reply", "per_conversation"))
    assert expanded(one) == expanded(many)
    assert many["jsonl"].drop_nulls().len() <= one.height == many.height
    for message, turn in many.select("message_id", "turn").rows():
        assert turn == len(frame.filter(pl.col("message_id") == message)["context"].item()) + bool(system), message
    if frame.height:
        layouts = LayoutNote(system)
        layouts.add(frame)
        note = layouts.told()
        assert note["per_conversation"]["rows"] == many["jsonl"].drop_nulls().len()
        sizes = {
            name: sum(len(m["content"]) for line in made["jsonl"].drop_nulls() for m in json.loads(line)["messages"])
            for name, made in (("per_reply", one), ("per_conversation", many))
        }
        assert {name: note[name]["characters"] for name in sizes} == sizes


def example(number: int, turns: list[str], reply: str, **given: Any) -> dict[str, Any]:
    context = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(turns)]
    when = START + datetime.timedelta(minutes=number)
    row = dict.fromkeys(EXAMPLES) | {"message_id": f"m{number}", "conversation_id": "c", "context": context, "reply": reply}
    return row | {"created_at": when, "split": "train", "source": "satisfied"} | given


def test_a_correction_is_a_target_and_never_a_context() -> None:
    rows = [
        example(1, ["u1"], "r1"),
        example(2, ["u1", "r1", "u2"], "mejor r2", source="corrected"),
        example(3, ["u1", "r1", "u2", "r2", "u3"], "r3"),
        example(4, ["u1", "r1", "u2", "r2", "u3", "r3", "u4"], "r4"),
    ]
    lines = lines_of("examples", pl.DataFrame(rows, schema_overrides=EXAMPLES), "", "per_conversation")
    said = sorted(
        [[(m["content"], m.get("weight")) for m in json.loads(line)["messages"]] for line in lines["jsonl"].drop_nulls()]
    )
    assert said == [
        [("u1", None), ("r1", 0), ("u2", None), ("r2", 0), ("u3", None), ("r3", 1), ("u4", None), ("r4", 1)],
        [("u1", None), ("r1", 1), ("u2", None), ("mejor r2", 1)],
    ]


def talks(corpus: Corpus, count: int = 60) -> Store:
    """Conversations of three replies each, one of them rated badly and corrected in every fifth."""
    for number in range(count):
        turns: list[dict[str, str]] = []
        for step in range(3):
            at = number * 3 + step
            turns.append({"role": "user", "content": f"¿{sentence(at, 'user')}?"})
            reply = f"Claro, {sentence(at, 'reply')}."
            message = corpus.example(
                at,
                user=f"u_{number}",
                bucket=number * 10_000 // count,
                conversation_id=f"conv_{number}",
                context=list(turns),
                user_text=turns[-1]["content"],
                reply=reply,
                started_at=START + datetime.timedelta(hours=number),
                created_at=START + datetime.timedelta(hours=number, minutes=step),
            )
            turns.append({"role": "assistant", "content": reply})
            if number % 5 == 0 and step == 1:
                corpus.rate(message, "negative", f"Corrección {number}: {sentence(number, 'fix')}")
    return corpus.write()


def test_rows_per_conversation_are_frozen_with_the_lineage_of_each_target(corpus: Corpus) -> None:
    store = talks(corpus)
    folders: dict[str, Path] = {}
    for rows in ("per_reply", "per_conversation"):
        assistant = dental(rows=rows)
        folders[rows] = store.dataset("dental", freeze(store, assistant, choose(store, assistant))["fingerprint"])
        assert check_leaks(folders[rows]) == []
    assert folders["per_reply"] != folders["per_conversation"]
    texts: dict[str, dict[str, Any]] = {}
    for rows, folder in folders.items():
        lineage = pl.read_parquet(folder / "lineage.parquet")
        for spec in FILES[:3]:
            targets = read_targets(folder, spec)
            origin = lineage.filter(pl.col("split") == spec.splits[0]).sort("line", "turn")
            assert origin.select("line", "turn").equals(targets.select("line", "turn"))
            texts.setdefault(rows, {}).update(zip(origin["message_id"], targets.select("user_text", "reply").rows(), strict=True))
    assert texts["per_reply"] == texts["per_conversation"]
    assert len(texts["per_reply"]) == 180
    assert (folders["per_reply"] / "test.jsonl").read_bytes() == (folders["per_conversation"] / "test.jsonl").read_bytes()
    manifest = json.loads((folders["per_conversation"] / "manifest.json").read_text())
    assert manifest["layout"]["saved_by_per_conversation"] == pytest.approx(0.5, abs=0.15)
    train = (folders["per_conversation"] / "train.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(train) == manifest["layout"]["per_conversation"]["rows"] < manifest["layout"]["per_reply"]["rows"]


def test_both_layouts_train_the_same_tokens_and_one_costs_fewer(corpus: Corpus) -> None:
    """As the worker encodes them: the same targets, each once, in rows that share their contexts."""
    store = talks(corpus)
    renderer = LightRenderer(ROOT / "data" / "base_model")
    trained: dict[str, list[list[int]]] = {}
    tokens: dict[str, int] = {}
    for rows in ("per_reply", "per_conversation"):
        assistant = dental(rows=rows)
        folder = store.dataset("dental", freeze(store, assistant, choose(store, assistant))["fingerprint"])
        encoded = [e for line in read_lines(folder / "train.jsonl") for e in encode_row(renderer, line["messages"], 4096)]
        trained[rows] = sorted(part for ids, mask, _ in encoded for part in _targets(ids, mask))
        tokens[rows] = sum(len(ids) for ids, _, _ in encoded)
    assert trained["per_reply"] == trained["per_conversation"]
    assert tokens["per_conversation"] < 0.7 * tokens["per_reply"]


def _targets(ids: list[int], mask: list[int]) -> list[list[int]]:
    """The runs of tokens that are targets."""
    runs: list[list[int]] = []
    for at, (token, target) in enumerate(zip(ids, mask, strict=True)):
        if target:
            if not at or not mask[at - 1]:
                runs.append([])
            runs[-1].append(token)
    return runs
