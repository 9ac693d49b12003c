"""What a benchmark has computed or bought, kept under a hash of what made it, so that the same is never made twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from finetune_assets.storage import read_json, write_json
from finetune_assets.worker import endpoint

VERSION = 4  # raise it when decoding or likelihood changes
Rows = list[dict[str, Any]]


class Cache:
    """JSON values under a hash of what made them: `<folder>/ab/abcdef….json`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.found = self.made = 0

    def get(self, make: Callable[[], Any], *what: Any) -> Any:
        """The value of `what` (anything JSON can write), made where it is not there."""
        key = digest([VERSION, *what])
        path = self.folder / key[:2] / f"{key}.json"
        if path.exists():
            self.found += 1
            return read_json(path)
        self.made += 1
        value = make()
        write_json(path, value)
        return value


def ask(
    cache: Cache, where: endpoint.Endpoint, prompts: list[list[dict[str, Any]]], most: int, tools: Sequence[Rows] = ()
) -> tuple[Rows, Rows]:
    """An endpoint's answers, and those of them that were bought now. What is missing is asked for again in the next report, the
    rest is cached one by one. `tools`: what each prompt may call."""
    offered = tools or [[] for _ in prompts]

    def place(prompt: list[dict[str, Any]], functions: Rows) -> Path:
        key = digest([VERSION, "endpoint", where.url, where.model, most, prompt, *([functions] if functions else [])])
        return cache.folder / key[:2] / f"{key}.json"

    known = [place(*one) for one in zip(prompts, offered, strict=True)]
    wanted = [n for n, path in enumerate(known) if not path.exists()]
    asked = endpoint.answers(where, [prompts[n] for n in wanted], most, [offered[n] for n in wanted]) if wanted else []
    fresh = dict(zip(wanted, asked, strict=True))
    for n, answer in fresh.items():
        if answer["reply"] is not None:
            write_json(known[n], answer)
    cache.made += len(wanted)
    cache.found += len(prompts) - len(wanted)
    return [fresh[n] if n in fresh else read_json(known[n]) for n in range(len(prompts))], list(fresh.values())


def digest(value: Any) -> str:
    """Hash of a JSON value."""
    text = json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
