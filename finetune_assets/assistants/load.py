"""Reads an assistant's YAML: defaults < the file it extends < its own keys.

A tenant inherits its vertical's file by itself, and needs no file of its own: then it gets the vertical's settings with
`select: {tenant: …}`. Errors name the file, the line, the value and what is allowed.
"""

from __future__ import annotations

import re
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from finetune_assets.assistants.reference import group_of
from finetune_assets.assistants.settings import Assistant
from finetune_assets.assistants.settings.data import check_regions
from finetune_assets.errors import SettingsError, UnknownAssistant


def assistant_names(folder: Path) -> list[str]:
    """Names of the assistants that have a file, sorted. Raises SettingsError where the folder is missing."""
    if not folder.is_dir():
        raise SettingsError(f"FINETUNE_ASSISTANTS={folder} is no folder; make it, with one YAML file for each assistant.")
    return sorted(path.stem for path in folder.glob("*.y*ml") if path.suffix in (".yaml", ".yml"))


def load_assistant(folder: Path, name: str, tenants: Mapping[str, str] | None = None) -> Assistant:
    """The settings of one assistant; `tenants` maps tenant to vertical (as the corpus last saw them).

    Raises UnknownAssistant if there is neither a file nor a tenant of that name, SettingsError for a file that is wrong.
    """
    tenants = tenants or {}
    files = {known: _file(folder, known) for known in assistant_names(folder)}
    if name in files:
        values, origin = _read(files[name])
    elif name in tenants:
        values, origin = {"select": {"tenant": name}}, {}
    else:
        known = ", ".join(sorted(files)) or "none"
        seen = f" and is not one of the {len(tenants)} tenants in the corpus" if tenants else ""
        raise UnknownAssistant(
            f"Assistant {name!r} has no file in {folder} (there: {known}){seen}. "
            f"Add {name}.yaml with a `select`, or correct the name."
        )
    chain = [(values, origin)]
    parent = _parent(values, name, files, tenants)
    seen_names = {name}
    while parent is not None:
        if parent in seen_names:
            raise SettingsError(
                f"{files[parent]}: `extends` goes round in a circle ({' -> '.join([*sorted(seen_names), parent])})."
            )
        seen_names.add(parent)
        chain.append(_read(files[parent]))
        parent = _parent(chain[-1][0], parent, files, tenants)
    return _validate(name, chain, files.get(name))


def own_contacts(folder: Path) -> dict[str, frozenset[str]]:
    """The public contacts of each tenant, from the `contacts` of all assistant files; other keys of a file are not looked at.

    Raises SettingsError for `contacts` that are no mapping of tenants to lists of texts.
    """
    found: dict[str, frozenset[str]] = {}
    for name in assistant_names(folder):
        values, origin = _read(_file(folder, name))
        contacts: Any = values.get("contacts") or {}
        if not isinstance(contacts, dict) or not all(_texts(given) for given in contacts.values()):
            raise SettingsError(f"{origin[('contacts',)]}: `contacts` maps a tenant to a list of its numbers and addresses.")
        for tenant, given in typing.cast("dict[Any, list[str]]", contacts).items():
            found[str(tenant)] = found.get(str(tenant), frozenset()) | frozenset(given)
    return found


def own_regions(folder: Path) -> dict[str, tuple[str, ...]]:
    """`tenant NAME` or `vertical NAME` to the countries of its national phone numbers: the `select` and `regions` of all files.

    Raises SettingsError for what is no list of countries' codes, and where two files say different things of one `select`.
    """
    names = assistant_names(folder)
    read = {name: _read(_file(folder, name)) for name in names}
    found: dict[str, tuple[str, ...]] = {}
    for values, origin in read.values():
        select: Any = values.get("select")
        given: Any = values.get("regions", (read[values["extends"]][0] if values.get("extends") in read else {}).get("regions"))
        if not given or not isinstance(select, dict):
            continue
        place = origin.get(("regions",), origin[()])
        if not _texts(given):
            raise SettingsError(f"{place}: `regions` is a list of countries' codes, e.g. [BO, PT].")
        try:
            codes = tuple(sorted(check_regions(given)))
        except ValueError as error:
            raise SettingsError(f"{place}: `regions`: {error}.") from None
        for kind, own in typing.cast("dict[Any, Any]", select).items():
            if found.setdefault(f"{kind} {own}", codes) != codes:
                raise SettingsError(
                    f"{place}: another file gives {kind} {own} other `regions`: {', '.join(found[f'{kind} {own}'])}."
                )
    return found


def _texts(given: Any) -> bool:
    return isinstance(given, list) and all(isinstance(one, str) for one in typing.cast("list[Any]", given))


def _file(folder: Path, name: str) -> Path:
    return next(path for suffix in (".yaml", ".yml") if (path := folder / f"{name}{suffix}").exists())


def _parent(values: dict[str, Any], name: str, files: Mapping[str, Path], tenants: Mapping[str, str]) -> str | None:
    explicit = values.get("extends")
    if explicit is not None:
        if not isinstance(explicit, str) or explicit not in files:
            raise SettingsError(f"{files[name]}: `extends: {explicit}` names no file; there are: {', '.join(sorted(files))}.")
        return str(explicit)
    select = values.get("select")
    tenant = select.get("tenant") if isinstance(select, dict) else None
    vertical = tenants.get(str(tenant)) if tenant is not None else None
    return vertical if vertical in files and vertical != name else None


def _read(path: Path) -> tuple[dict[str, Any], dict[tuple[Any, ...], str]]:
    """The mapping in a file, and for each key path the place (`file:line`) it stands in."""
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: not readable as YAML: {error}") from None
    if not isinstance(values, dict):
        raise SettingsError(
            f"{path}:1: an assistant is a mapping with at least `select: {{vertical: …}}` or `select: {{tenant: …}}`."
        )
    lines: dict[tuple[Any, ...], str] = {(): f"{path}:1"}
    _collect(node, (), path, lines)
    return typing.cast("dict[str, Any]", values), lines


def _collect(node: Any, at: tuple[Any, ...], path: Path, lines: dict[tuple[Any, ...], str]) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*at, key.value)
            lines[here] = f"{path}:{key.start_mark.line + 1}"
            _collect(value, here, path, lines)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            here = (*at, index)
            lines[here] = f"{path}:{value.start_mark.line + 1}"
            _collect(value, here, path, lines)


def _validate(name: str, chain: list[tuple[dict[str, Any], dict[tuple[Any, ...], str]]], own: Path | None) -> Assistant:
    merged: dict[str, Any] = {}
    lines: dict[tuple[Any, ...], str] = {}
    for values, origin in reversed(chain):
        merged = _merge(merged, values)
        lines.update(origin)
    if "name" in merged:
        raise SettingsError(f"{lines[('name',)]}: `name` is the file's name; delete the key.")
    try:
        return Assistant(name=name, **merged)
    except ValidationError as error:
        problems = [_explain(problem, lines, own or Path(f"{name}.yaml")) for problem in error.errors()]
        raise SettingsError("\n".join(problems)) from None
    except TypeError as error:  # keys that are no strings
        raise SettingsError(f"{own}: {error}") from None


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Groups merge key by key, except `select`, of which exactly one key counts; everything else is replaced."""
    merged = dict(below)
    for key, value in above.items():
        if key != "select" and isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = _merge(merged[key], typing.cast("dict[str, Any]", value))
        else:
            merged[key] = value
    return merged


def _explain(problem: Any, lines: dict[tuple[Any, ...], str], own: Path) -> str:
    at = tuple(part for part in problem["loc"] if not (isinstance(part, str) and part.startswith("function-")))
    place = next((lines[at[:n]] for n in range(len(at), -1, -1) if at[:n] in lines), f"{own}:1")
    key = ".".join(str(part) for part in at) or "the file"
    if problem["type"] == "extra_forbidden":
        return f"{place}: unknown key `{key}`; allowed here: {', '.join(sorted(_keys(at[:-1])))}."
    if problem["type"] == "missing":
        return f"{place}: `{key}` is missing; it is required."
    message = problem["msg"].removeprefix("Value error, ")
    given = re.sub(r"//[^\s'\"]*@", "//[…]@", repr(problem["input"]))  # a password in an address
    return f"{place}: `{key}: {given}` is wrong: {message}."


def _keys(at: tuple[Any, ...]) -> list[str]:
    """The keys of the settings group at a path."""
    model: Any = Assistant
    for part in at:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[part].annotation
        model = group_of(annotation) or model
    return [about.alias or field for field, about in model.model_fields.items() if not (model is Assistant and field == "name")]
