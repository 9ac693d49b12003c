"""A tenant's own public contacts stay in its texts and in no other's; a changed list makes the weeks of that tenant stale."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

from finetune_assets.assistants import Assistant, own_contacts
from finetune_assets.corpus.examples import build_examples
from finetune_assets.corpus.ingest import ingest_conversations, ingest_feedback, stale_weeks
from finetune_assets.corpus.sources import SourceTables, read_source
from finetune_assets.dataset import choose
from finetune_assets.errors import SettingsError
from finetune_assets.storage import Store
from finetune_assets_tests.corpus import exports

OWN = "+591 3 342 0118"
SAID = f"Llámanos al {OWN} o escribe a citas@clinica-a.example; tu número 71234567 está anotado."


def source(folder: Path) -> Path:
    tables = exports.export(conversations=40, turns=2)
    for number, row in enumerate(tables["conversations"]):
        row["tenant_id"] = "clinic_a" if number < 30 else "clinic_b"
        row["started_at"] = exports.at(weeks=0 if number < 30 else 1, minutes=number)
    for number, row in enumerate(tables["messages"]):
        row["content"] = f"¿Me dan el teléfono número {number}?" if row["role"] == "user" else f"{SAID} Caso {number}."
    for row in tables["feedback"]:
        row["tenant_id"] = "clinic_a" if int(row["conversation_id"][5:]) < 30 else "clinic_b"
    tables["feedback"][0]["expected_response"] = f"Mejor: {SAID}"
    return exports.write(folder / "source", tables)


def read(folder: Path, contacts: dict[str, list[str]]) -> SourceTables:
    tables = read_source([str(folder / "source")])
    tables.contacts = {tenant: frozenset(own) for tenant, own in contacts.items()}
    return tables


def build(store: Store, tables: SourceTables, weeks: list[str]) -> None:
    ingest_conversations(store, tables, weeks, exports.KEY)
    ingest_feedback(store, tables, weeks, exports.KEY)
    build_examples(store, weeks)


def replies(store: Store, week: str) -> set[str]:
    return {text.partition(" Caso")[0] for text in pl.read_parquet(store.corpus("examples", week) / "part.parquet")["reply"]}


def test_own_contacts_stay(tmp_path: Path) -> None:
    source(tmp_path)
    store = Store(tmp_path / "home")
    first, second = (exports.at(week).date().isoformat() for week in (0, 1))
    bare = read(tmp_path, {})
    build(store, bare, stale_weeks(store, bare).stale)
    hidden = "Llámanos al [PHONE] o escribe a [EMAIL]; tu número [PHONE_2] está anotado."
    assert replies(store, first) == replies(store, second) == {hidden}

    given = read(tmp_path, {"clinic_a": ["591 33420118", "CITAS@clinica-a.example"]})
    assert stale_weeks(store, bare).stale == []
    stale = stale_weeks(store, given)
    assert stale.conversations == [first]  # only where that tenant has conversations
    build(store, given, stale.stale)
    assert replies(store, first) == {SAID.replace("71234567", "[PHONE]")}
    assert replies(store, second) == {hidden}
    assert stale_weeks(store, read(tmp_path, {"clinic_a": ["591 33420118", "CITAS@clinica-a.example"]})).stale == []
    corrected = pl.read_parquet(store.corpus("feedback", first) / "part.parquet")["expected_response"].drop_nulls().to_list()
    assert corrected == [f"Mejor: {SAID.replace('71234567', '[PHONE]')}"]

    filters = {"near_duplicate": 1.0}
    chosen = choose(store, Assistant(name="dental", select={"vertical": "dental"}, min_examples=1, filters=filters))
    assert "personal_data_residual" not in chosen.notes["rejected"]
    assert chosen.kept["reply"].str.contains(OWN, literal=True).sum() > 0


def test_contacts_come_from_all_assistant_files(tmp_path: Path) -> None:
    (tmp_path / "dental.yaml").write_text("select: {vertical: dental}\ncontacts: {clinic_a: ['600'], clinic_b: ['601']}\n")
    (tmp_path / "clinic_a.yaml").write_text("select: {tenant: clinic_a}\ncontacts: {clinic_a: [hola@a.example]}\nfilters: 3\n")
    assert own_contacts(tmp_path) == {"clinic_a": {"600", "hola@a.example"}, "clinic_b": {"601"}}
    (tmp_path / "clinic_a.yaml").write_text("select: {tenant: clinic_a}\ncontacts: {clinic_a: 600}\n")
    with pytest.raises(SettingsError, match=r"clinic_a.yaml:2: `contacts` maps a tenant"):
        own_contacts(tmp_path)
