"""The settings as a reference: tables made of the fields' own descriptions, and a JSON schema for editors.

finetune settings                    the tables, as `docs/assistants.md` has them
finetune settings --json-schema      what a YAML file may hold
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from typing import Any, cast

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from finetune_assets.assistants.settings import Assistant
from finetune_assets.errors import SettingsError

BEGIN, END = "<!-- settings: made by `finetune settings --into` -->", "<!-- settings end -->"
FILE_NAME = "name"
"""The one field that no file holds: it is the file's name."""


def tables() -> str:
    """Markdown: the keys of a file, then those of every group, each with its default and what it does."""
    parts = [_table(Assistant)]
    for path, model in _groups(Assistant, ""):
        parts.append(f"### `{path}`\n{_said(model)}\n\n{_table(model)}")
    return "\n\n".join(parts) + "\n"


def renewed(page: str) -> str:
    """A page with new tables between BEGIN and END. Raises SettingsError for a page without these marks."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SettingsError(f"The page has no place for the tables; write {BEGIN} and {END} in lines of their own.")
    return f"{before}{begin}\n{tables()}{end}{after}"


def json_schema() -> dict[str, Any]:
    """JSON schema of an assistant's file. `select` may be inherited, so it is not required."""
    schema = Assistant.model_json_schema()
    schema["properties"].pop(FILE_NAME)
    schema.pop("required", None)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "finetune_assets assistant"}


def group_of(annotation: Any) -> type[BaseModel] | None:
    """The group that a field holds: itself, one of a list, or one that may be missing."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (list, typing.Union, types.UnionType, typing.Annotated):
        return next((group for inner in typing.get_args(annotation) if (group := group_of(inner))), None)
    return None


def _fields(model: type[BaseModel]) -> Iterator[tuple[str, FieldInfo]]:
    fields = ((field.alias or name, field) for name, field in model.model_fields.items())
    yield from ((name, field) for name, field in fields if not (model is Assistant and name == FILE_NAME))


def _groups(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, type[BaseModel]]]:
    for name, field in _fields(model):
        group = group_of(field.annotation)
        if group is not None:
            path = f"{prefix}{name}"
            yield path, group
            yield from _groups(group, f"{path}.")


def _table(model: type[BaseModel]) -> str:
    rows = [f"| `{name}` | {_default(field)} | {_cell(_what(field))} |" for name, field in _fields(model)]
    return "\n".join(["| key | default | what it does |", "|---|---|---|", *rows])


def _what(field: FieldInfo) -> str:
    group = group_of(field.annotation)
    text = field.description or (_said(group).split("\n\n")[0] if group else "")
    allowed = _literals(field.annotation)
    return f"{text} ({', '.join(f'`{one}`' for one in allowed)})" if allowed else text


def _said(model: type[BaseModel]) -> str:
    return " ".join((model.__doc__ or "").split())


def _literals(annotation: Any) -> list[str]:
    """The values that a field may have, where they are a list of names."""
    if typing.get_origin(annotation) is typing.Literal:
        return [str(one) for one in typing.get_args(annotation)]
    return [one for inner in typing.get_args(annotation) for one in _literals(inner)]


def _default(field: FieldInfo) -> str:
    group = group_of(field.annotation)
    if field.is_required():
        return "required"
    if group is not None:
        value: Any = field.get_default(call_default_factory=True)
        return "below" if isinstance(value, BaseModel) else "none"
    return _value(field.get_default(call_default_factory=True))


def _value(value: Any) -> str:
    if value is None or value is PydanticUndefined or value in ("", [], {}):
        return "none"
    if isinstance(value, bool):
        return "`true`" if value else "`false`"
    if isinstance(value, dict):
        pairs = cast("dict[Any, Any]", value).items()
        return f"`{{{', '.join(f'{key}: {one}' for key, one in pairs)}}}`"
    if isinstance(value, list | tuple):
        return f"`[{', '.join(map(str, cast('list[Any]', value)))}]`"
    return f"`{value}`"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
