"""`finetune privacy`: how well personal data are found in one's own texts."""

from __future__ import annotations

import json
import sys

import click

from finetune_assets.environment import Environment


@click.command()
@click.option("--assistant", required=True, help="Name of the assistant's YAML file, or of a tenant.")
@click.option("--each", default=100, show_default=True, type=click.IntRange(1, 5000), help="Planted values of every kind.")
@click.option("--seed", default=0, show_default=True, help="Other values, other places.")
@click.option("--show", is_flag=True, help="List what was missed, and what was replaced needlessly.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def privacy(assistant: str, each: int, seed: int, show: bool, as_json: bool) -> None:
    """Plant made-up people into a copy of an assistant's own conversations, and count what is found and replaced needlessly.

    Nothing is written. Times, dates, prices, counts and order numbers are planted too: they must stay. Ends with 1 where less
    than 99 % is found, or 0.5 % of the clean texts or more are changed.
    """
    from finetune_assets.assistants import load_assistant
    from finetune_assets.corpus.planted import lines
    from finetune_assets.dataset.privacy import planted
    from finetune_assets.resources import StoreResource

    resource = StoreResource()
    settings = load_assistant(Environment.read().assistants, assistant, resource.tenants())
    made = planted(resource.store, settings, each, seed)
    if as_json:
        print(json.dumps({"assistant": assistant, **made.as_dict()}))
    else:
        print("\n".join([f"{assistant}: {(told := list(lines(made)))[0]}", *told[1:]]))
        if show:
            looked = [(kind, text) for kind, text in made.missed if kind in made.as_dict()["kinds"]]
            print("\n".join(f"missed    {kind}: {text}" for kind, text in looked) or "nothing was missed")
            print("\n".join(f"needless  {kind}: {text}" for kind, text in made.needless) or "nothing was replaced needlessly")
    if made.recall < 0.99 or made.needless_share >= 0.005:
        sys.exit(1)


COMMANDS: list[click.Command] = [privacy]
