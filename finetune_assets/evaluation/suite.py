"""The standing suite: cases that a model must always pass, kept by people in a folder of YAML and JSONL files.

    - name: closed on Sundays
      prompt: ¿Abren los domingos?            # or messages: [{role, content}, …]
      contains: domingo                       # a text, or a list of which one is enough
      not_contains: [a las]
      regex: "cerra(mos|do)"                  # likewise; without regard to case, as are the texts
      json: true                              # the reply is a JSON value; {"tool": "book"}: and holds these keys and values
      judge: says that the place is closed    # asked of `benchmark.judge`; shown, and in no gate; left out where there is none
    - name: books by tool
      prompt: Quiero una mesa para dos
      tools: [{name: book_table, …}]          # what it may call; default: the assistant's `tools`
      calls: {name: book_table, arguments: {people: 2}}   # exactly this, or a list, in any order; []: it calls nothing
      tenant: clinic_a                        # whose examples and documents retrieval may find; default: the only tenant's

`finetune check` runs them against a version; every report runs them against every candidate, asked as for the test rows: with its
examples or passages, where it has some.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from finetune_assets.assistants.settings.data import as_function
from finetune_assets.assistants.settings.group import check_pattern
from finetune_assets.corpus.forms import calls_text
from finetune_assets.errors import SettingsError
from finetune_assets.evaluation import called

Message = dict[str, Any]


class Call(BaseModel):
    """A function call that a case expects."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    arguments: dict[str, Any] = Field(default_factory=dict)


class Case(BaseModel):
    """One case; every expectation that it names must hold."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    prompt: str | None = None
    messages: list[Message] | None = None
    contains: list[str] = Field(default_factory=list)
    not_contains: list[str] = Field(default_factory=list)
    regex: list[str] = Field(default_factory=list)
    json_: bool | dict[str, Any] | None = Field(default=None, alias="json")
    judge: str | None = None
    tools: list[dict[str, Any]] | None = None
    calls: list[Call] | None = None
    tenant: str | None = None
    file: str = ""

    @model_validator(mode="before")
    @classmethod
    def _lists(cls, values: Any) -> Any:
        """A single text or call is a list of one."""
        if isinstance(values, dict):
            made = cast("dict[str, Any]", values)
            single = {"contains": str, "not_contains": str, "regex": str, "tools": dict, "calls": dict}
            return {k: [v] if k in single and isinstance(v, single[k]) else v for k, v in made.items()}
        return values

    @field_validator("tools")
    @classmethod
    def _functions(cls, tools: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
        return None if tools is None else [as_function(tool) for tool in tools]

    @model_validator(mode="after")
    def _whole(self) -> Case:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give exactly one of `prompt` and `messages`")
        texts = self.contains or self.not_contains or self.regex or self.judge
        if not texts and self.json_ is None and self.calls is None:
            raise ValueError("expect something: contains, not_contains, regex, json, calls or judge")
        offered = None if self.tools is None else [tool["function"]["name"] for tool in self.tools]
        unknown = [] if offered is None else [call.name for call in self.calls or [] if call.name not in offered]
        if unknown:
            raise ValueError(f"calls {', '.join(unknown)}, which its tools ({', '.join(offered or []) or 'none'}) do not offer")
        for pattern in self.regex:
            check_pattern(pattern)
        return self

    def offered(self, tools: Sequence[Message]) -> list[Message]:
        """What the model may call: the case's own tools, else the assistant's `tools`."""
        return list(tools if self.tools is None else self.tools)

    def chat(self, system: str) -> list[Message]:
        """The prompt; the assistant's system message stands first where the case brings none."""
        turns = list(self.messages or [{"role": "user", "content": self.prompt or ""}])
        return turns if not system or turns[0]["role"] == "system" else [{"role": "system", "content": system}, *turns]


@dataclass(frozen=True)
class Outcome:
    """What became of a case."""

    case: str
    passed: bool | None
    """Null where only a judge could tell, and there is none."""
    why: str
    """What was expected and not found; empty where it passed."""
    reply: str
    judged: bool = False
    """That a judging model decided it: then it is shown, and counts in no gate."""


def read_suite(folder: Path) -> list[Case]:
    """All cases, in the order of files and lines. Raises SettingsError naming file, case and fault."""
    if not folder.is_dir():
        raise SettingsError(f"benchmark.checks: {folder} is no folder; make it, with YAML or JSONL files of cases.")
    cases: list[Case] = []
    for file in sorted(path for path in folder.rglob("*") if path.suffix in (".yaml", ".yml", ".jsonl")):
        for n, values in enumerate(_values(file)):
            try:
                given: dict[str, Any] = (
                    {"name": f"{file.stem} {n + 1}", **values} if isinstance(values, dict) else {"case": values}
                )
                cases.append(Case.model_validate({**given, "file": file.name}))
            except ValidationError as error:
                first = error.errors()[0]
                place = ".".join(map(str, first["loc"]))
                raise SettingsError(f"{file}: case {n + 1}: {place + ': ' if place else ''}{first['msg']}") from None
    if not cases:
        raise SettingsError(f"benchmark.checks: {folder} holds no case; add one, or leave the setting out.")
    return cases


def _values(file: Path) -> list[Any]:
    text = file.read_text(encoding="utf-8")
    try:
        if file.suffix == ".jsonl":
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        loaded: Any = yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise SettingsError(f"{file}: not readable: {error}") from None
    if loaded is None:
        return []
    return cast("list[Any]", loaded) if isinstance(loaded, list) else [loaded]


def judge_case(case: Case, reply: str | None, judged: bool | None = None) -> Outcome:
    """The verdict on one reply; null where an endpoint gave none. `judged`: what a judge said of `case.judge`; null where nobody
    was asked."""
    if reply is None:
        return Outcome(case.name, None, "no reply", "")
    faults = [
        *_missing("contains", case.contains, [text for text in case.contains if text.lower() in reply.lower()]),
        *_missing("regex", case.regex, [p for p in case.regex if re.search(p, reply, re.IGNORECASE)]),
        *(f"holds {text!r}" for text in case.not_contains if text.lower() in reply.lower()),
        *_json_faults(case.json_, reply),
        *_call_faults(case.calls, reply),
    ]
    if case.judge and not faults:
        why = f"judge: not so: {case.judge}" if judged is False else ""
        return Outcome(case.name, judged, why, reply, judged=judged is not None)
    return Outcome(case.name, not faults, "; ".join(faults), reply)


def _missing(what: str, wanted: Sequence[str], found: Sequence[str]) -> list[str]:
    return [f"{what}: none of {', '.join(map(repr, wanted))}"] if wanted and not found else []


def _call_faults(expected: Sequence[Call] | None, reply: str) -> list[str]:
    if expected is None:
        return []
    made, asked = called.calls(reply), calls_text([call.model_dump() for call in expected])
    wanted = called.calls(asked) if expected else []  # as the corpus writes long numbers
    return [] if called.same(made, wanted) else [f"calls: {_told(made)}, not {_told(wanted)}"]


def _told(calls: Sequence[called.Call]) -> str:
    return " and ".join(f"{call['name']}({json.dumps(call['arguments'], ensure_ascii=False)})" for call in calls) or "nothing"


def _json_faults(expected: bool | dict[str, Any] | None, reply: str) -> list[str]:
    if expected is None:
        return []
    try:
        value: Any = json.loads(reply)
    except (ValueError, RecursionError):
        return ["json: not a JSON value"] if expected is not False else []
    if expected is False:
        return ["json: a JSON value"]
    if expected is True:
        return []
    held: Mapping[str, Any] = cast("dict[str, Any]", value) if isinstance(value, dict) else {}
    return [f"json: {key} is {held.get(key)!r}, not {wanted!r}" for key, wanted in expected.items() if held.get(key) != wanted]
