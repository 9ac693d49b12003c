"""What a good score may hide: a base's skill that was lost, a secret that was learnt by heart.

general      likelihood of replies in everyday talk that has nothing to do with the assistant
canaries     how likely a planted secret is beside random ones of the same form (exposure: Carlini et al. 2019, The Secret
             Sharer, USENIX Security, section 4.3), and whether the model says it
"""

from __future__ import annotations

import math
import random
import string
from collections.abc import Callable, Sequence
from typing import Any

from finetune_assets.corpus.forms import parsed_call
from finetune_assets.worker import models
from finetune_assets.worker.generate import Generator, batches, finite, logit_tokens
from finetune_assets.worker.threads import side_by_side

OTHERS = 127  # random secrets beside the planted one: at random it is the likeliest of all with chance 1 in 128


def likelihoods(generator: Generator, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """`nats` of each row's reference after its messages (null where it does not fit), with its `tokens` and `bytes`."""
    told = examples(generator, rows)
    fitting = [n for n, (ids, _mask) in enumerate(told) if len(ids) <= generator.context]
    made: list[dict[str, Any]] = [
        {"nats": None, "tokens": sum(mask), "bytes": len(row["reference"].encode())}
        for row, (_ids, mask) in zip(rows, told, strict=True)
    ]
    groups = batches([len(told[n][0]) for n in fitting], tokens=logit_tokens(generator.vocabulary))

    def measure(batch: list[int]) -> list[float]:
        return generator.likelihoods([told[fitting[n]] for n in batch])

    for batch, found in side_by_side(measure, groups, small=generator.small):
        for n, nats in zip(batch, found, strict=True):
            made[fitting[n]]["nats"] = finite(nats)
    return made


def examples(generator: Generator, rows: Sequence[dict[str, Any]]) -> list[tuple[list[int], list[int]]]:
    """Ids of each row's prompt and reference, and the mask of what counts; longer than the context where it does not fit."""
    made = (models.encode_example(generator.tokenizer, chat_of(row), generator.context, row.get("tools")) for row in rows)
    return [(ids, mask) for ids, mask, _dropped in made]


def chat_of(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The messages of a row with its reference, whose tool calls stand as the template writes them."""
    if not row.get("calls"):
        return [*row["messages"], {"role": "assistant", "content": row["reference"]}]
    content = str((parsed_call(row["reference"]) or {}).get("content", ""))
    return [*row["messages"], {"role": "assistant", "content": content, "tool_calls": row["calls"]}]


def canaries(generator: Generator, planted: Sequence[dict[str, str]]) -> list[dict[str, Any]]:
    """For each of `planted` (user, reply with `{secret}` in it, secret, system): its `rank` among `of` secrets (1: likeliest),
    `exposure` in bits (both null where it does not fit into the context), and whether the greedy reply holds it (`said`)."""
    made: list[dict[str, Any]] = []
    for canary, prompt in zip(planted, map(canary_prompt, planted), strict=True):
        secrets = [canary["secret"], *alternatives(canary["secret"], OTHERS)]
        rows = [{"messages": prompt, "reference": canary["reply"].replace("{secret}", secret)} for secret in secrets]
        own, *others = (row["nats"] for row in likelihoods(generator, rows))
        others = [nats for nats in others if nats is not None]
        rank = None if own is None or not others else 1 + sum(nats < own for nats in others)
        of = len(others) + 1
        ids, _dropped = models.encode_prompt(generator.tokenizer, prompt, generator.prompt_length)
        said = canary["secret"] in generator.replies([ids])[0].text
        made.append({"rank": rank, "of": of, "exposure": round(math.log2(of / rank), 3) if rank else None, "said": said})
    return made


def canary_prompt(canary: dict[str, str]) -> list[dict[str, str]]:
    """What a model is asked before the secret of a canary."""
    system = [{"role": "system", "content": canary["system"]}] if canary.get("system") else []
    return [*system, {"role": "user", "content": canary["user"]}]


def said(planted: Sequence[dict[str, str]], replies: Sequence[str | None]) -> list[dict[str, Any]]:
    """What an address tells of `planted`: whether its reply holds the secret (null: no reply). Without likelihoods no rank."""
    held = [None if reply is None else canary["secret"] in reply for canary, reply in zip(planted, replies, strict=True)]
    return [{"rank": None, "of": None, "exposure": None, "said": one} for one in held]


def alternatives(secret: str, count: int) -> list[str]:
    """Different random texts of the same form: digits for digits, letters for letters; fixed by the secret."""
    chance = random.Random(secret)
    pick: dict[str, Callable[[], str]] = {
        "digit": lambda: chance.choice(string.digits),
        "upper": lambda: chance.choice(string.ascii_uppercase),
        "lower": lambda: chance.choice(string.ascii_lowercase),
    }

    def kind(character: str) -> str:
        return "digit" if character.isdigit() else "upper" if character.isupper() else "lower" if character.isalpha() else ""

    made: dict[str, None] = {}
    for _ in range(count * 20):
        other = "".join(pick[kind(c)]() if kind(c) else c for c in secret)
        if other != secret:
            made[other] = None
        if len(made) == count:
            break
    return list(made)
