"""A small causal model with random weights and a tokenizer of its own, made in a second: for tests that need a real one."""

from __future__ import annotations

import os
import random
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

QWEN2_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

SYSTEM = "Eres el asistente de una clínica dental."
WANTS = [
    "pedir una cita",
    "reservar una mesa",
    "cambiar mi cita",
    "cancelar la reserva",
    "saber el precio",
    "ver el menú",
    "hablar con alguien",
]
WHEN = ["el lunes", "mañana", "esta tarde", "el jueves a las cinco", "la próxima semana", "hoy", "el 3 de mayo"]
OPENINGS = ["Hola,", "Buenas,", "Buenos días,", "Disculpá,", "Oye,", "Por favor,"]
REPLIES = ["Con gusto.", "Claro que sí.", "Perfecto.", "Lo siento, no queda lugar.", "De acuerdo."]


def dialogues(rows: int, seed: int = 0, turns: int = 1, system: str = SYSTEM) -> list[list[dict[str, str]]]:
    """`rows` Spanish chats: system, then `turns` pairs of user and assistant."""
    chance = random.Random(seed)
    chats: list[list[dict[str, str]]] = []
    for _ in range(rows):
        chat = [{"role": "system", "content": system}] if system else []
        for _turn in range(turns):
            want, when = chance.choice(WANTS), chance.choice(WHEN)
            chat.append({"role": "user", "content": f"{chance.choice(OPENINGS)} quiero {want} {when}."})
            chat.append({"role": "assistant", "content": f"{chance.choice(REPLIES)} Anoto: {want} {when}. ¿Algo más?"})
        chats.append(chat)
    return chats


def make_tiny_model(
    folder: Path,
    *,
    hidden: int = 32,
    layers: int = 2,
    heads: int = 2,
    intermediate: int = 64,
    vocabulary: int = 512,
    context: int = 512,
    architecture: str = "qwen2",
    template: bool = True,
    seed: int = 0,
) -> Path:
    """Writes a model and its tokenizer to `folder`, which it gives back. `architecture`: qwen2, llama, gemma, gpt2."""
    import torch
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import AutoModelForCausalLM as Auto
    from transformers import GemmaConfig, GPT2Config, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config

    folder.mkdir(parents=True, exist_ok=True)
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.NFC()
    splitter = pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated")  # AutoTokenizer forces this on model type qwen2
    trained.pre_tokenizer = pre_tokenizers.Sequence([splitter, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    trained.decoder = decoders.ByteLevel()
    texts = [message["content"] for chat in dialogues(200, seed=1) for message in chat]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trained,
        eos_token="<|im_end|>" if template else "<|endoftext|>",
        pad_token="<|endoftext|>" if template else None,
        model_max_length=context,
    )
    if template:
        tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    size = max(vocabulary, len(tokenizer))
    if architecture == "gpt2":
        config = GPT2Config(
            vocab_size=size, n_embd=hidden, n_layer=layers, n_head=heads, n_positions=context, bos_token_id=0, eos_token_id=0
        )
    else:
        kind = {"qwen2": Qwen2Config, "llama": LlamaConfig, "gemma": GemmaConfig}[architecture]
        config = kind(
            vocab_size=size,
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            intermediate_size=intermediate,
            max_position_embeddings=context,
            tie_word_embeddings=True,
            **({"head_dim": hidden // heads} if architecture == "gemma" else {}),
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    torch.manual_seed(seed)
    Auto.from_config(config).save_pretrained(folder)
    (folder / "README.md").write_text("---\nlanguage: [es]\npreset: tiny\n---\n# Random weights\n", encoding="utf-8")
    return folder
