"""What an error of OpenAI's client means: the provider's code and text, what was being done, and what to do about it."""

from __future__ import annotations

import json
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from finetune_assets import once
from finetune_assets.errors import ProviderError, ProviderUnsettled
from finetune_assets.training.remote import without_secrets

if TYPE_CHECKING:
    from openai import APIError

BUSY = (408, 409, 429)
ELSEWHERE = "finetune migrate ASSISTANT --to local/MODEL (or another TRAINER/MODEL)."


@contextmanager
def translated(provider: str, doing: str, key: str | None) -> Generator[None]:
    """Turns what the client raises inside the block into ProviderError, or ProviderUnsettled where a later try may succeed."""
    import openai

    try:
        yield
    except openai.APIError as error:
        raise refused(error, provider, doing, key, ProviderUnsettled if unsettled(error) else ProviderError) from None
    except json.JSONDecodeError:  # an answer that is no JSON
        raise ProviderUnsettled(f"{provider}: {doing} failed: what came back is no JSON.") from None


def unsettled(error: APIError) -> bool:
    """Whether the same request may succeed later: no answer, too many requests, or the provider's own failure."""
    status = getattr(error, "status_code", None)
    if status == 429 and _code(error) == "insufficient_quota":
        return False
    return status is None or status >= 500 or status in BUSY


def refused(
    error: APIError, provider: str, doing: str, key: str | None, kind: type[ProviderError] = ProviderError
) -> ProviderError:
    """The error to raise. Never holds the key, not even the part of it that providers repeat."""
    status, code = getattr(error, "status_code", None), _code(error)
    body: Any = getattr(error, "body", None)
    text = body.get("message") if isinstance(body, dict) else None
    if status is None:
        cause = type(error.__cause__).__name__ if error.__cause__ else type(error).__name__
        said = f"no answer ({cause})"
    else:
        said = " ".join(part for part in (str(status), code) if part)
        said += f": {text or str(error).splitlines()[0]}" if text or str(error) else ""
    told = f"{provider}: {doing} failed with {said}".rstrip(".") + f". {_mend(status, code, doing)}".rstrip()
    after: str | None = getattr(getattr(error, "response", None), "headers", {}).get("retry-after")
    made = kind(without_secrets(told, key), status, code, once.seconds(after))
    made.turned_away = once.turned_away(status, after, error.__cause__)
    return made


def _code(error: APIError) -> str | None:
    code = getattr(error, "code", None)
    return str(code) if code else None


def _mend(status: int | None, code: str | None, doing: str) -> str:  # noqa: PLR0911 - one return a kind
    if status is None:
        return "Check the address (remote.base_url, or the provider's …_BASE_URL) and the network, then run the same again."
    if status == 401:
        return "The key is not accepted: set a valid one in the provider's variable (remote.key_env)."
    if code == "insufficient_quota":
        return f"The account has no credit left: add some at the provider and run the same again, or train elsewhere: {ELSEWHERE}"
    if status == 413:
        return (
            "The file or request is larger than the provider takes: train on fewer rows (a narrower `select`), or elsewhere: "
            f"{ELSEWHERE}"
        )
    if status == 429 or status >= 500 or status in BUSY:
        return "The provider is busy or broken; what was begun is kept, run the same again later."
    if status in (400, 403, 422) and doing.startswith("creating"):
        return (
            "No job was created. Correct what it names in the assistant's YAML. Where the organisation may train no more, or not "
            f"this model, train elsewhere: {ELSEWHERE}"
        )
    if status == 403:
        return "The key's project or organisation may not do this: give it the right, or name another key with remote.key_env."
    if status in (400, 422):
        return "The provider does not take this request: correct what it names, in the assistant's YAML or its data."
    if status == 404:
        return "Correct the name, or choose a model that the provider has."
    return ""
