"""`POST /feedback`: a judgement of a reply, kept in the platform's table, which the corpus reads.

What a client says of a reply is checked against the request that gave it: only its own tenant may judge it.
"""

from __future__ import annotations

import asyncio
import uuid
from typing import Any

import sqlalchemy as sa
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from finetune_assets.corpus.personal_data import scrub_conversation
from finetune_assets.registry.traffic import requests
from finetune_assets.serving import intake
from finetune_assets.serving.directory import ADMIN, Directory
from finetune_assets.serving.intake import Options, Rates, Refused
from finetune_assets.serving.journal import Journal
from finetune_assets.serving.metrics import Metrics
from finetune_assets.serving.talks import in_time

LOOK_AGAIN = (0.1, 0.2, 0.4)
"""Seconds after which it looks again for its request, which another worker may be about to write."""
MOST_CHARS = 8_000
"""Of a correction, and of a comment."""
MOST_AT_ONCE = 64
"""Judgements that one worker looks up at a time; one more is told to come back."""


class Feedback:
    """The endpoint of one worker."""

    def __init__(self, directory: Directory, journal: Journal, metrics: Metrics, rates: Rates, options: Options) -> None:
        self.directory, self.journal, self.metrics, self.options = directory, journal, metrics, options
        self.rates, self.looks = rates, 0

    async def take(self, request: Request) -> Response:
        """202: it is kept. Raises Refused (400, 401, 403, 404, 429, 503)."""
        at = intake.now(request, self.options)
        tenant = intake.authenticate(request, self.directory)
        body = await intake.read_json(request)
        request_id, kind = _judged(body)
        texts = [body.get(name) for name in ("expected_response", "comment")]
        if any(text is not None and (not isinstance(text, str) or len(text) > MOST_CHARS) for text in texts):
            raise Refused(400, f"`expected_response` and `comment` must be texts of at most {MOST_CHARS:,} characters.")
        self._admit(tenant)
        try:
            found = await self._request(request_id)
        finally:
            self.looks -= 1
        if found is None:
            raise Refused(404, f"There is no request {request_id}.")
        if tenant not in (None, ADMIN, found["tenant_id"]):
            raise Refused(403, "This request belongs to another tenant.")
        settings = self.directory.assistants.get(str(found["assistant"]))
        cleaned = [intake.clean(text) if isinstance(text, str) else None for text in texts]
        if settings is None or settings.serving.texts != "raw":
            cleaned = [scrub_conversation([text])[0][0] if text else None for text in cleaned]
        row = {
            "feedback_id": f"f-{uuid.uuid4().hex}",
            "tenant_id": found["tenant_id"],
            "conversation_id": found["conversation_id"],
            "message_id": found["message_id"],
            "feedback_type": kind,
            "rating": body.get("rating"),
            "expected_response": cleaned[0],
            "comment": cleaned[1],
            "created_at": at.isoformat(),
        }
        if not self.journal.append([("ai_rlhf_feedback", row)]):
            raise Refused(503, "The feedback cannot be kept right now; send it again.", {"Retry-After": "5"})
        self.metrics.feedback.labels(str(found["assistant"]), kind).inc()
        return JSONResponse({"feedback_id": row["feedback_id"], "request_id": request_id}, status_code=202)

    def _admit(self, tenant: str | None) -> None:
        """Lets a judgement be looked up, a tenant's as often as its chats. Raises Refused (429)."""
        assistant = None if tenant is None else self.directory.assistant_of(tenant)
        wait = 0.0
        if assistant is not None:
            wait = self.rates.take(f"{tenant} feedback", assistant.serving.requests_per_minute, self.options.workers)
        if wait or self.looks >= MOST_AT_ONCE:
            raise Refused(429, "Too much feedback at once; try again.", {"Retry-After": str(max(1, round(wait)))})
        self.looks += 1

    async def _request(self, request_id: str) -> Any:
        """The row of a live request, once it is in the ledger; null where there is none."""
        query = sa.select(requests).where((requests.c.request_id == request_id) & (requests.c.kind == "live"))

        def look() -> Any:
            with self.directory.ledger.engine.connect() as connection:
                return connection.execute(query).mappings().first()

        for wait in (*LOOK_AGAIN, None):
            found = await in_time(look)
            if found is not None or wait is None:
                return found
            await asyncio.sleep(wait)
        return None


def _judged(body: dict[str, Any]) -> tuple[str, str]:
    """Which reply, and positive or negative; the stars are looked at too. Raises Refused (400)."""
    request_id = intake.identifier("request_id", body.get("request_id"))
    kind, rating = body.get("feedback_type"), body.get("rating")
    if request_id is None or kind not in ("positive", "negative"):
        raise Refused(400, "Feedback needs `request_id` and `feedback_type` (positive, negative).")
    if rating is not None and (isinstance(rating, bool) or not isinstance(rating, int) or not 1 <= rating <= 5):
        raise Refused(400, "`rating` must be a whole number from 1 to 5.")
    return request_id, str(kind)
