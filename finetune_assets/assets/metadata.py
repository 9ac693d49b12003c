"""Numbers, tables and texts for the asset pages. Keys and types stay the same from run to run, since the UI plots them."""

from collections.abc import Mapping
from typing import Any

import dagster as dg
import polars as pl

from finetune_assets.storage import Store

CELL = 160
"""Most characters of a cell on an asset page."""


def week_numbers(numbers: Mapping[str, Any]) -> dict[str, Any]:
    """Counts of a corpus week: one number a table, rejected rows by reason as a table."""
    metadata: dict[str, Any] = {}
    for what in ("read", "kept", "dropped", "repaired"):
        for table, number in numbers.get(what, {}).items():
            metadata[f"{table}/{what}"] = int(number)
    metadata["personal_values_replaced"] = sum(numbers.get("personal_data", {}).values())
    reasons = [
        {"table": table, "reason": reason, "rows": int(rows)}
        for table, by_reason in sorted(numbers.get("rejected_by_reason", {}).items())
        for reason, rows in sorted(by_reason.items())
    ]
    metadata["rejected_by_reason"] = records_table(reasons, ["table", "reason", "rows"])
    unknown = numbers.get("unknown_columns") or {}
    if any(unknown.values()):
        metadata["unknown_columns_left_aside"] = dg.MetadataValue.json(unknown)
    return metadata


def sample_table(store: Store, table: str, week: str, rows: int = 5) -> dg.TableMetadataValue:
    """The first rows of a corpus week, in which lists and long texts are cut."""
    return frame_table(pl.read_parquet(store.corpus(table, week) / "part.parquet", n_rows=rows))


def rejected_table(store: Store, week: str, rows: int = 10) -> dg.TableMetadataValue | None:
    """Rejected rows of a week, or null if there are none."""
    files = sorted(store.corpus("rejected", week).glob("*.parquet"))
    if not files:
        return None
    frame = pl.concat([pl.read_parquet(file) for file in files], how="diagonal").head(rows)  # an older build wrote fewer columns
    return frame_table(frame) if frame.height else None


def frame_table(frame: pl.DataFrame) -> dg.TableMetadataValue:
    """A data frame as a table of texts and numbers."""
    return records_table(frame.to_dicts(), frame.columns)


def records_table(rows: list[dict[str, Any]], columns: list[str]) -> dg.TableMetadataValue:
    """Rows as a table; `columns` keeps the schema stable when there are no rows."""
    schema = dg.TableSchema(columns=[dg.TableColumn(name, _type(rows, name)) for name in columns])
    records = [dg.TableRecord({name: _cell(row.get(name)) for name in columns}) for row in rows]
    return dg.MetadataValue.table(records=records, schema=schema)


def _type(rows: list[dict[str, Any]], column: str) -> str:
    values = [row[column] for row in rows if row.get(column) is not None]
    if values and all(isinstance(value, int) and not isinstance(value, bool) for value in values):
        return "int"
    return "float" if values and all(isinstance(value, float) for value in values) else "string"


def _cell(value: Any) -> str | int | float | bool | None:
    if value is None or isinstance(value, (int, float, bool)):
        return value
    if isinstance(value, list):
        value = " ¦ ".join(_turn(item) for item in value)  # pyright: ignore[reportUnknownVariableType]
    text = str(value)
    return text if len(text) <= CELL else text[: CELL - 1] + "…"


def _turn(item: Any) -> str:
    return f"{item.get('role')}: {item.get('content')}" if isinstance(item, dict) and "role" in item else str(item)
