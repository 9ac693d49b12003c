"""`finetune check` and `finetune rating …`: the standing suite, and people's judgement."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from finetune_assets.environment import Environment


@click.command()
@click.option("--assistant", required=True, help="Name of the assistant's YAML file.")
@click.option("--version", help="Default: the champion, else the newest version.")
@click.option("--suite", type=click.Path(path_type=Path), help="Folder of cases; default: the assistant's `benchmark.checks`.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def check(assistant: str, version: str | None, suite: Path | None, as_json: bool) -> None:
    """Run the standing suite against a version; ends with 1 where a case does not hold, a judging model's word aside."""
    from finetune_assets.evaluation.checking import check_version

    title, outcomes = check_version(Environment.read(), assistant, version, suite)
    failed = [one for one in outcomes if one.passed is False and not one.judged]
    if as_json:
        print(json.dumps({"model": title, "failed": len(failed), "cases": [vars(one) for one in outcomes]}, ensure_ascii=False))
    else:
        for one in outcomes:
            mark = {True: "passed", False: "FAILED", None: "skipped"}[one.passed]
            if one.judged:
                mark = "judge: yes" if one.passed else "judge: no"
            click.echo(f"{mark:<12}{one.case}")
            if one.passed is False:
                click.echo(f"            {one.why}\n            said: {one.reply}")
        known = [one for one in outcomes if one.passed is not None and not one.judged]
        told = [one.passed for one in outcomes if one.judged]
        skipped = len(outcomes) - len(known) - len(told)
        said = f", {told.count(True)} of {len(told)} hold by the judging model, which decides nothing" if told else ""
        click.echo(f"{title}: {len(known) - len(failed)} passed, {len(failed)} failed, {skipped} skipped{said}")
    if failed:
        sys.exit(1)


@click.group()
def rating() -> None:
    """Blind pairs and training examples, rated by people."""


@rating.command("start")
@click.option("--assistant", required=True)
@click.option("--name", required=True, help="Name of the study.")
@click.option("--rater", "raters", multiple=True, required=True, help="Who rates; once for each.")
@click.option("--kind", type=click.Choice(["pairs", "review"]), default="pairs", show_default=True)
@click.option(
    "--against",
    default="base",
    show_default=True,
    help="Candidate that the tuned model is compared with; `live`: its shadow replies against what users were answered.",
)
@click.option("--items", default=100, show_default=True, type=click.IntRange(1), help="Most pairs or examples.")
@click.option("--days", default=30, show_default=True, type=click.IntRange(1), help="How long the links hold.")
@click.option("--url", default="http://127.0.0.1:8000", show_default=True, help="Where `finetune serve` answers.")
def start(url: str, **wanted: Any) -> None:
    """Make a study of the newest report's replies (or of training examples) and print each rater's link."""
    from finetune_assets.evaluation.human import start as human

    for rater, link, count in human.start(Environment.read(), human.Wanted(**wanted), url):
        click.echo(f"{rater}  {count} items  {link}")


@rating.command("show")
@click.option("--assistant", required=True)
@click.option("--name", required=True)
def show(assistant: str, name: str) -> None:
    """What the ratings of a study say so far."""
    from finetune_assets.evaluation.human import start as human

    print(json.dumps(human.result(Environment.read(), assistant, name), indent=2))


@rating.command("export")
@click.option("--assistant", required=True)
@click.option("--name", required=True)
@click.option("--to", "folder", required=True, type=click.Path(path_type=Path, file_okay=False))
def export(assistant: str, name: str, folder: Path) -> None:
    """Write raw ratings, TRL preferences, and a review's feedback as a source of the corpus."""
    from finetune_assets.evaluation.human import start as human

    for file, rows in human.export(Environment.read(), assistant, name, folder).items():
        click.echo(f"{folder / file}: {rows} rows")


@rating.command("import")
@click.option("--assistant", required=True)
@click.option("--name", required=True)
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
def import_(assistant: str, name: str, file: Path) -> None:
    """Read raw ratings (ratings.jsonl) into the ledger."""
    from finetune_assets.evaluation.human import start as human

    click.echo(f"{human.import_(Environment.read(), assistant, name, file)} ratings")


COMMANDS: list[click.Command] = [check, rating]
