"""From chat messages to token ids, the same way in planning, training, benchmark and chat.

A `Renderer` is a chat template with its tokenizer: `worker.models` makes one of a transformers tokenizer, `LightRenderer`
reads the model's folder with `jinja2` and `tokenizers` alone (0.1 s instead of seconds of imports, for the plan).

The prompt and the reply are tokenised apart, so a model is trained on exactly the prompt ids that it later gets. The target
is the last reply and its end token, nothing after it; in a row whose assistant messages carry `weight`, each reply of weight 1.
What is too long loses its oldest turns (never the system message nor the user's last turn), then the beginning of the prompt.

Tools are rendered by the template where it knows them, else as text in the form of Hermes and Qwen (`<tool_call>` and JSON), so
any model can learn to call them.
"""

# pyright: reportUnknownMemberType=false

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, cast

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from finetune_assets.errors import ModelUnavailable

Message = dict[str, Any]
"""role (system, user, assistant, tool) and content; an assistant's message may have `tool_calls`, and `weight` 0 or 1."""
Tools = Sequence[dict[str, Any]] | None
"""JSON schemas of functions, as OpenAI and transformers have them."""
Example = tuple[list[int], list[int], int]
"""Ids, a mask of equal length (1: a target), and the turns that were dropped."""

TEMPLATE_DATE = "26 Jul 2024"
"""`date_string` of the Llama templates, fixed: a model must not change with the day on which it was trained or resumed."""

PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] | trim }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] | trim }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)
"""For a model without a template: turns that end with the end token, as DialoGPT was trained (arXiv:1911.00536, section 3.1)."""


class Renderer(Protocol):
    """A chat template and its tokenizer."""

    @property
    def special_texts(self) -> tuple[str, ...]:
        """Texts of the special tokens: they are taken out of what people wrote."""
        ...

    @property
    def eos_token(self) -> str:
        """The end token's text."""
        ...

    @property
    def knows_tools(self) -> bool:
        """Whether the template renders tools."""
        ...

    def render(self, messages: Sequence[Message], generation_prompt: bool, tools: Tools = None) -> str:
        """The template applied. Raises jinja2.TemplateError where the template refuses the messages."""
        ...

    def encode(self, text: str) -> list[int]:
        """Token ids; nothing is added."""
        ...


def encode_prompt(renderer: Renderer, messages: Sequence[Message], max_length: int, tools: Tools = None) -> tuple[list[int], int]:
    """Ids of the prompt (at most `max_length`, ready for the reply) and the number of turns dropped to make it fit."""
    ids: list[int] = []
    dropped = 0
    messages, tools = _plain(renderer, _clean(renderer, messages), tools)
    for dropped, kept in _trimmed(messages):  # noqa: B007
        ids = renderer.encode(_render(renderer, kept, tools, generation_prompt=True))
        if len(ids) <= max_length:
            break
    return ids[-max_length:], dropped


def encode_example(renderer: Renderer, messages: Sequence[Message], max_length: int, tools: Tools = None) -> Example:
    """Ids of prompt and last reply, a mask of equal length (1: a target), and the number of turns dropped.

    The last message is the assistant's. Where the reply alone does not leave room for one token of prompt, the ids are longer
    than `max_length`: such a row is no use for training.
    """
    cleaned, tools = _plain(renderer, _clean(renderer, messages), tools)
    *prompt, reply = cleaned
    ids: list[int] = []
    target: list[int] = []
    dropped = 0
    for dropped, kept in _trimmed(prompt):  # noqa: B007
        start = _render(renderer, kept, tools, generation_prompt=True)
        whole = _render(renderer, [*kept, reply], tools, generation_prompt=False)
        ids = renderer.encode(start)
        target = renderer.encode(_target(renderer, start, whole, reply))
        if len(ids) + len(target) <= max_length:
            break
    room = max_length - len(target)
    if room > 0:
        ids = ids[-room:]
    return ids + target, [0] * len(ids) + [1] * len(target), dropped


def encode_row(renderer: Renderer, messages: Sequence[Message], max_length: int, tools: Tools = None) -> list[Example]:
    """The training examples of one row: one, or where a row of several targets does not fit as a whole, one for each target."""
    weighted = [at for at, message in enumerate(messages) if message["role"] == "assistant" and message.get("weight") == 1]
    targets = weighted or [len(messages) - 1]
    if len(targets) > 1:
        whole = _encode_targets(renderer, messages, targets, tools)
        if whole is not None and len(whole[0]) <= max_length:
            return [whole]
    return [encode_example(renderer, messages[: at + 1], max_length, tools) for at in targets]


def _encode_targets(renderer: Renderer, messages: Sequence[Message], targets: Sequence[int], tools: Tools) -> Example | None:
    """A conversation with several replies as targets; None where the template renders earlier turns differently later on."""
    ids: list[int] = []
    mask: list[int] = []
    text = ""
    cleaned, tools = _plain(renderer, _clean(renderer, messages), tools)
    for at in targets:
        start = _render(renderer, cleaned[:at], tools, generation_prompt=True)
        whole = _render(renderer, cleaned[: at + 1], tools, generation_prompt=False)
        if not start.startswith(text):
            return None
        target_text = _target(renderer, start, whole, cleaned[at])
        prompt, target = renderer.encode(start[len(text) :]), renderer.encode(target_text)
        ids += prompt + target
        mask += [0] * len(prompt) + [1] * len(target)
        text = start + target_text
    return ids, mask, 0


def _target(renderer: Renderer, start: str, whole: str, message: Message) -> str:
    """The reply as the template writes it, up to and including its end token (the first special token after it)."""
    reply = str(message["content"]).strip()
    calls = message.get("tool_calls")
    rest = whole[len(start) :] if whole.startswith(start) else whole[whole.rfind(reply) :] if reply in whole else ""
    last = str(calls[-1].get("function", calls[-1]).get("name", "")) if calls else reply
    at = rest.rfind(last) if calls else rest.find(reply)
    if at < 0 or not rest:
        raise ModelUnavailable(
            f"The chat template does not render the assistant's reply {last[:40]!r}: it cannot be trained. "
            "Choose another base_model, or mend its chat template."
        )
    end = at + len(last)
    stops = [(found, text) for text in renderer.special_texts if text and (found := rest.find(text, end)) >= 0]
    if not stops:
        return (rest.rstrip() if calls else rest[:end]) + renderer.eos_token
    found, text = min(stops, key=lambda stop: (stop[0], -len(stop[1])))
    return rest[: found + len(text)]


def _trimmed(messages: Sequence[Message]) -> Iterator[tuple[int, list[Message]]]:
    """The messages whole, then ever shorter: (turns dropped, messages). A user's turn always comes first after the system's."""
    system = [message for message in messages[:1] if message["role"] == "system"]
    turns = list(messages[len(system) :])
    yield 0, [*system, *turns]
    for start in range(1, len(turns)):
        if turns[start]["role"] == "user":
            yield start, [*system, *turns[start:]]


def _render(renderer: Renderer, messages: Sequence[Message], tools: Tools, *, generation_prompt: bool) -> str:
    """Templates that know no system role (Gemma, Mistral) get it at the head of the first user turn."""
    try:
        return renderer.render(messages, generation_prompt, tools)
    except jinja2.TemplateError:
        if len(messages) < 2 or messages[0]["role"] != "system":
            raise
        first = {"role": messages[1]["role"], "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}
        return renderer.render([first, *messages[2:]], generation_prompt, tools)


_KEPT = ("role", "content", "tool_calls", "tool_call_id", "name")


def _clean(renderer: Renderer, messages: Sequence[Message]) -> list[Message]:
    """The messages without special tokens in their texts, and without keys that templates do not know."""
    specials = [text for text in renderer.special_texts if text]

    def scrub(value: Any) -> Any:
        if isinstance(value, str):
            for text in specials:
                if text in value:
                    value = value.replace(text, "")
            return value
        if isinstance(value, dict):
            return {key: scrub(one) for key, one in cast("dict[str, Any]", value).items()}
        return [scrub(one) for one in cast("list[Any]", value)] if isinstance(value, list) else value

    return [{"content": "", **{key: scrub(message[key]) for key in _KEPT if message.get(key)}} for message in messages]


def _plain(renderer: Renderer, messages: list[Message], tools: Tools) -> tuple[list[Message], Tools]:
    """Tools as text, for a template that does not know them: descriptions in the system message, calls and results as content."""
    used = tools or any(message.get("tool_calls") or message["role"] == "tool" for message in messages)
    if not used or renderer.knows_tools:
        return messages, tools
    made: list[Message] = []
    for message in messages:
        content = str(message["content"])
        if message.get("tool_calls"):
            calls = [f"<tool_call>\n{_call(call)}\n</tool_call>" for call in message["tool_calls"]]
            made.append({"role": message["role"], "content": "\n".join([*([content] if content else []), *calls])})
        elif message["role"] == "tool":
            made.append({"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"})
        else:
            made.append(message)
    if tools:
        listed = "\n".join(json.dumps(tool.get("function", tool), ensure_ascii=False, sort_keys=True) for tool in tools)
        text = f"<tools>\n{listed}\n</tools>"
        if made and made[0]["role"] == "system":
            made[0] = {"role": "system", "content": f"{made[0]['content']}\n\n{text}"}
        else:
            made.insert(0, {"role": "system", "content": text})
    return made, None


def _call(call: dict[str, Any]) -> str:
    """A tool call as JSON: name and arguments."""
    function = cast("dict[str, Any]", call.get("function", call))
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        with suppress(ValueError):  # a model may have written it: then it is kept as it is
            arguments = json.loads(arguments)
    return json.dumps({"name": function.get("name", ""), "arguments": arguments}, ensure_ascii=False)


class LightRenderer:
    """Template and tokenizer from the files of a model folder: tokenizer.json, tokenizer_config.json, chat_template.jinja."""

    def __init__(self, folder: Path):
        """Raises FileNotFoundError where there is no tokenizer.json, ModelUnavailable where there is no end token."""
        if not (folder / "tokenizer.json").exists():
            raise FileNotFoundError(folder / "tokenizer.json")
        try:
            self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the library raises no other class
            raise ModelUnavailable(
                f"{folder / 'tokenizer.json'} is no tokenizer ({error}): half a download, or a pointer of Git LFS. Fetch it "
                "again."
            ) from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        config = _json(folder / "tokenizer_config.json")
        named = {**config, **_json(folder / "special_tokens_map.json")}
        self._special = {key: text for key in _SPECIAL_KEYS if (text := _text(named.get(key)))}
        added = self._tokenizer.get_added_tokens_decoder().values()
        texts = [*self._special.values(), *(token.content for token in added if token.special)]
        self._special_texts = tuple(dict.fromkeys(texts))
        if "eos_token" not in self._special:
            raise ModelUnavailable(
                f"The tokenizer in {folder} names no end token (`eos_token`), so a reply could never stop. "
                "Set it in its tokenizer_config.json to the token that ends a turn, or take another base_model."
            )
        if self._tokenizer.token_to_id(self.eos_token) is None:
            raise ModelUnavailable(
                f"The tokenizer in {folder} ends replies with {self.eos_token!r}, which its vocabulary has not, so a reply could "
                "never stop. Correct `eos_token` in its tokenizer_config.json, or take another base_model."
            )
        template = _template(folder, config) or PLAIN_TEMPLATE
        self._template = compile_template(template)
        self.knows_tools = renders_tools(template)
        """Whether the template renders tools."""
        self.vocabulary = self._tokenizer.get_vocab_size(with_added_tokens=True)
        """Tokens, added ones included."""

    @property
    def special_texts(self) -> tuple[str, ...]:
        """Texts of the special tokens."""
        return self._special_texts

    @property
    def eos_token(self) -> str:
        """The end token's text."""
        return self._special["eos_token"]

    def render(self, messages: Sequence[Message], generation_prompt: bool, tools: Tools = None) -> str:
        """The template applied."""
        return self._template.render(
            messages=list(messages),
            tools=list(tools) if tools else None,
            add_generation_prompt=generation_prompt,
            date_string=TEMPLATE_DATE,
            **self._special,
        )

    def encode(self, text: str) -> list[int]:
        """Token ids; nothing is added."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids


def renders_tools(template: str) -> bool:
    """Whether a chat template has a place for tools and for calls of them."""
    return "tools" in template and "tool_calls" in template


_SPECIAL_KEYS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _text(token: Any) -> str | None:
    """A special token is written as its text or as an object with `content`."""
    return cast("str | None", token.get("content") if isinstance(token, dict) else token)


def _template(folder: Path, config: dict[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    found = config.get("chat_template")
    if isinstance(found, list):  # several named templates
        return next((entry["template"] for entry in cast("list[dict[str, str]]", found) if entry.get("name") == "default"), None)
    return cast("str | None", found)


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's text; here it renders its body and no more."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def compile_template(text: str) -> jinja2.Template:
    """A chat template with the tags, filters and globals that transformers gives it."""

    def refuse(message: str) -> str:
        raise jinja2.TemplateError(message)

    def fixed_date(_format: str) -> str:
        return TEMPLATE_DATE

    def to_json(value: Any, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=False, **options)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse  # pyright: ignore[reportArgumentType]
    environment.globals["strftime_now"] = fixed_date  # pyright: ignore[reportArgumentType]
    return environment.from_string(text)
