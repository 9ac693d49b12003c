"""Which countries' national numbers are phones, by tenant: in its texts, in later checks, and when the list changes."""

from __future__ import annotations

import datetime
from pathlib import Path

import polars as pl
import pytest

from finetune_assets.assistants import Assistant, own_regions
from finetune_assets.corpus.examples import build_examples
from finetune_assets.corpus.ingest import ingest_conversations, ingest_feedback, stale_weeks
from finetune_assets.corpus.sources import SourceTables, read_source
from finetune_assets.dataset import choose, freeze, latest
from finetune_assets.dataset.residual import personal_data_left
from finetune_assets.dataset.selection import NOTHING, Left, common_regions
from finetune_assets.errors import SettingsError
from finetune_assets.storage import Store
from finetune_assets_tests.corpus import exports

SPANISH, AUSTRALIAN = "612 345 678", "0412 345 678"
TENANTS = ("clinic_a", "clinic_b", "clinic_c")


def read(folder: Path, regions: dict[str, tuple[str, ...]]) -> SourceTables:
    """Three tenants of two weeks who say the same."""
    tables = exports.export(conversations=60, turns=2)
    for number, row in enumerate(tables["conversations"]):
        row["tenant_id"] = TENANTS[number % 3]
        row["started_at"] = exports.at(weeks=number % 3 == 2, minutes=number)
    for number, row in enumerate(tables["messages"]):
        said = f"Anoté {SPANISH} y también {AUSTRALIAN}. Caso {number}."
        row["content"] = f"¿Me dan la dirección número {number}?" if row["role"] == "user" else said
    tables["feedback"] = []
    source = read_source([str(exports.write(folder / "source", tables))])
    source.regions = regions
    return source


def build(store: Store, source: SourceTables, weeks: list[str]) -> None:
    ingest_conversations(store, source, weeks, exports.KEY)
    ingest_feedback(store, source, weeks, exports.KEY)
    build_examples(store, weeks)


def said(store: Store) -> dict[str, set[str]]:
    rows = pl.read_parquet(f"{store.home}/corpus/examples/*/part.parquet", hive_partitioning=False)
    replies = rows.select("tenant_id", pl.col("reply").str.extract(r"Anoté (.*)\. Caso")).group_by("tenant_id").agg("reply")
    return {tenant: set(texts) for tenant, texts in replies.rows()}


def test_a_tenants_own_countries_come_before_its_verticals(tmp_path: Path) -> None:
    store = Store(tmp_path / "home")
    usual = read(tmp_path, {})
    build(store, usual, stale_weeks(store, usual).stale)
    assert said(store) == {tenant: {f"[PHONE] y también {AUSTRALIAN}"} for tenant in TENANTS}
    assert common_regions(store) == ("ES", "MX", "AR", "BO", "CL", "US")

    regions = {"vertical dental": ("AU",), "tenant clinic_b": ("BO",), "tenant clinic_c": ("AU", "ES")}
    changed = read(tmp_path, regions)
    stale = stale_weeks(store, changed)
    assert len(stale.conversations) == len(stale.all_weeks) == 2
    build(store, changed, stale.stale)
    assert said(store) == {
        "clinic_a": {f"{SPANISH} y también [PHONE]"},
        "clinic_b": {f"{SPANISH} y también {AUSTRALIAN}"},
        "clinic_c": {"[PHONE] y también [PHONE_2]"},
    }
    assert stale_weeks(store, read(tmp_path, regions)).stale == []
    only = stale_weeks(store, read(tmp_path, {**regions, "tenant clinic_c": ("ES",)}))
    assert only.conversations == [datetime.date(2026, 9, 14).isoformat()]  # where that tenant speaks
    assert common_regions(store) == ()

    assistant = Assistant(name="dental", select={"vertical": "dental"}, min_examples=1, filters={"near_duplicate": 1.0})
    choice = choose(store, assistant)
    assert "personal_data_residual" not in choice.notes["rejected"]
    freeze(store, assistant, choice)
    folder = latest(store, "dental")
    assert folder is not None
    assert personal_data_left(folder, Left.of(store))[0] == []
    assert personal_data_left(folder, NOTHING)[0]  # the default countries find what was left on purpose


def test_countries_come_from_all_assistant_files(tmp_path: Path) -> None:
    (tmp_path / "dental.yaml").write_text("select: {vertical: dental}\nregions: [bo, CL]\n")
    (tmp_path / "clinic_a.yaml").write_text("select: {tenant: clinic_a}\nregions: [PT]\n")
    (tmp_path / "clinic_b.yaml").write_text("extends: clinic_a\nselect: {tenant: clinic_b}\n")
    (tmp_path / "clinic_c.yaml").write_text("select: {tenant: clinic_c}\n")
    assert own_regions(tmp_path) == {"vertical dental": ("BO", "CL"), "tenant clinic_a": ("PT",), "tenant clinic_b": ("PT",)}
    (tmp_path / "clinic_c.yaml").write_text("select: {tenant: clinic_c}\nregions: [Bolivia]\n")
    with pytest.raises(SettingsError, match=r"clinic_c.yaml:2: `regions`: BOLIVIA is no country's code"):
        own_regions(tmp_path)
    (tmp_path / "clinic_c.yaml").write_text("select: {vertical: dental}\nregions: [ES]\n")
    with pytest.raises(SettingsError, match=r"another file gives vertical dental other `regions`"):
        own_regions(tmp_path)
