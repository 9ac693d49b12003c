"""Reads the examples of an assistant a file at a time: all of them, with texts and contexts, need not fit the memory."""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from finetune_assets.assistants.settings import Assistant
from finetune_assets.corpus.losses import losses
from finetune_assets.corpus.schema import EXAMPLES
from finetune_assets.corpus.spool import compact
from finetune_assets.dataset.formats import trim_context
from finetune_assets.errors import DataError, NothingSelected
from finetune_assets.storage import Store


def part_files(store: Store, table: str, weeks: list[str]) -> list[Path]:
    """The Parquet files of a corpus table in these weeks, sorted."""
    return sorted(file for week in weeks for file in store.corpus(table, week).glob("*.parquet"))


def scan(store: Store, table: str, weeks: list[str]) -> pl.LazyFrame | None:
    """A corpus table over these weeks, or None where it has no file."""
    files = part_files(store, table, weeks)
    return pl.scan_parquet(files, hive_partitioning=False) if files else None


def window(weeks: list[str], window_weeks: int | None) -> list[str]:
    """The newest `window_weeks` calendar weeks, counted from the newest one there is; None: all."""
    if not weeks or window_weeks is None:
        return weeks
    first = datetime.date.fromisoformat(weeks[-1]) - datetime.timedelta(weeks=window_weeks - 1)
    return [week for week in weeks if week >= first.isoformat()]


def selected(assistant: Assistant) -> pl.Expr:
    """True for the rows that are this assistant's."""
    if assistant.select.tenant is not None:
        return pl.col("tenant_id") == assistant.select.tenant
    return pl.col("vertical") == assistant.select.vertical


WHOLE = (*(name for name in EXAMPLES if name not in ("context", "channel", "kind", "bucket", "training_consent")), "original")
"""What a step may need of a row that is decided; contexts are asked for."""


@dataclass(frozen=True)
class Selected:
    """This assistant's examples. A row's `place` is its number in `files`, counted over all of them."""

    assistant: Assistant
    weeks: list[str]
    files: list[Path]
    starts: list[int]  # of the files, and the end of the last one
    tenants: set[str]
    outdated: pl.Series  # places of examples that stand in a later week too, which counts
    written: list[int]  # when each file was, in ns: a place says nothing of a file that is written again

    def parts(self) -> Iterator[pl.DataFrame]:
        """The examples with the columns of EXAMPLES but `context`, and `place`."""
        return (lazy.collect() for lazy in self._scans())

    def named(self, message_ids: pl.Series) -> pl.DataFrame:
        """message_id, reply and tenant_id of those examples."""
        wanted = pl.col("message_id").is_in(message_ids.unique().implode())
        columns = ("message_id", "reply", "tenant_id")
        found = (lazy.filter(wanted).select(columns).collect() for lazy in self._scans())
        return pl.concat([EXAMPLES.to_frame().select(columns), *found])

    def _scans(self) -> Iterator[pl.LazyFrame]:
        for file, start in zip(self.files, self.starts, strict=False):
            lazy = pl.scan_parquet(file, hive_partitioning=False).drop("context").with_row_index("place", start)
            lazy = lazy.filter(selected(self.assistant))
            yield lazy.filter(~pl.col("place").is_in(self.outdated.implode())) if len(self.outdated) else lazy

    def contexts(self, rows: pl.DataFrame, turns: int, chars: int) -> Iterator[pl.DataFrame]:
        """Some of the rows with their `context`, cut to both bounds; see `read_more`.

        Raises DataError where a week was built again since the rows were read.
        """
        for part in read_more(self.files, self.starts, rows):
            self._check()
            yield trim_context(part, turns, chars)

    def whole(self, rows: pl.DataFrame, columns: Sequence[str] = WHOLE) -> pl.DataFrame:
        """Some of the rows, which hold `expected`, in the order of their places, with columns that `parts` and `verdicts` gave
        them: all that a later step may need, or those that are named.

        Raises DataError where a week was built again since the rows were read.
        """
        types = {name: EXAMPLES[name] for name in columns if name in EXAMPLES and name not in rows.columns}
        replies = {"original": pl.col("reply"), "reply": pl.coalesce("expected", "reply")}
        told = {name: said for name, said in replies.items() if name in columns}
        none = rows.clear().with_columns(pl.lit(None, dtype).alias(name) for name, dtype in types.items())
        parts = [none.with_columns(**told)]
        for part in read_more(self.files, self.starts, rows, tuple(types)):
            self._check()
            parts.append(compact(part).with_columns(**told))
        return pl.concat(parts)

    def _check(self) -> None:
        for file, then in zip(self.files, self.written, strict=True):
            if not file.exists() or file.stat().st_mtime_ns != then:
                raise DataError(
                    f"{file} was written again while a data set was chosen from it. Materialise training_examples again."
                )


def read_more(
    files: Sequence[Path], starts: Sequence[int], rows: pl.DataFrame, columns: Sequence[str] = ("context",)
) -> Iterator[pl.DataFrame]:
    """The rows with more columns, a file at a time, in the order of their places; `starts`: of each file, and the end of all."""
    of = pl.Series(np.searchsorted(starts, rows["place"].to_numpy(), side="right") - 1)
    for number in of.filter(of < len(files)).unique().sort():  # others are synthetic
        own = rows.filter(of == number).sort("place")
        more = pl.read_parquet(files[number], columns=list(columns), hive_partitioning=False)
        yield own.hstack(more[own["place"] - starts[number]])


def select_examples(store: Store, assistant: Assistant) -> Selected:
    """The examples of this assistant in its window.

    Raises NothingSelected where the corpus holds none.
    """
    weeks = window(store.weeks("examples"), assistant.window_weeks)
    files = part_files(store, "examples", weeks)
    lazy = scan(store, "examples", weeks)
    if lazy is None:
        raise NothingSelected(
            f"Assistant {assistant.name!r}: the corpus has no examples in {store.home / 'corpus' / 'examples'}. "
            "Materialise the asset clean_examples, or start `finetune run`, which does."
        )
    starts, tenants, keys, written = [0], set[str](), list[pl.DataFrame](), [file.stat().st_mtime_ns for file in files]
    for file in files:
        rows = pl.read_parquet(file, columns=["message_id", "tenant_id", "vertical"], hive_partitioning=False)
        own = rows.with_row_index("place", starts[-1]).filter(selected(assistant))
        keys.append(own.select("place", pl.col("message_id").hash().alias("key")))
        tenants |= set(own["tenant_id"].unique())
        starts.append(starts[-1] + rows.height)
    if not any(frame.height for frame in keys):
        raise NothingSelected(_nothing(store, assistant, lazy, weeks))
    found = pl.concat(keys)
    outdated = found.filter(~pl.col("key").is_last_distinct())["place"]
    return Selected(assistant, weeks, files, starts, tenants, outdated, written)


def _nothing(store: Store, assistant: Assistant, lazy: pl.LazyFrame, weeks: list[str]) -> str:
    pairs = lazy.select("vertical", "tenant_id").unique().sort("vertical", "tenant_id").collect()
    lost = [loss for loss in losses(store) if loss.large or pairs.is_empty()]
    told = "".join(f"\n{loss.sentence}" for loss in lost)
    mend = f"Correct `select` in the assistant's file, or add a source with such rows.{told}"
    if pairs.is_empty() and lost:
        return f"Assistant {assistant.name!r}: the corpus has no example, since what it is made from was dropped.{told}"
    groups = pairs.group_by("vertical", maintain_order=True).agg("tenant_id").rows()
    there = "; ".join(f"{vertical} ({', '.join(tenants)})" for vertical, tenants in groups) or "nothing"
    chosen = {k: v for k, v in assistant.select.model_dump().items() if v is not None}
    text = ", ".join(f"{k}: {v}" for k, v in chosen.items())
    return (
        f"Assistant {assistant.name!r} selects {{{text}}}, but no example of {len(weeks)} weeks is of it. "
        f"Verticals (tenants) in the corpus: {there}. {mend}"
    )
