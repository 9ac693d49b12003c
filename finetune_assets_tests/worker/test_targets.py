"""A common beginning that is computed once gives the loss and the gradient of rows that are computed whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from finetune_assets.training.tokens import IGNORED
from finetune_assets.worker import attention, models, targets
from finetune_assets.worker.stage import layout
from finetune_assets_tests.tiny_model import make_tiny_model

BEGIN = 24


def batch(rows: int = 4, length: int = 60) -> dict[str, torch.Tensor]:
    """Rows of different lengths with BEGIN tokens in common; two stretches of targets in each."""
    chance = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 400, (rows, length), generator=chance)
    ids[:, :BEGIN] = ids[0, :BEGIN]
    ids[:, BEGIN] = torch.arange(rows) + 10
    mask, labels = torch.ones_like(ids), torch.full_like(ids, IGNORED)
    for row in range(rows):
        end = length - 7 * row
        labels[row, end - 9 : end] = ids[row, end - 9 : end]
        labels[row, BEGIN + 3 : BEGIN + 5] = ids[row, BEGIN + 3 : BEGIN + 5]
        mask[row, end:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "short_rows"])
@pytest.mark.parametrize("architecture", ["qwen2", "llama", "gemma", "gpt2"])
def test_loss_and_gradients_are_those_of_whole_rows(tmp_path: Path, architecture: str, implementation: str):
    model: Any = models.load_model(make_tiny_model(tmp_path, architecture=architecture, template=architecture != "gpt2"))
    head, inputs = model.get_output_embeddings(), batch()
    assert targets.common_beginning(inputs["input_ids"], inputs["labels"]) == BEGIN - 1
    expected = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1].transpose(1, 2)
    loss = torch.nn.functional.cross_entropy(expected, inputs["labels"][:, 1:], ignore_index=IGNORED, reduction="sum")
    loss.backward()
    wanted = gradients(model)
    model.set_attn_implementation(implementation)
    for share in (False, True):
        made = targets.nats(model, head, inputs, share)
        torch.testing.assert_close(made, loss)
        made.backward()
        torch.testing.assert_close(gradients(model), wanted, atol=1e-4, rtol=1e-4)
    assert targets.can_share(model, head, inputs)


def test_a_sliding_window_shorter_than_the_beginning(tmp_path: Path):
    from transformers import AutoModelForCausalLM, MistralConfig

    config = MistralConfig(vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    config.num_key_value_heads, config.head_dim, config.sliding_window = 2, 16, 10
    model: Any = AutoModelForCausalLM.from_config(config).eval()
    inputs = batch()
    made = [targets.nats(model, model.get_output_embeddings(), inputs, share) for share in (False, True)]
    torch.testing.assert_close(made[1], made[0])


def test_what_counts_as_a_common_beginning():
    inputs = batch()
    ids, labels = inputs["input_ids"], inputs["labels"]
    assert targets.common_beginning(ids[:1], labels[:1]) == 0
    first = labels.clone()
    first[2, 20] = ids[2, 20]  # a target in it
    assert targets.common_beginning(ids, first) == 19
    other = ids.clone()
    other[1, 5] += 1
    assert targets.common_beginning(other, labels) == 0


def test_an_architecture_without_keys_and_values_is_found_out():
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=512, hidden_size=32, state_size=4, num_hidden_layers=1, use_mambapy=False)
    model: Any = MambaForCausalLM(config).eval()
    assert not targets.can_share(model, model.get_output_embeddings(), batch())


def test_grouped_queries_attend_alike(tmp_path: Path):
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    config.num_key_value_heads = 2
    model: Any = AutoModelForCausalLM.from_config(config).eval()
    head, made = model.get_output_embeddings(), []
    for name in ("sdpa", attention.NAME):
        model.set_attn_implementation(name)
        made.append(targets.nats(model, head, batch(), share=True))
    torch.testing.assert_close(made[1], made[0])


@pytest.mark.parametrize(("architecture", "chosen"), [("qwen2", attention.NAME), ("gpt2", attention.NAME)])
def test_short_rows_are_chosen_where_they_are_short(tmp_path: Path, architecture: str, chosen: str):
    model: Any = models.load_model(make_tiny_model(tmp_path, architecture=architecture))
    attention.choose(model, 2048)
    assert model.config._attn_implementation == "sdpa"
    attention.choose(model, 512)
    assert model.config._attn_implementation == chosen


@pytest.mark.parametrize(
    ("bf16", "installed", "supported", "laid"),
    [
        (True, True, True, "padding_free"),
        (False, True, True, "padded"),
        (True, False, True, "padded"),
        (True, True, False, "padded"),
    ],
)
def test_flash_attention_is_set_before_rows_are_laid_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bf16: bool, installed: bool, supported: bool, laid: str
):
    """The choice alone: it was never computed."""
    model: Any = models.load_model(make_tiny_model(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(attention, "is_flash_attn_2_available", lambda: installed)
    monkeypatch.setattr(type(model), "_supports_flash_attn", supported)
    monkeypatch.setattr(
        type(model), "set_attn_implementation", lambda self, name: setattr(self.config, "_attn_implementation", name)
    )
    attention.choose(model, 512, bf16=bf16)
    assert model.config._attn_implementation == (attention.FLASH if laid == "padding_free" else "sdpa")
    assert (layout({}, model), layout({"layout": "padded"}, model)) == (laid, "padded")


def test_scores_that_are_capped_are_left_to_transformers():
    from transformers import AutoModelForCausalLM, Gemma2Config

    config = Gemma2Config(vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    config.num_key_value_heads, config.head_dim = 2, 16
    model: Any = AutoModelForCausalLM.from_config(config)
    attention.choose(model, 512)
    assert model.config._attn_implementation == "eager"
