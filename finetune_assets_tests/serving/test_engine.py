"""The embedded engine: batched replies are those of one at a time, adapters stay apart, and damaged files are never served."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetune_assets.environment import Environment
from finetune_assets.errors import ModelUnavailable
from finetune_assets.serving.models import locate, model_name
from finetune_assets_tests.serving.shop import Shop
from finetune_assets_tests.tiny_model import dialogues, make_tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # peft calls it


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """LoRA adapters that change what the model says, each in its own way."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    made: list[Path] = []
    for seed in range(3):
        torch.manual_seed(seed)
        folder = tmp_path_factory.mktemp(f"adapter{seed}")
        config = LoraConfig(r=4, lora_alpha=64, target_modules=["q_proj", "v_proj", "o_proj"], init_lora_weights=False)
        get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(folder)
        made.append(folder)
    return made


def test_batched_replies_are_those_of_one_at_a_time(base: Path) -> None:
    from finetune_assets.serving.batching import Chat, Lane
    from finetune_assets.worker import decoding
    from finetune_assets.worker.generate import Generator
    from finetune_assets.worker.models import encode_prompt

    generator, lane = Generator(str(base), 20), Lane(str(base))
    chats = [chat[:-1] for chat in dialogues(10, turns=2)]
    prompts = [encode_prompt(generator.tokenizer, chat[n % 3 :], 400)[0] for n, chat in enumerate(chats)]
    said: dict[int, list[int]] = {n: [] for n in range(len(prompts))}
    ended: dict[int, str | None] = {}

    def deliver(n: int) -> Any:
        return lambda token, why: ended.update({n: why}) if token is None else said[n].append(token)

    for n, prompt in enumerate(prompts):  # they join and leave while others are under way
        lane.add(Chat(prompt, 5 + 3 * (n % 4), deliver(n)))
        lane.step()
        lane.step()
    gone = Chat(prompts[0], 20, deliver(0))
    lane.add(gone)
    gone.cancelled = True
    while lane.busy:
        lane.step()
    for n, prompt in enumerate(prompts):
        alone = decoding.greedy(generator.model, [prompt], 20, generator.ends, 0)[0]
        assert said[n] == alone[: len(said[n])]
        assert len(said[n]) == 5 + 3 * (n % 4) or alone[len(said[n])] in lane.ends
        assert ended[n] in ("length", "stop", "cancelled")
    assert lane.cache.starts == []


def test_adapters_share_a_batch_and_stay_apart(base: Path, adapters: list[Path]) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from finetune_assets.serving.batching import NO_ADAPTER, Chat, Lane
    from finetune_assets.worker.models import encode_prompt

    lane = Lane(str(base))
    for n, folder in enumerate(adapters):
        lane.add_adapter(f"t--v{n}", folder)
    names = [NO_ADAPTER, *(f"t--v{n}" for n in range(3))] * 2
    prompts = [encode_prompt(lane.tokenizer, chat[:-1], 400)[0] for chat in dialogues(len(names))]
    said: list[list[int]] = [[] for _ in names]
    for n, (name, prompt) in enumerate(zip(names, prompts, strict=True)):
        lane.add(Chat(prompt, 6, lambda token, _, n=n: None if token is None else said[n].append(token), adapter=name))
    while lane.busy:
        lane.step()
    import torch

    for n, (name, prompt) in enumerate(zip(names, prompts, strict=True)):
        model: Any = AutoModelForCausalLM.from_pretrained(base)
        if name != NO_ADAPTER:
            model = PeftModel.from_pretrained(model, adapters[int(name[-1])])
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            made = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
        alone = made[0, len(prompt) :].tolist()
        assert said[n] == alone[: len(said[n])]
        assert len(said[n]) >= min(6, next((k for k, t in enumerate(alone) if t in lane.ends), 6))
    assert said[1] != said[2]


def test_damaged_files_are_never_served(tmp_path: Path, base: Path) -> None:
    shop = Shop(tmp_path, base=str(base))
    version = shop.version("a", model=base)
    environment = Environment.read(shop.environment)
    folder = Path(locate(model_name("aurora", version), environment).base)
    assert folder.is_relative_to(shop.home)
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ModelUnavailable, match="not those that were registered"):
        locate(model_name("aurora", version), environment)
    weights.unlink()
    with pytest.raises(ModelUnavailable, match="not those that were registered"):
        locate(model_name("aurora", version), environment)
    with pytest.raises(ModelUnavailable, match="no name of this engine"):
        locate("gpt-4", environment)
