"""Greedy replies, likelihoods and waiting times of one causal model, in batches of like length.

Which rows share a batch depends on their lengths and order alone, never on timing or on what an earlier run left, so the same
rows give the same replies (a sum over a padded batch may differ in the last bit from the same sum alone).
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from transformers import GenerationConfig

from finetune_assets.storage import read_json
from finetune_assets.training import base_model as base_models
from finetune_assets.worker import decoding, models

ROWS = 32  # rows of a batch
TOKENS = 16_384  # padded tokens of a batch
SMALL = 100_000_000  # parameters, below which one thread a batch beats several threads on one batch


@dataclass(frozen=True)
class Reply:
    """What a model answered; `tokens` counts the end token, `stopped` says that it came."""

    text: str
    tokens: int
    stopped: bool


class Generator:
    """One causal model and its tokenizer; the weights are loaded when they are first needed."""

    def __init__(self, model: str, max_new_tokens: int, dtype: str = "float32") -> None:
        """`max_new_tokens` shrinks to half of the context where that is very small. Raises ModelUnavailable."""
        self.source, self.dtype = model, dtype
        self._model: Any = None
        self._lock = Lock()
        self.tokenizer: Any = models.load_tokenizer(model)
        config = models.load_config(model).get_text_config()
        self.context = int(getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 1024)
        self.vocabulary = int(config.vocab_size)
        self.max_new_tokens = min(max_new_tokens, max(1, self.context // 2))
        self.ends: set[int] = set(models.end_ids(self.tokenizer))

    @property
    def model(self) -> Any:
        """The model, set to plain greedy decoding whatever its own generation settings say. Raises ModelUnavailable."""
        with self._lock:  # batches run side by side
            if self._model is None:
                self._model = self._load()
            return self._model

    def _load(self) -> Any:
        model: Any = models.load_model(self.source, self.dtype)
        model.generation_config = GenerationConfig(
            do_sample=False,
            max_new_tokens=self.max_new_tokens,
            eos_token_id=sorted(self.ends),
            pad_token_id=self.tokenizer.pad_token_id,
        )
        return model

    @property
    def prompt_length(self) -> int:
        """Most tokens of a prompt that leave room for the longest reply."""
        return self.context - self.max_new_tokens

    @torch.inference_mode()
    def replies(self, prompts: Sequence[list[int]]) -> list[Reply]:
        """Greedy replies to one batch of prompts."""
        pad = int(self.tokenizer.pad_token_id)
        return [self._reply(row) for row in decoding.greedy(self.model, prompts, self.max_new_tokens, self.ends, pad)]

    @torch.inference_mode()
    def answers(
        self, prompts: Sequence[list[int]], references: Sequence[tuple[list[int], list[int]]]
    ) -> list[tuple[Reply, float]]:
        """Greedy replies to one batch of prompts, and the likelihood (nats) of what else could follow each: (ids, mask)."""
        pad = int(self.tokenizer.pad_token_id)
        said, nats = decoding.answered(self.model, prompts, references, self.max_new_tokens, self.ends, pad)
        return list(zip(map(self._reply, said), nats, strict=True))

    def _reply(self, ids: list[int]) -> Reply:
        end = next((n for n, token in enumerate(ids) if token in self.ends), None)
        kept = ids if end is None else ids[:end]
        text = str(self.tokenizer.decode(kept, skip_special_tokens=True)).strip()
        return Reply(text, len(kept) + (end is not None), end is not None)

    @torch.inference_mode()
    def likelihoods(self, examples: Sequence[tuple[list[int], list[int]]]) -> list[float]:
        """Negative log-likelihood in nats of the targets (mask 1) of one batch of (ids, mask)."""
        return decoding.likelihoods(self.model, examples, int(self.tokenizer.pad_token_id))

    @property
    def small(self) -> bool:
        """Whether its matrices are too small to be shared by threads: then batches are."""
        known = base_models.shape(self.source)  # from its files, so that a cached benchmark loads no weights
        return models.device().type == "cpu" and (known.parameters if known else self.parameters()) < SMALL

    @torch.inference_mode()
    def beside(self, prompts: Sequence[list[int]]) -> list[str] | None:
        """Greedy replies with the folder's adapter beside its base, as the router's engine has it; null where it has none."""
        folder = Path(base_models.resolve(self.source))
        where = next((one for one in (folder, folder / "adapter") if base_models.adapted(one) is not None), None)
        if where is None:
            return None
        model: Any = models.attach(models.load_model(str(base_models.adapted(where)), self.dtype), where).eval()
        model.generation_config = self.model.generation_config
        pad = int(self.tokenizer.pad_token_id)
        made = [decoding.greedy(model, [prompt], self.max_new_tokens, self.ends, pad)[0] for prompt in prompts]
        return [self._reply(row).text for row in made]

    def alone(self, prompt: list[int]) -> tuple[Reply, float]:
        """One greedy reply as it is served, and its wall seconds from prompt ids to text."""
        start = time.perf_counter()
        reply = self.replies([prompt])[0]
        return reply, time.perf_counter() - start

    def parameters(self) -> int:
        """Number of weights; tied ones count once."""
        return sum(p.numel() for p in self.model.parameters())


def content(model: str) -> dict[str, str]:
    """What decides a model's replies: sha256 of its weights, tokenizer and shape; or a hub model's id and revision.

    Nothing of when, how and from what it was trained: a retrain that gives the same weights has the same content.
    """
    where = base_models.resolve(model)
    if not Path(where).is_absolute():
        return base_models.identity(model)
    state = hashlib.sha256()
    for file in sorted(Path(where).iterdir()):
        if file.suffix in (".safetensors", ".bin") or file.name in ("tokenizer.json", "chat_template.jinja"):
            stat = file.stat()
            state.update(f"{file.name}\0{_sha256(str(file), stat.st_size, stat.st_mtime_ns)}\n".encode())
        elif file.name in ("config.json", "tokenizer_config.json", "adapter_config.json"):
            known = {k: v for k, v in read_json(file).items() if k not in NOT_CONTENT}
            state.update(f"{file.name}\0{json.dumps(known, sort_keys=True)}\n".encode())
    base = Path(where) / "adapter_config.json"
    if base.exists():
        state.update(str(content(read_json(base)["base_model_name_or_path"])).encode())
    return {"sha256": state.hexdigest()}


NOT_CONTENT = ("_name_or_path", "name_or_path", "base_model_name_or_path", "transformers_version", "revision")


@lru_cache(maxsize=256)
def _sha256(path: str, _size: int, _modified: int) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def batches(
    lengths: Sequence[int], tokens: int = TOKENS, rows: int = ROWS, after: Sequence[int] | None = None
) -> list[list[int]]:
    """Row numbers in batches of like length, longest first; at most `rows` rows and `tokens` padded tokens (one row at least).
    `after`: tokens that follow each row, padded on the other side.
    """
    made: list[list[int]] = []
    room = 0
    for row in sorted(range(len(lengths)), key=lambda n: (-lengths[n], n)):
        wanted = max(room, after[row]) if after else 0
        if made and len(made[-1]) < rows and (len(made[-1]) + 1) * (lengths[made[-1][0]] + wanted) <= tokens:
            made[-1].append(row)
            room = wanted
        else:
            made.append([row])
            room = after[row] if after else 0
    return made


def logit_tokens(vocabulary: int) -> int:
    """Padded tokens of a likelihood batch, so that its logits stay within decoding.LOGITS numbers."""
    return max(1, min(TOKENS, decoding.LOGITS // vocabulary))


def finite(nats: float) -> float | None:
    """The number, or null where the model gave none."""
    return nats if math.isfinite(nats) else None
