from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_assets.corpus.examples import MAX_TURNS, build_examples, make_examples, stale_examples
from finetune_assets.corpus.ingest import ingest_conversations
from finetune_assets.corpus.schema import CONVERSATIONS, EXAMPLES
from finetune_assets.corpus.sources import read_source
from finetune_assets.errors import DataError
from finetune_assets.storage import Store, read_json
from finetune_assets_tests.corpus.exports import KEY, at, export, write

WEEK = "2026-09-07"


def talk(*said: tuple[str, str], intents: dict[int, str] | None = None, number: int = 0) -> dict[str, Any]:
    """A stored conversation; said: (role u or a, content) in order."""
    messages = [
        {
            "message_id": f"msg_{number}_{place}",
            "role": {"u": "user", "a": "assistant"}[role],
            "content": content,
            "intent": (intents or {}).get(place),
            "created_at": at(minutes=place),
        }
        for place, (role, content) in enumerate(said)
    ]
    return {
        **dict.fromkeys(CONVERSATIONS),
        "conversation_id": f"conv_{number}",
        "tenant_id": "clinic_a",
        "user": "u_1",
        "bucket": 17,
        "vertical": "dental",
        "channel": "web",
        "satisfaction_score": 4,
        "training_consent": True,
        "kind": "conversation",
        "started_at": at(),
        "messages": messages,
    }


def examples(*talks: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, int]]:
    frame, dropped = make_examples(pl.DataFrame(list(talks), schema=CONVERSATIONS))
    assert frame.schema == EXAMPLES
    return frame.to_dicts(), dropped


def roles(example: dict[str, Any]) -> list[tuple[str, str]]:
    return [(turn["role"][0], turn["content"]) for turn in example["context"]]


def test_one_example_for_each_reply_with_what_was_said_before() -> None:
    found, dropped = examples(talk(("u", "Hola"), ("a", "Buenas"), ("u", " ¿precio? "), ("a", "50 Bs"), intents={2: "pricing"}))
    assert [(e["message_id"], e["user_text"], e["reply"], e["intent"]) for e in found] == [
        ("msg_0_1", "Hola", "Buenas", "unknown"),
        ("msg_0_3", "¿precio?", "50 Bs", "pricing"),
    ]
    assert roles(found[1]) == [("u", "Hola"), ("a", "Buenas"), ("u", "¿precio?")]
    assert (found[1]["user_chars"], found[1]["reply_chars"], found[1]["created_at"]) == (8, 5, at(minutes=3))
    assert (found[0]["bucket"], found[0]["satisfaction_score"], found[0]["tenant_id"]) == (17, 4, "clinic_a")
    assert dropped == {}


def test_messages_in_a_row_are_one_turn() -> None:
    said = [("u", "Hola"), ("u", "una cita"), ("a", "Claro"), ("a", "¿cuándo?"), ("u", "hoy"), ("a", "Listo")]
    found, _ = examples(talk(*said, intents={0: "smalltalk", 1: "scheduling"}))
    assert [(e["user_text"], e["reply"], e["intent"]) for e in found] == [
        ("Hola\nuna cita", "Claro", "scheduling"),
        ("Hola\nuna cita", "¿cuándo?", "scheduling"),
        ("hoy", "Listo", "unknown"),
    ]
    assert roles(found[1]) == [("u", "Hola\nuna cita")]
    assert roles(found[2]) == [("u", "Hola\nuna cita"), ("a", "Claro\n¿cuándo?"), ("u", "hoy")]


def test_what_comes_before_the_first_user_turn_is_no_context_and_no_example() -> None:
    found, dropped = examples(
        talk(("a", "Bienvenida"), ("a", "¿En qué ayudo?"), ("u", "cita"), ("a", "Claro")), talk(("a", "¿Sigues ahí?"), number=1)
    )
    assert [roles(e) for e in found] == [[("u", "cita")]]
    assert dropped == {"no_user_turn": 3}


def test_a_conversation_of_users_only_and_none_at_all() -> None:
    assert examples(talk(("u", "hola"), ("u", "¿hay alguien?"))) == ([], {})
    assert examples() == ([], {})


def test_long_conversations_keep_the_newest_turns() -> None:
    said = [("ua"[n % 2], f"turno {n}") for n in range(60)]
    found, _ = examples(talk(*said))
    context = roles(found[-1])
    assert len(context) == MAX_TURNS
    assert (context[0], context[-1]) == (("u", "turno 40"), ("u", "turno 58"))
    assert found[-1]["reply"] == "turno 59"


@pytest.mark.parametrize(
    ("reply", "is_error"),
    [
        ("Ocurrió un error, intenta más tarde", True),
        ("Lo siento, NO ENTIENDO su mensaje", True),
        ("Lo siento, no te entiendo", True),
        ("Disculpa, no puedo ayudarte con eso", True),
        ("I don't understand", True),
        ("Sorry, I can’t help with that", True),
        ("Desculpe, não posso ajudar", True),
        ("Não entendi", True),
        ("Entiendo, puedo ayudarte con tu cita", False),
        ("I understand, I can help with that", False),
        ("Vamos a su terror favorito", False),
    ],
)
def test_error_replies(reply: str, is_error: bool) -> None:
    found, _ = examples(talk(("u", "hola"), ("a", reply)))
    assert found[0]["error_reply"] is is_error


def test_text_keys_are_stable_and_mind_only_the_normalised_text() -> None:
    found, _ = examples(
        talk(("u", "¿Hola?"), ("a", "¡BUENAS  tardes!")),
        talk(("u", "hola"), ("a", "buenas tardes"), number=1),
        talk(("u", "hola buenas"), ("a", "tardes"), number=2),
    )
    keys = [e["text_key"] for e in found]
    assert keys[0] == keys[1] != keys[2]
    digest = hashlib.blake2b(b"hola\nbuenas tardes", digest_size=8).digest()
    assert keys[0] == int.from_bytes(digest, "little")  # stored keys of other weeks must stay comparable


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.lists(st.tuples(st.sampled_from("ua"), st.text(st.characters(exclude_categories=["Cs"]), max_size=6)), max_size=50),
        max_size=4,
    )
)
def test_any_conversation(talks: list[list[tuple[str, str]]]) -> None:
    found, dropped = examples(*(talk(*said, number=n) for n, said in enumerate(talks)))
    replies = sum(role == "a" for said in talks for role, _ in said)
    assert len(found) + sum(dropped.values()) == replies
    assert dropped.get("no_user_turn", 0) == sum(
        role == "a" and "u" not in [r for r, _ in said[:n]] for said in talks for n, (role, _) in enumerate(said)
    )
    for example in found:
        speakers = [role for role, _ in roles(example)]
        assert speakers == (["u", "a"] * 10)[: len(speakers)]
        assert len(speakers) % 2 == 1
        assert len(speakers) <= MAX_TURNS
        assert example["context"][-1]["content"] == example["user_text"]


def test_weeks_are_stale_when_their_conversations_change(tmp_path: Path) -> None:
    store = Store(tmp_path / "home")
    tables = export(3)
    ingest_conversations(store, read_source([str(write(tmp_path / "one", tables))]), [WEEK], KEY)
    assert stale_examples(store) == [WEEK]
    counts = build_examples(store, [WEEK])[WEEK]
    assert (counts["read"], counts["kept"], counts["dropped"]) == ({"examples": 6}, {"examples": 6}, {"examples": 0})
    assert read_json(store.corpus("examples", WEEK) / "counts.json") == counts
    assert stale_examples(store) == []
    before = (store.corpus("examples", WEEK) / "part.parquet").read_bytes()
    build_examples(store, [WEEK])
    assert (store.corpus("examples", WEEK) / "part.parquet").read_bytes() == before
    tables["messages"][0]["content"] = "otra cosa"
    ingest_conversations(store, read_source([str(write(tmp_path / "two", tables))]), [WEEK], KEY)
    assert stale_examples(store) == [WEEK]


def test_a_week_without_conversations_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="2026-09-07 has no finished conversations"):
        build_examples(Store(tmp_path), [WEEK])
