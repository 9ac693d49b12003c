"""Replies of the base model to 96 prompts, beside `model.generate` one at a time."""

from __future__ import annotations

import polars as pl
import torch

from benchmarks.measure import ROOT, SAMPLE, Row, cpu
from finetune_assets.worker.generate import Generator


def rows(rounds: int) -> list[Row]:
    """The sample's first questions, on one thread."""
    torch.set_num_threads(1)
    generator = Generator(str(ROOT / "data" / "base_model"), 64)
    questions = pl.read_parquet(SAMPLE / "messages.parquet").filter(pl.col("role") == "user")["content"].drop_nulls()[:96]
    encode = generator.tokenizer.apply_chat_template
    prompts = [encode([{"role": "user", "content": q}], add_generation_prompt=True, return_dict=False) for q in questions]

    def ours() -> int:
        by_length = sorted(prompts, key=len)
        return sum(reply.tokens for n in range(0, 96, 32) for reply in generator.replies(by_length[n : n + 32]))

    def theirs() -> int:
        count = 0
        for prompt in prompts:
            mask = torch.ones(1, len(prompt), dtype=torch.long)
            out = generator.model.generate(input_ids=torch.tensor([prompt]), attention_mask=mask)
            count += out.shape[1] - len(prompt)
        return count

    mine, peer = cpu(ours, rounds), cpu(theirs, 1)
    return [Row("greedy replies to 96 prompts, 3M model", mine, "model.generate, one at a time", peer, note="one thread")]
