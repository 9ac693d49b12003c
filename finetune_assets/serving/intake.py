"""What comes in: the body within its limits, who asks, and a chat in OpenAI's shape. A refusal is an HTTP answer."""

from __future__ import annotations

import asyncio
import datetime
import hashlib
import json
import re
import time
import unicodedata
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

from starlette.datastructures import Headers
from starlette.requests import Request

from finetune_assets.assistants import Assistant
from finetune_assets.serving import jsons
from finetune_assets.serving.directory import ADMIN, METRICS, Directory, Key
from finetune_assets.serving.models import SEPARATOR

MOST_BYTES = 1 << 20
"""Of a request's body."""
BODY_SECONDS = 10.0
"""To send it."""
MOST_CHARS = 32_000
"""Of all messages together."""
MOST_MESSAGES = 200
MOST_ID = 128
MOST_TENANT = 100
"""Characters, as the tables hold them."""
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
OWN_ID = re.compile("conv-[0-9a-f]{32}")
ROLES = ("system", "developer", "user", "assistant", "tool")
PASSED_ON = (
    "temperature",
    "top_p",
    "max_tokens",
    "max_completion_tokens",
    "seed",
    "stop",
    "tools",
    "tool_choice",
    "response_format",
)
"""Of OpenAI's settings: what goes to the upstream."""


SIMULATED_TIME = "x-simulated-time"
SIMULATED_FAULT = "x-simulated-fault"
"""Headers of a simulated request: its time, and the share of the candidate's replies that fail. Heeded in a simulation only."""


@dataclass(frozen=True)
class Options:
    """How a worker is started. `open_door`: no key is needed until one is made (loopback only)."""

    engine_url: str
    open_door: bool
    simulation: bool = False
    workers: int = 1


class Refused(Exception):
    """An answer with a status and a message, in OpenAI's error shape; `error` holds what an upstream says beside the message."""

    def __init__(
        self, status: int, message: str, headers: dict[str, str] | None = None, error: dict[str, Any] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers or {}
        kind = "invalid_request_error" if status < 500 else "upstream_error"
        self.error: dict[str, Any] = {"type": kind, "code": status, "param": None, **(error or {}), "message": message}


@dataclass(frozen=True)
class Ask:
    """One chat to be answered. `user` is empty where the client names neither user nor conversation; `conversation` is the stored
    id (`conversation_id`), `at` the time it came in, UTC; `told` says that the client named its conversation."""

    assistant: Assistant
    tenant: str
    vertical: str
    user: str
    conversation: str | None
    messages: list[dict[str, Any]]
    settings: dict[str, Any]
    channel: str
    at: datetime.datetime
    stream: bool = False
    fault: float = 0.0
    """Only in a simulation: the share of the candidate's replies that fail."""

    @property
    def told(self) -> bool:
        """Whether the client named its conversation."""
        return self.conversation is not None


async def read_json(request: Request) -> dict[str, Any]:
    """The body as a JSON object. Raises Refused (400, 408, 413)."""
    try:
        value = jsons.loads(await read_body(request))
    except (ValueError, RecursionError):
        raise Refused(400, "The body is no JSON.") from None
    if not isinstance(value, dict):
        raise Refused(400, "The body must be a JSON object.")
    return cast("dict[str, Any]", value)


async def read_body(request: Request, most: int = MOST_BYTES) -> bytes:
    """The body. Raises Refused (400, 408, 413)."""
    declared = request.headers.get("content-length", "0")
    if declared.isdigit() and int(declared) > most:
        raise Refused(413, f"The body is larger than {most} bytes.", {"Connection": "close"})
    try:
        async with asyncio.timeout(BODY_SECONDS):
            return await _body(request, most)
    except TimeoutError:
        raise Refused(408, f"The body did not come within {BODY_SECONDS:g} seconds.", {"Connection": "close"}) from None


async def _body(request: Request, most: int) -> bytes:
    parts, size = list[bytes](), 0
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise Refused(400, "The client went away.")
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > most:
            raise Refused(413, f"The body is larger than {most} bytes.", {"Connection": "close"})
        if not message.get("more_body"):
            return b"".join(parts)


def now(request: Request, options: Options) -> datetime.datetime:
    """When a request came in, UTC; in a simulation the time that it says. Raises Refused (400)."""
    told = request.headers.get(SIMULATED_TIME) if options.simulation else None
    if told is None:
        return datetime.datetime.now(datetime.UTC)
    try:
        return datetime.datetime.fromisoformat(told).astimezone(datetime.UTC)
    except (ValueError, OverflowError):
        raise Refused(400, f"`{SIMULATED_TIME}` is no time.") from None


def fault(request: Request, options: Options) -> float:
    """The share of the candidate's replies that fail, in a simulation; else 0."""
    told = request.headers.get(SIMULATED_FAULT, "0") if options.simulation else "0"
    return float(told) if told.replace(".", "", 1).isdecimal() else 0.0


def is_local(headers: Headers) -> bool:
    """Whether a request asks for this machine by a loopback name, and no other site's page sends it. A router without keys
    answers nothing else: a page whose name leads to 127.0.0.1 (DNS rebinding), or that posts here, is not whoever is at it."""
    hosts = [host for host in (headers.get("host", ""), page_of(headers)) if host is not None]
    return all(host in LOOPBACK or host.rpartition(":")[0] in LOOPBACK for host in hosts)


def page_of(headers: Headers) -> str | None:
    """Host and port of the page that sends a request; null where no page does, empty for one that does not say."""
    origin = headers.get("origin")
    return None if origin is None else origin.partition("://")[2]


def key_of(request: Request, directory: Directory) -> Key | None:
    """What the request's bearer key stands for."""
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    return directory.key(key.strip()) if scheme.lower() == "bearer" else None


def authenticate(request: Request, directory: Directory, metrics: bool = False) -> str | None:
    """The tenant of the request's key; null where the router runs without keys, on loopback. `metrics`: Prometheus' key will do.

    Called before the body is read. Raises Refused (401, 403).
    """
    if directory.is_open:
        return None
    key = key_of(request, directory)
    if key is None:
        raise Refused(
            401, "This router needs a valid API key of your tenant: `Authorization: Bearer …`.", {"WWW-Authenticate": "Bearer"}
        )
    if key.tenant == METRICS and not metrics:
        raise Refused(403, "This key reads /metrics and nothing else.")
    return key.tenant


def who_answers(directory: Directory, tenant: str | None, body: dict[str, Any]) -> tuple[Assistant, str]:
    """The assistant, and the tenant in whose name it answers. Raises Refused (403, 404)."""
    metadata = body.get("metadata")
    claimed = metadata.get("tenant_id") if isinstance(metadata, dict) else None
    if not (claimed is None or (isinstance(claimed, str) and 0 < len(without_slash(clean(claimed))) <= MOST_TENANT)):
        raise Refused(400, "`metadata.tenant_id` must be a short text.")
    claimed = None if claimed is None else clean(claimed)
    named = _named(body)
    if tenant is not None and tenant != ADMIN:
        if claimed is not None and claimed != tenant:
            raise Refused(403, "This key belongs to another tenant.")
        assistant = directory.assistant_of(tenant)
        if assistant is None:
            raise Refused(404, f"No assistant answers for tenant {tenant}.")
        vertical = directory.of_vertical(tenant)  # whose name its clients go on to send when it gets an assistant of its own
        if named in directory.assistants and named not in (assistant.name, vertical and vertical.name):
            raise Refused(403, f"This key's tenant is answered by {assistant.name}.")
        return assistant, tenant
    assistant = directory.assistants.get(named) if named else None
    if assistant is None and claimed is not None:
        assistant = directory.assistant_of(claimed)
    if assistant is None and len(directory.assistants) == 1 and "assistant" not in body:
        assistant = next(iter(directory.assistants.values()))
    if assistant is None:
        names = ", ".join(directory.assistants)
        raise Refused(404, f"Name the assistant as `model` (or `assistant`): {names}.")
    return assistant, claimed or assistant.select.tenant or assistant.name


def _named(body: dict[str, Any]) -> str:
    """`assistant`, or the part of `model` before a version."""
    named = body.get("assistant") or body.get("model") or ""
    return named.partition(SEPARATOR)[0] if isinstance(named, str) else ""


def openai_ask(
    request: Request, body: dict[str, Any], assistant: Assistant, tenant: str, at: datetime.datetime
) -> tuple[Any, ...]:
    """(user, conversation, messages, settings, channel) of an OpenAI request. Raises Refused (400)."""
    metadata = body.get("metadata") if isinstance(body.get("metadata"), dict) else {}
    metadata = cast("dict[str, Any]", metadata)
    messages = check_messages(body.get("messages"))
    settings = {name: body[name] for name in PASSED_ON if body.get(name) is not None}
    for name, kind, low, high in (
        ("temperature", (int, float), 0, 2),
        ("top_p", (int, float), 0, 1),
        ("max_tokens", int, 1, 100_000),
        ("max_completion_tokens", int, 1, 100_000),
        ("seed", int, -(2**63), 2**63 - 1),
    ):
        value = settings.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high):
            raise Refused(400, f"`{name}` must be a number from {low} to {high}.")
    stop = settings.get("stop")
    stops = cast("list[Any]", stop) if isinstance(stop, list) else [stop]
    if stop is not None and not (len(stops) <= 4 and all(isinstance(text, str) for text in stops)):
        raise Refused(400, "`stop` must be a text, or up to four.")
    if body.get("n") not in (None, 1):
        raise Refused(400, "`n` must be 1: a user gets one reply.")
    conversation = metadata.get("conversation_id") or request.headers.get("x-conversation-id")
    user = body.get("user") or body.get("safety_identifier") or request.headers.get("x-user-id")
    if assistant.system_prompt and messages[0]["role"] not in ("system", "developer"):
        messages = [{"role": "system", "content": assistant.system_prompt}, *messages]
    channel = metadata.get("channel")
    channel = clean(channel) if isinstance(channel, str) else ""
    return (
        identifier("user", user),
        identifier("conversation_id", conversation),
        messages,
        settings,
        channel if 0 < len(channel) <= 40 else "api",
    )


def check_messages(messages: Any) -> list[dict[str, Any]]:
    """Messages of known roles and bounded length, the user's last. Raises Refused (400)."""
    if not isinstance(messages, list) or not 1 <= len(cast("list[Any]", messages)) <= MOST_MESSAGES:
        raise Refused(400, f"`messages` must be a list of 1 to {MOST_MESSAGES} messages.")
    chars = 0
    made: list[dict[str, Any]] = []
    for message in cast("list[Any]", messages):
        if not isinstance(message, dict) or cast("dict[str, Any]", message).get("role") not in ROLES:
            raise Refused(400, f"A message needs a `role` of {', '.join(ROLES)}.")
        one = cast("dict[str, Any]", message)
        text = text_of(one.get("content"))
        if text is None:
            raise Refused(400, "A message's `content` must be a text, or a list of parts of type `text`.")
        chars += len(text)
        made.append({**one, "content": clean(text)})
    if chars > MOST_CHARS:
        raise Refused(400, f"The messages are longer than {MOST_CHARS} characters.")
    if not any(message["role"] == "user" and message["content"].strip() for message in made):
        raise Refused(400, "There is no message of the user.")
    return made


def text_of(content: Any) -> str | None:
    """OpenAI's `content`: a text, null beside a tool call, or a list of text parts; null for anything else."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return None
    texts: list[str] = []
    for part in cast("list[Any]", content):
        text = cast("dict[str, Any]", part).get("text") if isinstance(part, dict) else None
        if not isinstance(text, str):
            return None
        texts.append(text)
    return "".join(texts)


def clean(text: str) -> str:
    """A text without control characters (C0 but tab and line breaks, DEL, C1) and half characters: no store or model takes them
    well."""
    if text.isprintable():
        return text
    whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return "".join(c for c in whole if c in "\t\n\r" or unicodedata.category(c) != "Cc")


def identifier(name: str, value: Any) -> str | None:
    """An id that a client gives, or null. Raises Refused (400)."""
    if value is None or value == "":
        return None
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or len(value) > MOST_ID or not value.isprintable() or not value.strip():
        raise Refused(400, f"`{name}` must be a text of at most {MOST_ID} printable characters.")
    return value.strip()


def new_conversation() -> str:
    """The router's own id of a conversation: nobody else makes or guesses it."""
    return f"conv-{uuid.uuid4().hex}"


def conversation_id(tenant: str, named: str | None) -> str | None:
    """The stored id of a conversation that a client names: the router's own as it is, any other as its tenant's, since two
    tenants may number theirs alike; what follows its first slash is the client's."""
    return named if named is None or OWN_ID.fullmatch(named) else f"{without_slash(tenant)}/{named}"


def without_slash(tenant: str) -> str:
    """A tenant's id as a part of another id."""
    return tenant.replace("%", "%25").replace("/", "%2F")


def history_key(tenant: str, user: str, messages: list[dict[str, Any]]) -> str:
    """Names a chat by what was said in it, system messages aside: the next request repeats it."""
    said = [[m["role"], m["content"]] for m in messages if m["role"] in ("user", "assistant")]
    text = json.dumps([tenant, user, said], ensure_ascii=False)
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=16).hexdigest()


def drain_seconds(assistants: Iterable[Assistant]) -> float:
    """Longest time that a chat which is under way may need yet."""
    return max((one.serving.longest_seconds for one in assistants), default=0.0) + 1.0


class Rates:
    """Requests a minute of each tenant: a bucket that refills evenly."""

    def __init__(self) -> None:
        self.left: dict[str, tuple[float, float]] = {}

    def take(self, tenant: str, per_minute: int, workers: int) -> float:
        """0 where the tenant may ask now, else the seconds until it may. Each worker gives its share."""
        per_minute = -(-per_minute // workers)
        at = time.monotonic()
        left, seen = self.left.get(tenant, (float(per_minute), at))
        left = min(float(per_minute), left + (at - seen) * per_minute / 60)
        if left < 1:
            self.left[tenant] = (left, at)
            return (1 - left) * 60 / per_minute
        self.left[tenant] = (left - 1, at)
        if len(self.left) > 10_000:  # tenants that a client invents on loopback
            self.left.clear()
        return 0.0
