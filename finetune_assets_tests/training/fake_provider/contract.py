"""OpenAI's published description as validators: each request and each answer of the fake is held against it.

The slice is OpenAPI 3.1 with leftovers of 3.0 (`exclusiveMinimum: true`, `nullable`), which are rewritten first. It has no chat:
the fake's `/chat/completions` and everything under `/_fake` stay unvalidated.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

FILE = Path(__file__).with_name("openai_fine_tuning.openapi.json")


@cache
def document() -> dict[str, Any]:
    return modern(json.loads(FILE.read_text(encoding="utf-8")))


def modern(node: Any) -> Any:
    """A schema of OpenAPI 3.0 as JSON Schema 2020-12."""
    if isinstance(node, list):
        return [modern(item) for item in node]
    if not isinstance(node, dict):
        return node
    node = {key: modern(value) for key, value in node.items()}
    for bound, plain in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        if node.get(bound) is True:
            node[bound] = node.pop(plain)
        elif node.get(bound) is False:
            node.pop(bound)
    if node.pop("nullable", False):
        rest = {key: node.pop(key) for key in list(node) if key != "description"}
        node["anyOf"] = [rest, {"type": "null"}]
    return node


@cache
def _routes() -> list[tuple[re.Pattern[str], str]]:
    return [(re.compile("^" + re.sub(r"\{[^}]+\}", "[^/]+", path) + "$"), path) for path in document()["paths"]]


def operation(method: str, path: str) -> dict[str, Any] | None:
    """The described operation of a path below `/v1`; null where the description has none."""
    for pattern, template in _routes():
        if pattern.match(path):
            return document()["paths"][template].get(method.lower())
    return None


def problems(schema: dict[str, Any], value: Any) -> list[str]:
    """What is wrong with a value, by the schema's own words."""
    whole = {**schema, "components": document()["components"]}
    found = Draft202012Validator(whole).iter_errors(value)
    return [f"{'/'.join(map(str, error.absolute_path)) or '(whole)'}: {error.message[:300]}" for error in found]


def request_problems(method: str, path: str, body: Any) -> list[str]:
    """What is wrong with a request's body."""
    described = operation(method, path)
    content = ((described or {}).get("requestBody") or {}).get("content") or {}
    schema = next((entry["schema"] for entry in content.values()), None)
    return problems(schema, body) if schema is not None and body is not None else []


def answer_problems(method: str, path: str, body: Any) -> list[str]:
    """What is wrong with an answer of 200."""
    described = operation(method, path)
    content = (((described or {}).get("responses") or {}).get("200") or {}).get("content") or {}
    schema = (content.get("application/json") or {}).get("schema")
    return problems(schema, body) if schema is not None else []
