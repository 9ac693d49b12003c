"""The settings' reference: complete, equal to the page in docs, and a schema that takes the shipped files."""

from __future__ import annotations

import json

import jsonschema
import pytest
import yaml
from click.testing import CliRunner

from finetune_assets.assistants.reference import json_schema, renewed, tables
from finetune_assets.cli import main
from finetune_assets.dataset.build import REASONS
from finetune_assets.environment import ROOT
from finetune_assets.errors import SettingsError


def test_every_key_says_what_it_does() -> None:
    lines = [line.split(" | ") for line in tables().splitlines() if line.startswith("| `")]
    assert [line[0] for line in lines if len(line[2].strip(" |")) < 5] == []
    assert len(lines) > 130


def test_the_page_in_docs_is_this_one() -> None:
    """Mend it with `finetune settings --into docs/assistants.md`."""
    page = (ROOT / "docs" / "assistants.md").read_text(encoding="utf-8")
    assert renewed(page) == page
    with pytest.raises(SettingsError, match="has no place for the tables"):
        renewed("# A page")


def test_every_reason_stands_in_docs() -> None:
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    assert [reason for reason in REASONS if f"`{reason}`" not in page] == []


def test_the_schema_takes_the_shipped_files_and_refuses_others() -> None:
    schema = json_schema()
    for path in (ROOT / "finetune_assets" / "assistants").glob("*.yaml"):
        jsonschema.validate(yaml.safe_load(path.read_text(encoding="utf-8")), schema)
    for wrong in ({"selekt": {"vertical": "dental"}}, {"filters": {"min_satisfaction": 9}}, {"name": "dental"}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, schema)


def test_the_command_prints_tables_schema_and_an_assistants_own() -> None:
    run = CliRunner().invoke
    assert run(main, ["settings"]).stdout == tables()
    assert json.loads(run(main, ["settings", "--json-schema"]).stdout) == json_schema()
    own = yaml.safe_load(run(main, ["settings", "--assistant", "dental"]).stdout)
    assert own["select"]["vertical"] == "dental"
    assert own["filters"]["near_duplicate"] == 0.9
