"""Signed links for raters: who rates which study, until when. HMAC-SHA256 under the store's key (RFC 2104), nothing stored."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from dataclasses import dataclass

from finetune_assets.errors import FinetuneError

PURPOSE = b"rating link 1\0"


class LinkRefused(FinetuneError):
    """A rating link that is forged, cut short or out of date."""


@dataclass(frozen=True)
class Rater:
    """What a link says."""

    assistant: str
    study: str
    rater: str
    expires: int
    """Unix seconds."""


def sign(rater: Rater, key: bytes) -> str:
    """The token of a link."""
    body = base64.urlsafe_b64encode(json.dumps(vars(rater), separators=(",", ":")).encode()).rstrip(b"=")
    return f"{body.decode()}.{_mac(body, key)}"


def read(token: str, key: bytes, now: float) -> Rater:
    """Who the link belongs to. Raises LinkRefused, which says no more than the holder may know."""
    body, _, mac = token.partition(".")
    if not hmac.compare_digest(_mac(body.encode(), key).encode(), mac.encode()):  # of str it takes ASCII only
        raise LinkRefused("This link is not valid. Ask whoever sent it for a new one.")
    rater = Rater(**json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4))))
    if now > rater.expires:
        raise LinkRefused("This link has expired. Ask whoever sent it for a new one.")
    return rater


def _mac(body: bytes, key: bytes) -> str:
    return hmac.new(key, PURPOSE + body, hashlib.sha256).hexdigest()[:40]
