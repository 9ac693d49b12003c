"""Builds the small base model of the demo and the tests: a tokenizer and a Qwen2 of 3 million parameters, on the CPU.

Run from the repository root: `python data/build_base_model.py --english sgd_general.parquet --out data/base_model`.
The Spanish dialogues are made by `data.generator general`; the English ones are the Schema-Guided Dialogue data set,
in the same shape.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from data.generator.general import write_general

HERE = Path(__file__).resolve().parent
BOS, END, PAD = "<|bos|>", "<|end|>", "<|pad|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|tools|>", "<|call|>")
# Qwen2's own rule: `AutoTokenizer` puts it in place for this model type whatever the file says, so train with it.
PIECES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEMPLATE = (
    "{{ bos_token }}{% if tools %}<|tools|>{% for tool in tools %}{{ tool | tojson }}{% endfor %}<|end|>{% endif %}"
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "<|assistant|>{% generation %}{{ message['content'] or '' }}{% if message['tool_calls'] %}"
    "{% for call in message['tool_calls'] %}<|call|>{{ call['function'] | tojson }}{% endfor %}{% endif %}"
    "<|end|>{% endgeneration %}"
    "{% else %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SYSTEM = {
    "es": (
        "Eres el asistente virtual de {}. Responde en español, de forma breve y amable.",
        "Eres un asistente que atiende a clientes de {}.",
        "Asistente de {}. Ayuda con reservas, precios y horarios.",
        "Eres el asistente de {}: responde con claridad, pide los datos que falten y confirma.",
        "Atiendes el chat de {}. Sé amable y concreto. No inventes datos.",
        "Eres un asistente útil.",
        "Responde siempre en español.",
        "Eres la recepcionista virtual de {}. Usa frases cortas.",
    ),
    "en": (
        "You are a helpful assistant.",
        "You are the assistant of a {} service. Be brief and polite.",
        "Help the user with {}.",
        "Answer in English.",
    ),
}
Dialogue = tuple[str, str, list[dict[str, str]]]


@dataclass(frozen=True)
class Recipe:
    """The dials of the build."""

    seed: int = 11
    dialogues: int = 50_000
    vocabulary: int = 2_560
    window: int = 512
    batch: int = 4
    steps: int = 6_000
    warmup: int = 100
    rate: float = 3e-3
    muon_rate: float = 0.02
    spanish: float = 0.75
    held_out: int = 100
    processes: int = 2


def read(path: Path, language: str) -> list[Dialogue]:
    """(language, domain, messages) of every dialogue that starts with the user."""
    rows = pq.read_table(path).to_pylist()
    return [(language, row["services"][0].split("_")[0].lower(), merged(row["messages"])) for row in rows if row["messages"]]


def merged(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """Messages in which the roles alternate: several in a row become one."""
    out: list[dict[str, str]] = []
    for message in messages:
        if out and out[-1]["role"] == message["role"]:
            out[-1] = {**message, "content": out[-1]["content"] + "\n" + message["content"]}
        else:
            out.append(dict(message))
    return out


def train_tokenizer(dialogues: list[Dialogue], recipe: Recipe) -> PreTrainedTokenizerFast:
    """Byte-level BPE of both languages; digits stand alone, so that hours and prices are copied digit by digit."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocabulary,
        special_tokens=[BOS, END, PAD, *ROLES],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [message["content"] for _, _, messages in dialogues for message in messages]
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=list(ROLES),
        chat_template=TEMPLATE,
        model_max_length=2_048,
        clean_up_tokenization_spaces=False,
    )


def render(dialogue: Dialogue, rng: random.Random, shots: list[Dialogue]) -> str:
    """The text of one training document: perhaps a system prompt, perhaps other dialogues before, as in a few-shot prompt."""
    language, domain, messages = dialogue
    text = BOS
    if rng.random() < (0.6 if language == "es" else 0.25):
        text += "<|system|>" + rng.choice(SYSTEM[language]).format(domain) + END
    for message in [message for shot in shots for message in shot[2]] + messages:
        text += f"<|{message['role']}|>{message['content']}{END}"
    return text


def documents(dialogues: list[Dialogue], tokenizer: PreTrainedTokenizerFast, rng: random.Random, window: int) -> list[list[int]]:
    """Token ids of every dialogue, one in eight with one or two other dialogues of its domain before it."""
    by_domain: dict[str, list[Dialogue]] = {}
    for dialogue in dialogues:
        by_domain.setdefault(dialogue[1], []).append(dialogue)
    texts = []
    for dialogue in dialogues:
        few = (
            rng.sample(by_domain[dialogue[1]], min(rng.choice((1, 2)), len(by_domain[dialogue[1]])))
            if dialogue[0] == "es" and rng.random() < 0.125
            else []
        )
        texts.append(render(dialogue, rng, few))
    return [ids[: window + 1] for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]


def pack(docs: list[list[int]], length: int, pad: int, rng: random.Random) -> list[list[int]]:
    """Windows that each start with a whole document; the shortest rest that fits fills the end."""
    order = docs[:]
    rng.shuffle(order)
    windows: list[list[int]] = []
    open_windows: list[list[int]] = []
    for doc in order:
        fits = [window for window in open_windows if len(window) + len(doc) <= length]
        if fits:
            max(fits, key=len).extend(doc)
        else:
            open_windows.append(list(doc))
        if len(open_windows) > 24:
            full = max(open_windows, key=len)
            open_windows.remove(full)
            windows.append(full)
    return [window + [pad] * (length - len(window)) for window in windows + open_windows]


def new_model(tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    """An untrained Qwen2: width 192, 6 layers, 6 heads, tied embeddings."""
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=6,
            num_attention_heads=6,
            num_key_value_heads=6,
            max_position_embeddings=2_048,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def rate_at(step: int, recipe: Recipe) -> float:
    """The share of the peak rate: warm-up, plateau, and a linear fall over the last 40 percent."""
    tail = 0.4 * recipe.steps
    return min(1.0, (step + 1) / recipe.warmup, max(0.02, (recipe.steps - step) / tail))


def loss_of(model: Qwen2ForCausalLM, batch: torch.Tensor, pad: int, reduction: str = "mean") -> torch.Tensor:
    """Next-token loss over everything that is no padding."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model.model(input_ids=batch[:, :-1], use_cache=False).last_hidden_state
        target = batch[:, 1:]
        keep = target != pad
        logits = model.lm_head(hidden[keep])
    return torch.nn.functional.cross_entropy(logits.float(), target[keep], reduction=reduction)


def batches(windows: dict[str, list[list[int]]], recipe: Recipe) -> Iterator[list[list[int]]]:
    """Batches of both languages in a seeded order, each language reshuffled when it is used up."""
    rng = random.Random(f"{recipe.seed}/batches")
    queues: dict[str, list[list[int]]] = {"es": [], "en": []}
    for _ in range(recipe.steps):
        rows = []
        for _ in range(recipe.batch):
            language = "es" if rng.random() < recipe.spanish else "en"
            if not queues[language]:
                queues[language] = rng.sample(windows[language], len(windows[language]))
            rows.append(queues[language].pop())
        yield rows


def new_optimizers(model: Qwen2ForCausalLM, recipe: Recipe, rank: int) -> tuple[list[torch.optim.Optimizer], set[int]]:
    """Muon for the matrices of the layers, AdamW for the rest; each process updates its share of the parameters.

    Also returns the ids of the parameters that this process updates.
    """
    matrices = [p for p in model.model.layers.parameters() if p.dim() == 2]
    known = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in known]
    mine = matrices[rank :: recipe.processes]
    rest = others if rank == recipe.processes - 1 else []
    optimizers: list[torch.optim.Optimizer] = [torch.optim.Muon(mine, lr=recipe.muon_rate, weight_decay=0.05, momentum=0.95)]
    if rest:
        optimizers.append(torch.optim.AdamW(rest, lr=recipe.rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True))
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["peak"] = group["lr"]
    return optimizers, {id(p) for p in mine + rest}


@torch.no_grad()
def share_updates(parameters: list[torch.nn.Parameter], owned: set[int]) -> None:
    """Give every process the parameters that the others updated."""
    flat = torch.cat([p.flatten() if id(p) in owned else torch.zeros(p.numel()) for p in parameters])
    dist.all_reduce(flat)
    for p, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.copy_(part.view_as(p))


def train_rank(rank: int, recipe: Recipe, folder: str) -> None:
    """One of the training processes: each takes its part of every batch, gradients are averaged. Rank 0 saves the weights.

    One thread a process: on a busy machine two threads wait for each other and were three times slower.
    """
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=recipe.processes)
    torch.manual_seed(recipe.seed)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    windows = torch.load(f"{folder}/windows.pt")
    model = new_model(tokenizer)
    optimizers, owned = new_optimizers(model, recipe, rank)
    begun = time.monotonic()
    for step, rows in enumerate(batches(windows, recipe)):
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = group["peak"] * rate_at(step, recipe)
        loss = loss_of(model, torch.tensor(rows[rank :: recipe.processes]), tokenizer.pad_token_id)
        model.zero_grad(set_to_none=True)
        loss.backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        flat = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(flat)
        flat *= min(1.0, recipe.processes / (flat.norm().item() + 1e-6)) / recipe.processes
        for grad, part in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(part.view_as(grad))
        for optimizer in optimizers:
            optimizer.step()
        share_updates(list(model.parameters()), owned)
        if rank == 0 and (step % 100 == 99 or step == 9):
            print(f"step {step + 1:5d} loss {loss.item():.3f} seconds {time.monotonic() - begun:.0f}", flush=True)
    if rank == 0:
        torch.save(model.state_dict(), f"{folder}/weights.pt")
    dist.destroy_process_group()


def train(
    tokenizer: PreTrainedTokenizerFast, windows: dict[str, list[list[int]]], recipe: Recipe, folder: str
) -> Qwen2ForCausalLM:
    """Train in `recipe.processes` processes and return the model."""
    os.environ.update(
        MALLOC_MMAP_THRESHOLD_="4294967296", MALLOC_TRIM_THRESHOLD_="8589934592"
    )  # keeps freed pages: fewer page faults
    tokenizer.save_pretrained(folder)
    torch.save(windows, f"{folder}/windows.pt")
    torch.multiprocessing.spawn(train_rank, args=(recipe, folder), nprocs=recipe.processes)
    model = new_model(tokenizer)
    model.load_state_dict(torch.load(f"{folder}/weights.pt"))
    return model


@torch.no_grad()
def evaluate(
    model: Qwen2ForCausalLM, dialogues: list[Dialogue], tokenizer: PreTrainedTokenizerFast, window: int
) -> dict[str, float]:
    """Loss per token, perplexity and bits per byte on held-out dialogues, each seen alone."""
    rng, total, count, size = random.Random(0), 0.0, 0, 0
    for dialogue in dialogues:
        ids = tokenizer(render(dialogue, rng, []), add_special_tokens=False)["input_ids"][: window + 1]
        total += loss_of(model, torch.tensor([ids]), tokenizer.pad_token_id, "sum").item()
        count += len(ids) - 1
        size += len(str(tokenizer.decode(ids, skip_special_tokens=True)).encode())
    return {
        "loss": round(total / count, 3),
        "perplexity": round(math.exp(total / count), 2),
        "bits_per_byte": round(total / math.log(2) / size, 3),
    }


def save(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path, card: str) -> None:
    """Write weights in bf16, tokenizer, generation settings, card and licence."""
    out.mkdir(parents=True, exist_ok=True)
    model.bfloat16()
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=120,
    )
    model.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(out)
    (out / "README.md").write_text(card, encoding="utf-8")
    shutil.copyfile(HERE / "base_model_LICENSE.txt", out / "LICENSE")


def main() -> None:
    """Make the text, train, measure, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--english", type=Path, required=True, help="Parquet of English dialogues (dialogue_id, services, messages)"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the model")
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    args = parser.parse_args()
    recipe, begun = Recipe(steps=args.steps), time.monotonic()
    rng = random.Random(recipe.seed)
    with tempfile.TemporaryDirectory() as folder:
        write_general(Path(folder) / "es.parquet", recipe.dialogues, recipe.seed)
        texts = {"es": read(Path(folder) / "es.parquet", "es"), "en": read(args.english, "en")}
        held, kept = {}, {}
        for language, dialogues in texts.items():
            rng.shuffle(dialogues)
            held[language], kept[language] = dialogues[: recipe.held_out], dialogues[recipe.held_out :]
        tokenizer = train_tokenizer(kept["es"][:12_000] + kept["en"][:3_000], recipe)
        pad = tokenizer.pad_token_id
        windows = {
            language: pack(documents(dialogues, tokenizer, rng, recipe.window), recipe.window + 1, pad, rng)
            for language, dialogues in kept.items()
        }
        print({key: len(value) for key, value in windows.items()}, flush=True)
        model = train(tokenizer, windows, recipe, folder)
    model.eval()
    spanish = {id(window) for window in windows["es"]}
    seen = {"es": 0, "en": 0}
    for row in (row for rows in batches(windows, recipe) for row in rows):
        seen["es" if id(row) in spanish else "en"] += sum(token != pad for token in row)
    numbers = {
        "tokens": seen,
        "minutes": round((time.monotonic() - begun) / 60, 1),
        **{key: evaluate(model, value, tokenizer, recipe.window) for key, value in held.items()},
    }
    card = (HERE / "base_model_card.md").read_text(encoding="utf-8")
    for key, value in {
        "numbers": json.dumps(numbers),
        "parameters": f"{model.num_parameters():,}",
        "steps": str(recipe.steps),
        "seed": str(recipe.seed),
        "vocabulary": str(len(tokenizer)),
    }.items():
        card = card.replace("{{" + key + "}}", value)
    save(model, tokenizer, args.out, card)
    print(json.dumps(numbers))


if __name__ == "__main__":
    main()
