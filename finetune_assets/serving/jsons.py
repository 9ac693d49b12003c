"""JSON to and from bytes, by orjson, which a chat's seven passes make worth it; what orjson does not take goes to Python's own:
half characters, numbers beyond 64 bits, NaN."""

from __future__ import annotations

import json
from typing import Any

import orjson


def dumps(value: Any) -> bytes:
    """A value as JSON. Raises TypeError, ValueError."""
    try:
        return orjson.dumps(value)
    except TypeError:
        return json.dumps(value).encode()


def loads(data: bytes) -> Any:
    """A JSON text's value. Raises ValueError, RecursionError."""
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        return json.loads(data)
