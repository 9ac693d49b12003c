"""Starting, reading, exporting and importing a study, for the command line and the asset."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast
from urllib.parse import urlencode

import polars as pl

from finetune_assets.assistants import load_assistant
from finetune_assets.environment import Environment
from finetune_assets.errors import DataError
from finetune_assets.evaluation.candidates import TUNED, TestRow, split_rows
from finetune_assets.evaluation.human import book, links, statistics, study
from finetune_assets.registry import Ledger
from finetune_assets.registry.shadowed import shadowed
from finetune_assets.storage import Store, read_json

LIVE = "live"
"""Compares what users were answered with what the tuned model would have said, in shadow."""


@dataclass(frozen=True)
class Wanted:
    """What a new study is to be."""

    assistant: str
    name: str
    raters: tuple[str, ...]
    kind: str = "pairs"
    against: str = "base"
    items: int = 100
    days: int = 30


def start(environment: Environment, wanted: Wanted, url: str) -> list[tuple[str, str, int]]:
    """Makes the study; each rater with a link and a number of items. Raises DataError where there is no report yet."""
    store = Store(environment.home)
    settings = load_assistant(
        environment.assistants, wanted.assistant, read_json(store.tenants) if store.tenants.exists() else {}
    )
    if wanted.kind == "pairs":
        version, candidates, items = _live_pairs(environment, wanted) if wanted.against == LIVE else _pairs(store, wanted)
    else:
        dataset = (store.datasets(wanted.assistant) / "latest").resolve()
        if not (dataset / "manifest.json").exists():
            raise DataError(f"{wanted.assistant} has no data set yet; run `finetune run --assistant {wanted.assistant}`.")
        version, candidates, items = dataset.name, ["example"], study.examples(split_rows(dataset, "train"), wanted.items)
    kind = cast("Literal['pairs', 'review']", wanted.kind)
    raters = study.assign(items, wanted.raters)
    made = study.Study(wanted.assistant, wanted.name, kind, settings.language, version, candidates, raters, items)
    study.write(store, made)
    expires = int(time.time()) + wanted.days * 86_400
    key = key_of(environment)

    def link(rater: str) -> str:
        token = links.sign(links.Rater(wanted.assistant, wanted.name, rater, expires), key)
        return f"{url.rstrip('/')}/rate?{urlencode({'link': token})}"

    return [(rater, link(rater), len(given)) for rater, given in made.raters.items()]


def key_of(environment: Environment) -> bytes:
    """What links are signed with: the key of the store."""
    return environment.user_key.encode() if environment.user_key else Store(environment.home).key()


def result(environment: Environment, assistant: str, name: str) -> dict[str, Any]:
    """The result of a study of pairs, or the counts of a review."""
    with _study(environment, assistant, name) as (found, rated, _ledger):
        return asdict(statistics.evaluate(found, rated))


def export(environment: Environment, assistant: str, name: str, folder: Path) -> dict[str, int]:
    """Files of a study, by name, with their rows."""
    with _study(environment, assistant, name) as (found, rated, _ledger):
        return book.export(found, rated, folder)


def import_(environment: Environment, assistant: str, name: str, file: Path) -> int:
    """Raw ratings of a file into the ledger; their number. Raises DataError."""
    with _study(environment, assistant, name) as (found, _rated, ledger):
        read = book.read_ratings(file, found)
        for rating in read:
            book.record(ledger.engine, rating)
        return len(read)


@contextmanager
def _study(environment: Environment, assistant: str, name: str) -> Generator[tuple[study.Study, list[book.Rating], Ledger]]:
    found = study.load(Store(environment.home), assistant, name)
    ledger = Ledger(environment.database_url)
    try:
        yield found, book.of_study(ledger.engine, assistant, name), ledger
    finally:
        ledger.close()


def _pairs(store: Store, wanted: Wanted) -> tuple[str, list[str], list[study.Item]]:
    report = store.report(wanted.assistant, "latest")
    if not (report / "report.json").exists():
        raise DataError(f"{wanted.assistant} has no report yet; run `finetune run --assistant {wanted.assistant}`.")
    version = str(read_json(report / "report.json")["model_version"])
    work = report.parent / "work" / version
    known = sorted(path.stem for path in work.glob("*.parquet"))
    candidates = [TUNED, wanted.against]
    if not set(candidates) <= set(known):
        raise DataError(f"The report of {version} has no candidate {wanted.against!r}; there are: {', '.join(known)}.")
    rows = [TestRow(**row) for row in read_json(work / "rows.json")["rows"]]
    frames = {name: pl.read_parquet(work / f"{name}.parquet") for name in candidates}
    return version, candidates, study.pairs(rows, frames, candidates, wanted.items)


def _live_pairs(environment: Environment, wanted: Wanted) -> tuple[str, list[str], list[study.Item]]:
    ledger = Ledger(environment.database_url)
    try:
        version, found = shadowed(ledger, wanted.assistant)
    finally:
        ledger.close()
    if version is None:
        raise DataError(
            f"{wanted.assistant} has no shadow replies yet: a version in shadow makes them while `finetune serve` answers users "
            "(`finetune rollout status`), unless `serving.texts` is `none`."
        )
    rows = [TestRow(one.context, "", one.conversation_id, one.message_id, one.tenant_id, "") for one in found]
    frames = {
        TUNED: pl.DataFrame({"reply": [one.shadow for one in found]}),
        LIVE: pl.DataFrame({"reply": [one.live for one in found]}),
    }
    candidates = [TUNED, LIVE]
    return version, candidates, study.pairs(rows, frames, candidates, wanted.items)
