"""How a platform's own table and column names map to the declared ones: the YAML file that `FINETUNE_SOURCE_MAPPING` names.

    tables:                                     # for every source
      messages:
        table: chat_messages                    # a file, a folder or a database table; `schema.table` in Postgres
        columns: {content: body, role: author}  # declared name: the source's name
        values: {role: {human: user, ai: assistant}}
      feedback:
        constants: {rating: null, comment: null}  # columns that the source lacks
    sources:                                    # for the sources whose address (without user and password) holds the key
      supabase.co:
        conversations:
          columns: {started_at: created_at}
          constants: {tenant_id: clinic_aurora, vertical: dental}

A table of `sources` replaces the whole table of `tables`. Columns that are not mapped keep their declared names. Every value is
text as it is written (`yes`, `1` and `2026-01-05` too), but for a constant `null`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import polars as pl
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from finetune_assets.corpus.cells import text
from finetune_assets.corpus.schema import SOURCE
from finetune_assets.errors import SettingsError

TableName = Literal["conversations", "messages", "feedback", "erasure_requests"]


class TableMapping(BaseModel):
    """One declared table as a source has it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    table: str | None = Field(default=None, description="The source's name of the table; default: the declared one.")
    columns: dict[str, str] = Field(default={}, description="Declared column: the source's column.")
    values: dict[str, dict[str, str]] = Field(
        default={}, description="Declared column: {the source's value: the declared value}."
    )
    constants: dict[str, str | None] = Field(
        default={}, description="Declared column that the source lacks: the value of every row, or null."
    )

    @field_validator("constants", mode="before")
    @classmethod
    def _null(cls, constants: Any) -> Any:
        if not isinstance(constants, dict):
            return constants
        given = cast("dict[Any, Any]", constants)
        return {column: None if value in ("null", "~", "") else value for column, value in given.items()}

    def source_name(self, column: str) -> str:
        """What the source calls a declared column."""
        return self.columns.get(column, column)

    @property
    def digest(self) -> str:
        """Tells two mappings apart; empty where nothing is mapped."""
        given = self.model_dump(exclude_defaults=True)
        return hashlib.blake2b(json.dumps(given, sort_keys=True).encode(), digest_size=8).hexdigest() if given else ""


Tables = dict[TableName, TableMapping]


class SourceMapping(BaseModel):
    """The mapping file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tables: Tables = Field(default={}, description="For every source.")
    sources: dict[str, Tables] = Field(default={}, description="A part of a source's address: its own tables.")

    @model_validator(mode="after")
    def _known_columns(self) -> SourceMapping:
        for tables in (self.tables, *self.sources.values()):
            for table, mapping in tables.items():
                _check(table, mapping)
        return self

    def of(self, address: str) -> SourceTablesMapping:
        """The tables of one source, by its address without user and password."""
        tables = dict(self.tables)
        for part, own in self.sources.items():
            tables |= own if part in address else {}
        return SourceTablesMapping(tables)

    def check_used(self, addresses: Sequence[str]) -> None:
        """Raises SettingsError for a key of `sources` that is in no address: a typing error would be silent otherwise."""
        unused = [part for part in self.sources if not any(part in address for address in addresses)]
        if unused:
            raise SettingsError(
                f"FINETUNE_SOURCE_MAPPING: `sources` names {', '.join(unused)}, which is in no source's address "
                f"({', '.join(addresses)}); write a part of one."
            )


@dataclass(frozen=True)
class SourceTablesMapping:
    """The mapping of one source's tables; a table without one has the declared names."""

    tables: dict[TableName, TableMapping] = field(default_factory=dict[TableName, TableMapping])

    def of(self, table: str) -> TableMapping:
        """One table's mapping."""
        return self.tables.get(table, TableMapping())  # pyright: ignore[reportArgumentType, reportCallIssue]


def _check(table: str, mapping: TableMapping) -> None:
    declared = SOURCE[table]
    for kind in ("columns", "values", "constants"):
        unknown = sorted(set(getattr(mapping, kind)) - set(declared))
        if unknown:
            raise ValueError(f"{table}.{kind} names {', '.join(unknown)}; declared columns of {table} are {', '.join(declared)}")
    both = sorted(set(mapping.columns) & set(mapping.constants))
    if both:
        raise ValueError(f"{table}: {', '.join(both)} stand in `columns` and in `constants`; keep one")
    names = list(mapping.columns.values())
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{table}.columns takes {', '.join(twice)} for two declared columns")


def read_mapping(path: Path | None) -> SourceMapping:
    """The mapping of a YAML file; without a file the declared names. Raises SettingsError."""
    if path is None:
        return SourceMapping()
    try:
        content: Any = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)  # scalars stay text
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise SettingsError(f"FINETUNE_SOURCE_MAPPING={path} cannot be read: {reason}.") from None
    except yaml.YAMLError as error:
        place = getattr(error, "problem_mark", None)
        where = f" at line {place.line + 1}" if place else ""
        raise SettingsError(f"FINETUNE_SOURCE_MAPPING={path} is no YAML{where}: {getattr(error, 'problem', error)}.") from None
    try:
        return SourceMapping.model_validate({} if content is None else content)
    except ValidationError as error:
        found = [f"{'.'.join(map(str, e['loc'])) or 'file'}: {e['msg'].removeprefix('Value error, ')}" for e in error.errors()]
        raise SettingsError(f"FINETUNE_SOURCE_MAPPING={path}: {'; '.join(found)}.") from None


def declared(raw: pl.DataFrame, mapping: TableMapping) -> pl.DataFrame:
    """A source's columns under their declared names, with mapped values and constants."""
    if not (mapping.columns or mapping.values or mapping.constants):
        return raw
    frame = raw.rename({name: column for column, name in mapping.columns.items() if name in raw.columns})
    for column, values in mapping.values.items():
        if column in frame.columns:
            cells = text(frame[column])
            frame = frame.with_columns(cells.replace(list(values), list(values.values())).alias(column))
    return frame.with_columns(**{column: pl.lit(value, pl.String) for column, value in mapping.constants.items()})
