"""How each candidate is asked: its prompts as they are, or with what helps it most on the validation split."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from finetune_assets.dataset.formats import read_lines
from finetune_assets.evaluation.candidates import with_shots
from finetune_assets.storage import replacing
from finetune_assets.worker import embed, endpoint, guards, retrieve
from finetune_assets.worker.cached import VERSION, Cache, Rows, digest
from finetune_assets.worker.generate import Generator
from finetune_assets.worker.progress import Progress


@dataclass(frozen=True)
class Candidate:
    """Who is asked what: a model here, or an endpoint."""

    name: str
    model: str | None
    endpoint: endpoint.Endpoint | None
    rows: Rows
    retrieve: bool
    shots: Sequence[Sequence[str]] = ()
    """Examples to choose from: user turn and reply of each."""
    cases: Rows = field(default_factory=Rows)
    """Cases of the standing suite: `messages`, `tools`, `tenant_id`."""

    @classmethod
    def of(cls, spec: dict[str, Any]) -> Candidate:
        """From the worker's spec."""
        where = endpoint.Endpoint(**spec["endpoint"]) if spec.get("endpoint") else None
        rows = list(read_lines(Path(spec["prompts"])))
        cases = list(read_lines(Path(spec["checks"]))) if spec.get("checks") else []
        return cls(spec["name"], spec.get("model"), where, rows, bool(spec.get("retrieve")), spec.get("shots") or (), cases)


class Asking:
    """Prompts of the candidates, with examples or passages where they have some."""

    def __init__(
        self, spec: dict[str, Any], cache: Cache, progress: Progress, encode: Callable[[list[str]], embed.Floats], encoder: str
    ) -> None:
        """`encode`: texts -> unit vectors, by the model named `encoder`."""
        self.spec, self.cache, self.progress, self.encode, self.encoder = spec, cache, progress, encode, encoder
        self.language = str(spec.get("language", "es"))
        self._index: retrieve.Index | None = None

    @property
    def index(self) -> retrieve.Index:
        """What retrieval can find."""
        if self._index is None:
            passages = retrieve.read_passages(Path(self.spec["passages"]))
            texts = [passage.query for passage in passages]
            key = digest([VERSION, "vectors", self.encoder, texts])
            path = self.cache.folder / key[:2] / f"{key}.npy"
            if not path.exists():
                vectors = self.encode(texts)
                with replacing(path) as draft, draft.open("wb") as file:
                    np.save(file, vectors)
            self._index = retrieve.Index(passages, lambda queries: self.encode(list(queries)), np.load(path))
        return self._index

    def rows(self, candidate: Candidate, rows: Rows, generator: Generator, about: list[Any]) -> tuple[Rows, dict[str, Any]]:
        """Rows (of the test set or the standing suite) with what the candidate is shown, and how that was chosen, as `retrieval`
        or `shots`. `about`: what the model is."""
        if candidate.retrieve:
            return self._retrieved(candidate, rows, generator, about)
        return self._shown(candidate, rows, generator, about) if candidate.shots else (rows, {})

    def _retrieved(self, candidate: Candidate, rows: Rows, generator: Generator, about: list[Any]) -> tuple[Rows, dict[str, Any]]:
        validation, passages = self._validation(), digest(Path(self.spec["passages"]).read_text(encoding="utf-8"))

        def make() -> Any:
            self.progress.update(f"{candidate.name} retrieval", 0, 1)
            choice, numbers = retrieve.choose(self.index, validation, lambda ways: _bits(generator, ways), self.language)
            return {**vars(choice), "chosen_on": numbers}

        made = self.cache.get(make, "retrieval", about, self.encoder, self.language, passages, validation)
        choice = retrieve.Choice(made["retriever"], made["k"], made["template"])
        key = [vars(choice), self.encoder, self.language, passages, rows]
        return self.cache.get(lambda: self.index.ask(rows, choice, self.language), "retrieved", *key), {"retrieval": made}

    def _shown(self, candidate: Candidate, rows: Rows, generator: Generator, about: list[Any]) -> tuple[Rows, dict[str, Any]]:
        validation, most = self._validation(), len(candidate.shots)

        def shown(rows: Rows, count: int) -> Rows:
            some = candidate.shots[most - count :]  # the last stand nearest to the question
            return [{**row, "messages": with_shots(row["messages"], some)} for row in rows]

        def ask(count: int) -> Rows:
            return shown(validation, count)

        def make() -> Any:
            count, numbers = retrieve.choose_shots(most, validation, ask, lambda ways: _bits(generator, ways))
            return {"k": count, "most": most, "chosen_on": numbers}

        made = self.cache.get(make, "shots", about, validation, candidate.shots)
        return shown(rows, made["k"]), {"shots": made}

    def _validation(self) -> Rows:
        return list(read_lines(Path(self.spec["validation"])))


def _bits(generator: Generator, ways: Sequence[Rows]) -> list[float]:
    """Bits per byte of the references of each of some ways to ask the same rows, over those that fit the context in every way
    that fits any; infinite for one that fits none, or where none fits all."""
    told = iter(guards.likelihoods(generator, [row for rows in ways for row in rows]))
    found = [[next(told) for _row in rows] for rows in ways]
    usable = [any(one["nats"] is not None for one in way) for way in found]
    rivals = [way for way, some in zip(found, usable, strict=True) if some]
    common = [n for n in range(len(ways[0]) if rivals else 0) if all(way[n]["nats"] is not None for way in rivals)]
    size = sum(rivals[0][n]["bytes"] for n in common) * math.log(2)
    return [
        sum(way[n]["nats"] for n in common) / size if some and size else math.inf for way, some in zip(found, usable, strict=True)
    ]
