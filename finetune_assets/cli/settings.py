"""`finetune settings`: what an assistant's file may say, and what one says."""

from __future__ import annotations

import json
from pathlib import Path

import click

from finetune_assets.environment import Environment


@click.command()
@click.option("--assistant", help="The settings that this assistant has, inherited ones and defaults included, as YAML.")
@click.option("--json-schema", "schema", is_flag=True, help="A JSON schema of the file, for editors.")
@click.option(
    "--into",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="Renew the tables in this page.",
)
def settings(assistant: str | None, schema: bool, into: Path | None) -> None:
    """Every key of an assistant's YAML file with its default and what it does, as Markdown."""
    from finetune_assets.assistants import load_assistant
    from finetune_assets.assistants.reference import FILE_NAME, json_schema, renewed, tables

    if schema:
        print(json.dumps(json_schema(), indent=2))
    elif into is not None:
        into.write_text(renewed(into.read_text(encoding="utf-8")), encoding="utf-8")
    elif assistant is None:
        print(tables(), end="")
    else:
        import yaml

        from finetune_assets.resources import StoreResource

        found = load_assistant(Environment.read().assistants, assistant, StoreResource().tenants())
        print(yaml.safe_dump(found.model_dump(mode="json", exclude={FILE_NAME}), allow_unicode=True, sort_keys=False), end="")


COMMANDS: list[click.Command] = [settings]
