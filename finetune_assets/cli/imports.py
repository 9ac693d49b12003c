"""`finetune import`: fine-tuning files and code repositories as a source."""

from __future__ import annotations

import json
import sys
from datetime import datetime
from pathlib import Path

import click

SHOWN = 20  # unusable rows that are named on the terminal; the rest are counted

_LEFT_ASIDE = {
    "system": "system messages",
    "tools": "a list of tools",
    "timestamp": "a timestamp that is no time since 2000 (seconds or milliseconds since 1970, or ISO 8601 with its zone)",
    "label": "a label that is neither true nor false",
}


@click.command("import")
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--to", "folder", required=True, type=click.Path(path_type=Path, file_okay=False), help="Source folder to add to.")
@click.option("--tenant", required=True)
@click.option("--vertical", required=True)
@click.option(
    "--date",
    "day",
    required=True,
    type=click.DateTime(["%Y-%m-%d"]),
    help="Day of rows without a `timestamp`; its week is their partition.",
)
@click.option("--form", help="One of the forms of docs/data.md; default: found by each row's keys.")
@click.option(
    "--include",
    multiple=True,
    metavar="PATTERN",
    help="Of a repository: files to read, as in a .gitignore; default **/*.py and **/*.md.",
)
@click.option(
    "--exclude", multiple=True, metavar="PATTERN", help="Of a repository: files and folders to leave out, as in a .gitignore."
)
@click.option("--texts", is_flag=True, help="Of a repository: write plain texts for the objective continued_pretraining.")
@click.option("--strict", is_flag=True, help="Write nothing and end with 1 if a row is unusable.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def import_(  # noqa: PLR0913, PLR0917
    files: tuple[Path, ...],
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    texts: bool,
    folder: Path,
    tenant: str,
    vertical: str,
    day: datetime,
    form: str | None,
    strict: bool,
    as_json: bool,
) -> None:
    """Make a source of fine-tuning FILES (.jsonl, .json, .csv, .parquet), or of one folder that is a code repository.

    Such rows need no satisfaction score. Name the folder in FINETUNE_SOURCE afterwards. Importing a row again adds nothing.
    Ends with 0 if rows were taken, also where some are unusable (they are named, and end in `rejected`); 1 if none was.
    """
    from finetune_assets.corpus.forms import FORMS
    from finetune_assets.corpus.imports import Origin, add, convert, convert_repository
    from finetune_assets.corpus.repositories import Repository, choose_files, write_texts

    if form is not None and form not in FORMS:
        raise click.BadParameter(f"{form!r} is none of {', '.join(FORMS)}", param_hint="--form")
    origin = Origin(tenant=tenant, vertical=vertical, date=day.date(), form=form)
    if any(path.is_dir() for path in files):
        if len(files) != 1:
            raise click.BadParameter("give one repository, or files", param_hint="FILES")
        globs = {"include": list(include), "exclude": list(exclude)}
        chosen = choose_files(files[0], Repository.model_validate({name: value for name, value in globs.items() if value}))
        if texts:
            _tell([f"{name}: {reason}: {detail}" for name, reason, detail in chosen.left_out])
            print(f"{write_texts(chosen, folder)} texts written to {folder}, {len(chosen.left_out)} left out.")
            return
        converted = convert_repository(chosen, origin)
    else:
        converted = convert([(path.name, path) for path in files], origin)
    _tell([f"{problem.place}: {problem.reason}: {problem.detail}" for problem in converted.problems])
    if strict and converted.problems:
        print(f"finetune: {len(converted.problems)} of {converted.read} rows are unusable; nothing was written.", file=sys.stderr)
        sys.exit(1)
    done = add(converted, folder)
    told = {
        "folder": str(folder),
        "read": converted.read,
        "added": done.added,
        "already_there": done.already_there,
        "unusable": len(converted.problems),
        "left_aside": converted.left_aside,
    }
    if as_json:
        print(json.dumps(told))
        return
    aside = "".join(f" {rows} rows had {_LEFT_ASIDE[what]}, left aside." for what, rows in converted.left_aside.items())
    print(
        f"{converted.read} rows read: {done.added} added to {folder}, {done.already_there} already there, "
        f"{len(converted.problems)} unusable.{aside}\nNext: FINETUNE_SOURCE={folder} finetune run --assistant NAME"
    )


def _tell(problems: list[str]) -> None:
    for problem in problems[:SHOWN]:
        print(problem, file=sys.stderr)
    if len(problems) > SHOWN:
        print(f"… and {len(problems) - SHOWN} more", file=sys.stderr)


COMMANDS: list[click.Command] = [import_]
