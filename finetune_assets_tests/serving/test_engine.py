"""The embedded engine: batched replies are those of one at a time, adapters stay apart, and damaged files are never served."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from finetune_assets.environment import Environment
from finetune_assets.errors import ModelUnavailable
from finetune_assets.serving.models import Location, locate, model_name
from finetune_assets.storage import write_json
from finetune_assets.training import base_model
from finetune_assets_tests.serving.shop import Shop, wait_for
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


SYSTEMS = ("Eres el asistente de una clínica dental. Responde en español, breve y amable.", "Eres un restaurante de Madrid.")


@pytest.mark.parametrize("adapted", [False, True])
def test_a_beginning_that_is_remembered_changes_no_reply(base: Path, adapters: list[Path], adapted: bool) -> None:
    """Chats with one of two system prompts or none, with and without adapters, of all lengths: the replies of a lane that
    remembers nothing; and each system prompt of each adapter is computed once."""
    from finetune_assets.serving.batching import NO_ADAPTER, Chat, Lane
    from finetune_assets.worker.models import encode_prompt

    chats = [chat[2 * (n % 2) : -1] for n, chat in enumerate(dialogues(12, turns=2, system=""))]
    chats = [[{"role": "system", "content": SYSTEMS[n % 3]}, *chat] if n % 3 < 2 else chat for n, chat in enumerate(chats)]

    def replies(remembers: bool) -> tuple[dict[int, list[int]], Lane]:
        lane = Lane(str(base))
        for n, folder in enumerate(adapters):
            lane.add_adapter(f"t--v{n}", folder)
        said: dict[int, list[int]] = {n: [] for n in range(2 * len(chats))}
        for n, made in said.items():
            prompt = encode_prompt(lane.tokenizer, chats[n % len(chats)], 400)[0]
            shared = lane.shared(prompt, chats[n % len(chats)]) if remembers else 0
            adapter = f"t--v{n % 2}" if adapted else NO_ADAPTER
            deliver: Any = lambda token, _, made=made: None if token is None else made.append(token)  # noqa: E731
            lane.add(Chat(prompt, 8, deliver, adapter=adapter, shared=shared))
            if n % 5 == 0:
                lane.step()
        while lane.busy:
            lane.step()
        return said, lane

    (with_it, lane), (without, _) = replies(True), replies(False)
    assert with_it == without
    assert sum(map(len, with_it.values())) > 40
    assert len(lane.prefixes.kept) == 2 * (2 if adapted else 1)
    assert {adapter for adapter, _ in lane.prefixes.kept} == ({"t--v0", "t--v1"} if adapted else {NO_ADAPTER})


def test_the_beginning_that_nobody_asks_for_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from finetune_assets.serving import prefixes

    def layers(tokens: int) -> Any:
        return [(torch.ones(1, 2, tokens, 4), torch.ones(1, 2, tokens, 4))]

    monkeypatch.setattr(prefixes, "MOST_BYTES", 3 * 20 * 64)
    kept = prefixes.Prefixes()
    kept.keep("", range(3), layers(3))
    assert not kept.kept  # too short to be worth it
    for start in range(3):
        kept.keep("", range(start, start + 20), layers(20))
    assert kept.find("", range(20))
    assert not kept.find("other", range(20))
    kept.keep("", range(9, 29), layers(20))
    assert not kept.find("", range(1, 21))
    assert kept.find("", range(20))
    assert kept.bytes == 3 * 20 * 64


def test_what_fails_while_it_joins_is_told(base: Path) -> None:
    """An adapter that is not there: the chat hears of it and the lane goes on, as after memory ran out."""
    from finetune_assets.serving.batching import Chat, Lane

    lane, told = Lane(str(base)), list[tuple[int | None, str | None]]()
    lane.adapters.numbers["there"] = 1
    lane.add(Chat([1, 2, 3], 2, lambda token, why: told.append((token, why)), adapter="gone"))
    with pytest.raises(KeyError):
        lane.step()
    lane.fail("error: KeyError")
    assert told == [(None, "error: KeyError")]
    assert not lane.busy


# over HTTP


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Any]]:
    """The engine's server on a socket, with the project's own small model; its address and the engine itself."""
    import uvicorn

    from finetune_assets.serving.engine import Api, Engine

    engine = Engine(Environment.read(Shop(tmp_path_factory.mktemp("shop")).environment))
    engine.load("aurora--base")
    server = uvicorn.Server(uvicorn.Config(Api(engine).app, port=0, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    assert wait_for(lambda: server.started)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1", engine
    server.should_exit = True
    thread.join(10)
    engine.ended = True


def _asked(content: str = "¿Tienen hora mañana?", most: int = 40, **more: Any) -> dict[str, Any]:
    system = {"role": "system", "content": SYSTEMS[0]}
    return {"model": "aurora--base", "messages": [system, {"role": "user", "content": content}], "max_tokens": most, **more}


def test_a_streamed_reply_is_the_whole_one_with_its_usage(engine: tuple[str, Any]) -> None:
    import openai

    url, inside = engine
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    with client:
        for content in ("¿Tienen hora mañana?", "Ñandú, pingüino, café: ¿qué?", "🦷"):
            asked: Any = _asked(content)
            whole = client.chat.completions.create(**asked)
            chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
            said = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
            assert said.strip() == whole.choices[0].message.content
            assert chunks[-1].usage == whole.usage
            assert chunks[-1].usage is not None
            assert chunks[-1].usage.completion_tokens > 1
            assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
            ends = [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason]
            assert ends == [whole.choices[0].finish_reason]
            assert chunks[0].choices[0].delta.role == "assistant"
            assert len(chunks) > 3  # piece by piece
    assert inside.pending == 0


@pytest.mark.parametrize("stop", ["a", ["zzz", "reserv"], "ué te gust", "Claro", []])
def test_a_reply_ends_before_a_stop_text_whole_and_streamed(engine: tuple[str, Any], stop: Any) -> None:
    import openai

    url, inside = engine
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    with client:
        plain = client.chat.completions.create(**_asked()).choices[0].message.content or ""
        whole = client.chat.completions.create(**_asked(stop=stop))
        chunks = list(client.chat.completions.create(**_asked(stop=stop), stream=True))
    texts = [stop] if isinstance(stop, str) else stop
    end = min((at for text in texts if (at := plain.find(text)) >= 0), default=len(plain))
    assert whole.choices[0].message.content == plain[:end].strip()
    assert "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices).strip() == plain[:end].strip()
    assert whole.choices[0].finish_reason == chunks[-1].choices[0].finish_reason == "stop"
    assert wait_for(lambda: inside.pending == 0, 5)


def test_a_stream_that_its_reader_leaves_makes_room(engine: tuple[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    url, inside = engine
    lane = next(iter(inside.lanes.values()))
    step = lane.step
    monkeypatch.setattr(lane, "step", lambda: (time.sleep(0.02), step()))  # the reader leaves first
    body = _asked(most=200, stream=True)
    with httpx.Client(trust_env=False, timeout=20) as client:
        ends = set(lane.ends)
        lane.ends.clear()  # it would go on for 200 tokens
        try:
            with client.stream("POST", f"{url}/chat/completions", json=body) as answer:
                assert sum(line.startswith("data:") for line, _ in zip(answer.iter_lines(), range(5), strict=False)) >= 2
                chat = lane.rows[0]
            assert wait_for(lambda: not lane.rows and inside.pending == 0, 5)
            assert chat.cancelled
            assert chat.made < 200
        finally:
            lane.ends |= ends
        assert client.post(f"{url}/chat/completions", json={**body, "stream": False, "max_tokens": 3}).status_code == 200


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


def test_a_base_that_was_put_out_of_memory_comes_back_with_its_adapters(
    tmp_path: Path, base: Path, adapters: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetune_assets.serving import engine as module
    from finetune_assets.serving.batching import Chat

    shop = Shop(tmp_path, base=str(base))
    for name in ("full", "other"):
        shutil.copytree(base, tmp_path / name)
        (tmp_path / name / "name.txt").write_text(name)
    models = [*adapters[:2], tmp_path / "full", tmp_path / "other"]
    one, two, full, other = (f"aurora--{shop.version(letter, model)}" for letter, model in zip("abcd", models, strict=True))
    monkeypatch.setattr(module, "MOST_LANES", 2)
    engine = module.Engine(Environment.read(shop.environment))

    def say(name: str) -> list[int]:
        engine.load(name)
        said, ended = list[int](), list[str | None]()

        def deliver(token: int | None, reason: str | None) -> None:
            if token is None:
                engine.done()
                ended.append(reason)
            else:
                said.append(token)

        engine.submit(name, Chat([5, 6, 7, 8], 6, deliver, adapter=engine.names[name][1]))
        assert wait_for(lambda: ended)
        assert ended[0] in ("stop", "length")
        return said

    try:
        before = {name: say(name) for name in (one, two)}
        assert before[one] != before[two]
        say(full)
        say(other)
        assert set(engine.names) == {full, other}  # `/v1/models` lists no more
        engine.load("aurora--base")  # the lane, without adapters
        assert {name: say(name) for name in (two, one)} == before
    finally:
        engine.ended = True


def test_an_adapter_is_served_on_the_base_that_it_was_trained_on_alone(
    tmp_path: Path, base: Path, adapters: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from huggingface_hub import constants
    from safetensors.torch import load_file, save_file

    from finetune_assets.serving.batching import Lane

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    other = tmp_path / "base"
    shutil.copytree(base, other)
    shop = Shop(tmp_path / "shop", base=str(other))
    version = shop.version("a", model=adapters[0])
    environment, name = Environment.read(shop.environment), model_name("aurora", version)
    folder = shop.home / "models" / "aurora" / version
    write_json(folder / "spec.json", {"base_model_identity": base_model.identity(str(base))})
    assert locate(name, environment) == Location(str(other), folder)
    weights = load_file(other / "model.safetensors")
    save_file({key: value + 1 for key, value in weights.items()}, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelUnavailable, match="not the one that its adapter was trained on"):
        locate(name, environment)

    # of the hub: the commit that the training wrote down, not the newest
    snapshots = tmp_path / "hub" / "models--org--tiny" / "snapshots"
    shutil.copytree(base, snapshots / ("a" * 40))
    shutil.copytree(other, snapshots / ("b" * 40))
    (snapshots.parent / "refs").mkdir()
    (snapshots.parent / "refs" / "main").write_text("b" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    hub = Shop(tmp_path / "hub_shop", base="org/tiny")
    version = hub.version("a", model=adapters[0])
    folder = hub.home / "models" / "aurora" / version
    write_json(folder / "spec.json", {"base_model_identity": {"id": "org/tiny", "revision": "a" * 40}})
    environment = Environment.read(hub.environment)
    assert locate(model_name("aurora", version), environment) == Location("org/tiny", folder, "a" * 40)
    assert locate("aurora--base", environment) == Location("org/tiny", None, "b" * 40)
    for revision, at in (("a", base), ("b", other)):
        lane = Lane("org/tiny", revision=40 * revision)
        assert torch.equal(lane.model.lm_head.weight, load_file(at / "model.safetensors")["model.embed_tokens.weight"])


def test_merged_versions_share_the_base_that_their_adapters_were_trained_on(
    tmp_path: Path, base: Path, adapters: list[Path]
) -> None:
    """As a training with `adapter: lora` leaves them: merged weights, and the adapter alone in `adapter/`."""
    from peft import PeftModel
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    from finetune_assets.serving import engine as module
    from finetune_assets.serving.batching import Chat, Lane

    own = tmp_path / "base"
    shutil.copytree(base, own)
    shop = Shop(tmp_path / "shop", base=str(own))
    environment = Environment.read(shop.environment)
    folders: dict[str, Path] = {}
    for letter, adapter in zip("ab", adapters, strict=False):
        merged = tmp_path / letter
        shutil.copytree(base, merged)
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).merge_and_unload().save_pretrained(merged)
        shutil.copytree(adapter, merged / "adapter")
        version = shop.version(letter, model=merged)
        folder = shop.home / "models" / "aurora" / version
        write_json(folder / "spec.json", {"base_model_identity": base_model.identity(str(own))})
        folders[model_name("aurora", version)] = folder

    def said(lane: Lane, adapter: str) -> list[int]:
        tokens = list[int]()
        lane.add(Chat([5, 6, 7, 8], 6, lambda token, _: None if token is None else tokens.append(token), adapter=adapter))
        while lane.busy:
            lane.step()
        return tokens

    engine = module.Engine(environment)
    try:
        for name in ("aurora--base", *folders):
            engine.load(name)
        assert set(engine.lanes) == {str(own)}
        replies = [said(engine.lanes[str(own)], name) for name in folders]
        assert replies == [said(Lane(str(folder)), "") for folder in folders.values()]
        assert replies[0] != replies[1]
    finally:
        engine.ended = True

    weights = load_file(own / "model.safetensors")
    save_file({key: value + 1 for key, value in weights.items()}, own / "model.safetensors", {"format": "pt"})
    assert [locate(name, environment) for name in folders] == [Location(str(folder), None) for folder in folders.values()]
    shutil.rmtree(own)
    assert [locate(name, environment) for name in folders] == [Location(str(folder), None) for folder in folders.values()]


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
