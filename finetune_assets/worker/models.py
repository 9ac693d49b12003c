"""Loading of models and tokenizers, and the rendering of chats: the same in training, benchmark and chat.

`model` is always a folder (relative to the project's root) or a Hugging Face id; the folder may hold an adapter alone, which is
then merged with its base. `HF_HUB_OFFLINE` is respected.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import warnings
import weakref
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import jinja2
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils.hub import cached_file
from transformers.utils.logging import disable_progress_bar

from finetune_assets.errors import FinetuneError, ModelUnavailable
from finetune_assets.training import base_model as base_models
from finetune_assets.training.encoding import PLAIN_TEMPLATE, TEMPLATE_DATE, Example, Message, Tools, renders_tools
from finetune_assets.training.encoding import encode_example as _encode_example
from finetune_assets.training.encoding import encode_prompt as _encode_prompt

disable_progress_bar()


def load_tokenizer(path_or_id: str | Path, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer, with a chat template (a plain one where it brings none), an end token and a padding token.

    Raises ModelUnavailable where it cannot be loaded or has no end token.
    """
    source = base_models.resolve(str(path_or_id))
    base = base_models.adapted(Path(source))
    if base is not None and not (Path(source) / "tokenizer_config.json").exists():
        return load_tokenizer(base, revision)
    revision = revision or base_models.revision(source)
    try:
        # AutoTokenizer puts its own splitting rule in place of the one in tokenizer.json for some model types (Qwen2: digits
        # one by one), so training and other servers of the same files would see different tokens: the file decides.
        found = cached_file(source, "tokenizer.json", revision=revision, _raise_exceptions_for_missing_entries=False)
        loaded: Any = cast("Any", PreTrainedTokenizerFast if found else AutoTokenizer).from_pretrained(source, revision=revision)
    except Exception as error:
        raise unavailable(source, error) from error
    tokenizer = cast("PreTrainedTokenizerBase", loaded)
    if tokenizer.eos_token is None:
        raise ModelUnavailable(
            f"The tokenizer of {source} names no end token (`eos_token`), so a reply could never stop. Set it in its "
            "tokenizer_config.json to the token that ends a turn, or take another base_model."
        )
    if not tokenizer("a", add_special_tokens=False)["input_ids"]:  # transformers makes an empty one where the files are missing
        raise ModelUnavailable(
            f"{source} has no tokenizer: no tokenizer.json and no vocabulary. Put the model's tokenizer files there."
        )
    tokenizer.init_kwargs["local_files_only"] = False  # saved with it, but HF_HUB_OFFLINE is no property of the model
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if not tokenizer.chat_template:
        tokenizer.chat_template = PLAIN_TEMPLATE
    return tokenizer


def load_model(
    path_or_id: str | Path,
    dtype: str | torch.dtype = "float32",
    revision: str | None = None,
    where: torch.device | None = None,
) -> PreTrainedModel:
    """The model in eval mode, on the GPU where there is one, or `where` it is wanted. `dtype`: `float32`, `bfloat16`, or `auto`
    (as stored).

    Raises ModelUnavailable where it cannot be loaded.
    """
    source = base_models.resolve(str(path_or_id))
    base = base_models.adapted(Path(source))
    if base is not None:
        return cast("PreTrainedModel", attach(load_model(base, dtype, revision, where), Path(source)).merge_and_unload()).eval()
    revision = revision or base_models.revision(source)
    try:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, revision=revision)
    except Exception as error:
        raise unavailable(source, error) from error
    return cast("Any", model).to(where or device()).eval()


def attach(model: PreTrainedModel, folder: Path, *, trainable: bool = False) -> Any:
    """The PEFT adapter of a folder beside its base. Raises ModelUnavailable where they do not belong together."""
    from peft import PeftModel  # noqa: PLC0415 (costs a second to import)

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)
    except (RuntimeError, ValueError, KeyError) as error:
        cause = next((line.strip() for line in str(error).splitlines() if "size mismatch" in line), str(error).splitlines()[0])
        raise ModelUnavailable(
            f"The adapter in {folder} does not belong to its base model ({cause}): another size or another vocabulary. Correct "
            f"base_model_name_or_path in its {base_models.ADAPTER}, or train the adapter again."
        ) from error


def check_vocabulary(name: str, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Raises ModelUnavailable where the tokenizer knows ids that the model does not embed."""
    embedded = int(cast("Any", model.get_input_embeddings()).weight.shape[0])
    if len(tokenizer) > embedded:
        raise ModelUnavailable(
            f"The tokenizer of {name} has {len(tokenizer)} tokens, the model embeds {embedded}: they do not belong together. "
            "Give a folder with both from the same model."
        )


def load_config(path_or_id: str | Path, revision: str | None = None) -> Any:
    """The model's configuration. Raises ModelUnavailable."""
    source = base_models.resolve(str(path_or_id))
    base = base_models.adapted(Path(source))
    if base is not None:
        return load_config(base)
    revision = revision or base_models.revision(source)
    try:
        return AutoConfig.from_pretrained(source, revision=revision)
    except Exception as error:
        raise unavailable(source, error) from error


def download(path_or_id: str | Path, revision: str | None = None) -> None:
    """Fetches a hub model's weights and tokenizer into the cache; nothing for a folder. Raises ModelUnavailable."""
    source = base_models.resolve(str(path_or_id))
    if Path(source).is_absolute():
        return
    from huggingface_hub import snapshot_download  # noqa: PLC0415

    try:
        patterns = ["*.json", "*.jinja", "*.txt", "*.model", "*.safetensors", "*.md"]
        found = Path(snapshot_download(source, revision=revision, allow_patterns=patterns))
        if not any(found.glob("*.safetensors")):  # an older repository
            snapshot_download(source, revision=revision, allow_patterns="pytorch_model*.bin")
    except Exception as error:
        raise unavailable(source, error) from error


def device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def context_length(model: PreTrainedModel) -> int:
    """Most positions of prompt and reply together; 1,024 where the configuration does not say."""
    return positions(model.config)


def positions(config: Any) -> int:
    """Most positions that a configuration names; 1,024 where it does not say."""
    config = config.get_text_config()
    return int(getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 1024)


def unavailable(source: str, error: Exception) -> FinetuneError:
    """What to tell a user about a model that does not load."""
    if isinstance(error, FinetuneError):
        return error
    cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return ModelUnavailable(
        f"The model {source!r} cannot be loaded: {cause} Check the name, download it once with the network "
        "(HF_HUB_OFFLINE unset, HF_TOKEN set for a gated model), or give a folder as `base_model`."
    )


class ChatRenderer:
    """A transformers tokenizer as the `Renderer` of finetune_assets.training.encoding."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        """The tokenizer comes from `load_tokenizer`."""
        self._tokenizer = tokenizer
        added = cast("dict[int, Any]", getattr(tokenizer, "added_tokens_decoder", {}))
        texts = [*tokenizer.all_special_tokens, *(str(token.content) for token in added.values() if token.special)]
        self._special_texts = tuple(dict.fromkeys(texts))

    @property
    def special_texts(self) -> tuple[str, ...]:
        """Texts of the special tokens."""
        return self._special_texts

    @property
    def eos_token(self) -> str:
        """The end token's text."""
        return str(self._tokenizer.eos_token)

    @property
    def knows_tools(self) -> bool:
        """Whether the template renders tools."""
        return renders_tools(str(self._tokenizer.chat_template))

    def render(self, messages: Sequence[Message], generation_prompt: bool, tools: Tools = None) -> str:
        """The template applied."""
        text = self._tokenizer.apply_chat_template(
            list(messages),
            tools=cast("Any", list(tools) if tools else None),
            tokenize=False,
            add_generation_prompt=generation_prompt,
            date_string=TEMPLATE_DATE,
        )
        return cast("str", text)

    def encode(self, text: str) -> list[int]:
        """Token ids; nothing is added."""
        return cast("list[int]", self._tokenizer(text, add_special_tokens=False)["input_ids"])


@contextmanager
def rendering(base_model: str) -> Generator[None]:
    """While rows are rendered. Raises ModelUnavailable where the model's chat template is broken, or refuses a row."""
    try:
        yield
    except jinja2.TemplateError as error:
        raise ModelUnavailable(
            f"The chat template of {base_model} cannot render the rows ({error}). Mend its chat_template.jinja, delete it (the "
            "model then gets a plain one), or take another base_model."
        ) from error


_renderers: weakref.WeakKeyDictionary[PreTrainedTokenizerBase, ChatRenderer] = weakref.WeakKeyDictionary()


def renderer(tokenizer: PreTrainedTokenizerBase) -> ChatRenderer:
    """The tokenizer's renderer, made once."""
    found = _renderers.get(tokenizer)
    if found is None:
        found = _renderers[tokenizer] = ChatRenderer(tokenizer)
    return found


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], max_length: int, tools: Tools = None
) -> tuple[list[int], int]:
    """Ids of the prompt, ready for the reply, at most `max_length`; and the turns dropped to make it fit (the oldest)."""
    return _encode_prompt(renderer(tokenizer), messages, max_length, tools)


def encode_example(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], max_length: int, tools: Tools = None
) -> Example:
    """Ids of prompt and reply, the mask of the targets (the last reply and its end token), and the turns dropped.

    The ids are longer than `max_length` where the reply alone leaves no room for a prompt.
    """
    return _encode_example(renderer(tokenizer), messages, max_length, tools)


def end_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids at which a reply ends: what the template writes after a reply, and the tokenizer's end token."""
    chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    ids, _mask, _dropped = encode_example(tokenizer, chat, 4096)
    return list(dict.fromkeys([ids[-1], cast("int", tokenizer.eos_token_id)]))
