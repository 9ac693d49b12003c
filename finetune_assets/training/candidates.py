"""Candidate base models side by side before one is trained: size, licence, language, memory, time, cost, waiting time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from finetune_assets.assistants.settings import Assistant
from finetune_assets.errors import FinetuneError
from finetune_assets.training import base_model, machine
from finetune_assets.training.base_model import Shape
from finetune_assets.training.spec import request_for
from finetune_assets.training.trainer import Estimate, Trainer, TrainingRequest

REPLY_TOKENS = 40
"""Tokens of a usual reply."""
BYTES_PER_SECOND = {"cpu": 10e9, "gpu": 1e12}
"""What a machine reads from memory in a second: a token of a reply reads every weight once (float32 here, bfloat16 on a GPU)."""
LAYER_SECONDS = 0.0004
"""What a layer costs beside that, measured with the shipped base model on one core (6 layers, 2.7 ms a token)."""


@dataclass(frozen=True)
class Candidate:
    """A row of the table; None where the model is not on this machine or its card does not say."""

    base_model: str
    parameters: int | None
    licence: str | None
    languages: tuple[str, ...]
    memory_gib: float | None
    minutes: float | None
    usd: float | None
    reply_seconds: float | None
    speaks: bool | None
    """Whether its card names the assistant's language."""
    fits: bool | None
    """Whether this machine has the memory; None where it is not the one that trains."""
    remark: str = ""

    def row(self) -> dict[str, Any]:
        """For a table."""
        return {
            "base model": self.base_model,
            "parameters (M)": None if self.parameters is None else round(self.parameters / 1e6, 1),
            "licence": self.licence,
            "languages": ", ".join(self.languages) or None,
            "memory (GiB)": self.memory_gib,
            "training (min)": self.minutes,
            "cost (US$)": self.usd,
            "reply (s)": self.reply_seconds,
            "remark": self.remark,
        }


def ranked(
    assistant: Assistant, trainer: Trainer, request: TrainingRequest, estimate: Estimate, *, here: bool = True
) -> list[Candidate]:
    """`base_model` and the assistant's `candidates`, best first: what fits this machine and speaks the language, then the larger
    one, which usually writes better; what cannot be trained comes last, with the reason. `estimate`: of `request`, made already;
    `here`: whether this machine trains.
    """
    rows = [_candidate(assistant, request.base_model, estimate, here)]
    for name in dict.fromkeys(assistant.candidates):
        if name == request.base_model:
            continue
        try:
            other, _ = request_for(assistant.model_copy(update={"base_model": name}), request.dataset, request.fingerprint)
            other = replace(other, run_key=request.run_key)
            trainer.validate(other)
            rows.append(_candidate(assistant, name, trainer.estimate(other), here))
        except FinetuneError as error:
            rows.append(_unusable(name, str(error)))
    return sorted(
        rows, key=lambda one: ((True, None, False).index(one.fits), not one.speaks, -(one.parameters or 0), one.base_model)
    )


def _candidate(assistant: Assistant, name: str, estimate: Estimate, here: bool) -> Candidate:
    shape, card = base_model.shape(name), base_model.card(name)
    languages = _languages(card.get("language"))
    memory = estimate.memory_bytes
    room = machine.room()
    fits = None if memory is None or not here else room is None or memory <= room
    remarks = [
        *(["more memory than this machine has"] if fits is False else []),
        *([] if not languages or assistant.language in languages else [f"its card does not name {assistant.language}"]),
        *([] if card.get("license") else ["its card names no licence"]),
    ]
    return Candidate(
        base_model=name,
        parameters=shape.parameters if shape else None,
        licence=str(card["license"]) if card.get("license") else None,
        languages=languages,
        memory_gib=None if memory is None else round(memory / 2**30, 2),
        minutes=None if estimate.seconds is None else round(estimate.seconds / 60, 1),
        usd=estimate.usd,
        reply_seconds=None if shape is None else round(reply_seconds(shape), 3),
        speaks=assistant.language in languages if languages else None,
        fits=fits,
        remark="; ".join(remarks),
    )


def _unusable(name: str, reason: str) -> Candidate:
    return Candidate(name, None, None, (), None, None, None, None, None, False, reason)


def reply_seconds(shape: Shape) -> float:
    """Expected waiting time of one reply of REPLY_TOKENS on this machine."""
    kind, size = ("gpu", 2) if machine.has_gpu() else ("cpu", 4)
    return REPLY_TOKENS * (shape.parameters * size / BYTES_PER_SECOND[kind] + LAYER_SECONDS * shape.layers)


def _languages(named: Any) -> tuple[str, ...]:
    if isinstance(named, str):
        return (named,)
    return tuple(str(one) for one in named) if isinstance(named, Sequence) else ()
