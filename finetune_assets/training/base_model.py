"""What is known of a base model without loading it: where it is, its card, its shape, and what its content is.

A base model is a folder (relative paths count from the project's root) or a Hugging Face id (`org/name`).
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import yaml

from finetune_assets.environment import ROOT
from finetune_assets.errors import ModelUnavailable

ADAPTER = "adapter_config.json"
"""What PEFT writes beside the weights of an adapter; it names the base model that they belong to."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def resolve(base_model: str) -> str:
    """The absolute folder, or the Hugging Face id where no such folder exists. Raises ModelUnavailable."""
    path = Path(base_model).expanduser()
    for candidate in (path, ROOT / path) if path.is_absolute() else (ROOT / path, path.resolve()):
        if candidate.is_dir():
            if not (candidate / "config.json").exists() and not (candidate / ADAPTER).exists():
                raise ModelUnavailable(
                    f"base_model {base_model!r}: {candidate} has no config.json, so it is no Hugging Face model. Name the folder "
                    "that holds it, or correct `base_model` in the assistant's YAML."
                )
            return str(candidate)
    first = path.parts[0] if path.parts else ""
    if not _HUB_ID.fullmatch(base_model) or (ROOT / first).is_dir():
        raise ModelUnavailable(
            f"base_model {base_model!r}: there is no folder {ROOT / path}, and it is no Hugging Face id (`org/name`). "
            "Correct `base_model` in the assistant's YAML."
        )
    return base_model


def folder(base_model: str, commit: str | None = None) -> Path | None:
    """The folder that holds the model's files on this machine: its own, or the hub's cache; None where it is not downloaded.

    `commit`: of a hub model, in place of the newest. Raises ModelUnavailable for a name that is none.
    """
    resolved = resolve(base_model)
    if Path(resolved).is_absolute():
        return Path(resolved)
    from huggingface_hub import try_to_load_from_cache  # noqa: PLC0415

    try:
        found = try_to_load_from_cache(resolved, "config.json", revision=commit or revision(resolved))
    except ModelUnavailable:
        return None
    return Path(found).parent if isinstance(found, str) else None


def adapted(folder: Path) -> str | None:
    """The base model of a folder that holds an adapter and no whole model, else None. Raises ModelUnavailable."""
    if not (folder / ADAPTER).exists() or (folder / "config.json").exists():
        return None
    base = _json(folder / ADAPTER).get("base_model_name_or_path")
    if not base:
        raise ModelUnavailable(f"The adapter in {folder} names no base model; set base_model_name_or_path in its {ADAPTER}.")
    return str(base)


def identity(base_model: str) -> dict[str, str]:
    """What decides the model's content: sha256 of a folder's files, or a hub model's id and revision. Raises ModelUnavailable."""
    commit = revision(base_model)
    if commit is None:
        return {"sha256": folder_hash(Path(resolve(base_model)))}
    return {"id": resolve(base_model), "revision": commit}


def folder_hash(path: Path) -> str:
    """sha256 over names and contents of the files that make a model: weights, tokenizer, configuration, template."""
    digest = hashlib.sha256()
    for file in sorted(path.iterdir()):
        if file.is_file() and file.suffix in (".safetensors", ".bin", ".json", ".jinja", ".txt", ".model"):
            stat = file.stat()
            digest.update(f"{file.name}\0{_file_hash(str(file), stat.st_size, stat.st_mtime_ns)}\n".encode())
    return digest.hexdigest()


@lru_cache(maxsize=256)
def _file_hash(path: str, _size: int, _modified: int) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def revision(base_model: str) -> str | None:
    """The commit that `main` of a hub model points to; where the hub cannot be reached the cached one, or, of a cache that was
    filled by commits, the newest. None for a folder. Raises ModelUnavailable.
    """
    resolved = resolve(base_model)
    if Path(resolved).is_absolute():
        return None
    from huggingface_hub import constants  # noqa: PLC0415

    commit, cause = (None, "HF_HUB_OFFLINE is set") if constants.HF_HUB_OFFLINE else _asked(resolved, int(time.time() // 60))
    if commit:
        return commit
    cache = Path(constants.HF_HUB_CACHE) / f"models--{resolved.replace('/', '--')}"
    if (cache / "refs" / "main").exists():
        return (cache / "refs" / "main").read_text().strip()
    snapshots = sorted(cache.glob("snapshots/*"), key=lambda one: one.stat().st_mtime)
    if snapshots:
        return snapshots[-1].name
    raise ModelUnavailable(
        f"base_model {resolved!r} is no folder and could not be found on the Hugging Face hub ({cause}), nor is it in the cache "
        f"{constants.HF_HUB_CACHE}. Check the name and the network, set HF_TOKEN for a gated model, or give a folder."
    )


@lru_cache(maxsize=64)
def _asked(model_id: str, _minute: int) -> tuple[str | None, str]:
    """The hub's answer, or why there is none; asked once a minute."""
    from huggingface_hub import HfApi  # noqa: PLC0415

    try:
        return HfApi().model_info(model_id, timeout=20).sha, "the hub names no revision"
    except Exception as error:  # the hub's client raises many kinds; each means that it did not answer
        return None, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def card(base_model: str) -> dict[str, Any]:
    """Front matter of the model's card (README.md); empty where there is none."""
    where = folder(base_model)
    readme = where / "README.md" if where else None
    if readme is None or not readme.exists():
        return {}
    match = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", readme.read_text(encoding="utf-8"), re.DOTALL)
    try:
        values = yaml.safe_load(match.group(1)) if match else None
    except yaml.YAMLError:  # a card is a courtesy: a broken one says nothing
        values = None
    return cast("dict[str, Any]", values) if isinstance(values, dict) else {}


@dataclass(frozen=True)
class Shape:
    """Sizes that time and memory are estimated from."""

    parameters: int
    embedding_parameters: int
    """Weights of the input embedding, which costs no matrix product; 0 where it is tied to the output layer."""
    layers: int
    hidden: int
    heads: int
    vocabulary: int
    context: int
    """Most positions."""


def shape(base_model: str) -> Shape | None:
    """Read from config.json and the headers of the safetensors files; None where the model is not on this machine."""
    where = folder(base_model)
    base = adapted(where) if where else None
    if base is not None:
        return shape(base)
    if where is None:
        return None
    config = _json(where / "config.json")
    config = {**config, **cast("dict[str, Any]", config.get("text_config") or {})}

    def number(*names: str) -> int:
        return next((int(config[name]) for name in names if config.get(name)), 0)

    hidden, layers = number("hidden_size", "n_embd"), number("num_hidden_layers", "n_layer")
    vocabulary = number("vocab_size")
    parameters = sum(_parameters(file) for file in where.glob("*.safetensors")) or 12 * layers * hidden**2 + vocabulary * hidden
    tied = config.get("tie_word_embeddings", True)
    return Shape(
        parameters=parameters,
        embedding_parameters=0 if tied else vocabulary * hidden,
        layers=layers,
        hidden=hidden,
        heads=number("num_attention_heads", "n_head"),
        vocabulary=vocabulary,
        context=number("max_position_embeddings", "n_positions"),
    )


def unfinished(base_model: str) -> str | None:
    """What is missing of the weights of a folder, and of the base of an adapter's; None where they are whole, or not here yet."""
    resolved = resolve(base_model)
    if not Path(resolved).is_absolute():
        return None
    where = Path(resolved)
    base = adapted(where)
    if base is not None:
        there = [name for name in ("adapter_model.safetensors", "adapter_model.bin") if (where / name).exists()]
        return unfinished(base) if there else f"{where} holds no adapter_model.safetensors"
    index = where / "model.safetensors.index.json"
    named = set(_json(index)["weight_map"].values()) if index.exists() else set[str]()
    absent = sorted(name for name in named if not (where / name).exists())
    if absent:
        return f"{where} lacks {absent[0]}" + (f" and {len(absent) - 1} more of its {len(named)} parts" if absent[1:] else "")
    if not any(where.glob("*.safetensors")) and not any(where.glob("pytorch_model*.bin")):
        return f"{where} holds no weights (*.safetensors)"
    return None


def misfit(adapter: Path, base: Path) -> str | None:
    """The first layer of a base for which an adapter has weights of another size; None where all fit, or are named otherwise."""
    file = adapter / "adapter_model.safetensors"
    held = _shapes(file) if file.exists() else {}
    layers = {name: shape for weights in base.glob("*.safetensors") for name, shape in _shapes(weights).items()}
    for name, shape in held.items():
        own = name.removeprefix("base_model.model.")
        if layers.get(own, shape) != shape:  # trained whole, as embeddings are for a larger vocabulary
            return f"{own} is {_size(layers[own])} in the base, {_size(shape)} in the adapter"
        layer = own.partition(".lora_A")[0]
        known, other = layers.get(f"{layer}.weight"), held.get(name.replace(".lora_A", ".lora_B"))
        if ".lora_A" in name and known and other and sorted(known) != sorted((shape[1], other[0])):
            return f"{layer} is {_size(known)} in the base, {_size([other[0], shape[1]])} in the adapter"
    return None


def _size(shape: list[int]) -> str:
    return " × ".join(map(str, shape))


def _parameters(file: Path) -> int:
    """Elements in a safetensors file."""
    return sum(math.prod(shape) for shape in _shapes(file).values())


def _shapes(file: Path) -> dict[str, list[int]]:
    """Sizes in a safetensors file, by its header: eight bytes of length, then JSON (huggingface.co/docs/safetensors).

    Raises ModelUnavailable where the file is not whole, or is none.
    """
    held = file.stat().st_size
    try:
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            header = cast("dict[str, Any]", json.loads(stream.read(size) if size < held else b""))
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        wanted = 8 + size + max((int(entry["data_offsets"][1]) for entry in tensors.values()), default=0)
    except (ValueError, KeyError, TypeError):
        wanted, tensors = -1, dict[str, Any]()
    if wanted != held:
        told = f"of its {wanted:,} bytes {held:,} are there" if wanted > held else "a pointer of Git LFS, or another format"
        raise ModelUnavailable(
            f"{file} is no whole safetensors file ({told}). Fetch it again (`git lfs pull` in a clone), or name another folder."
        )
    return {name: entry["shape"] for name, entry in tensors.items()}


def _json(file: Path) -> dict[str, Any]:
    """Raises ModelUnavailable where it is no JSON object."""
    try:
        return cast("dict[str, Any]", dict(json.loads(file.read_text(encoding="utf-8"))))
    except (ValueError, TypeError) as error:
        raise ModelUnavailable(f"{file} cannot be read as JSON ({error}). Fetch the model's files again.") from None
