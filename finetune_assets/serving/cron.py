"""For schedulers that call an address instead of running Dagster's daemon: asks for all open remote jobs, as the sensor does.

    GET or POST /cron/finetuning      Authorization: Bearer FINETUNE_CRON_SECRET
    {"success": true, "checked": 2, "results": [{"job", "assistant", "provider", "status", "provider_status", "error", "note"}]}

What has ended is written to the ledger; phase two starts with the daemon, or with `finetune run --assistant NAME --wait`.
"""

from __future__ import annotations

import hmac
from typing import TYPE_CHECKING, Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from finetune_assets.environment import Environment, variable
from finetune_assets.registry import Ledger
from finetune_assets.registry.remote_jobs import due
from finetune_assets.registry.tables import now
from finetune_assets.storage import Store

if TYPE_CHECKING:
    from finetune_assets.training.polling import Polled

SECRET = "FINETUNE_CRON_SECRET"
SECONDS = 40.0


def cron_routes(environment: Environment, ledger: Ledger) -> list[Route]:
    """The route; without the secret in the environment it is not there."""
    store = Store(environment.home)

    def ask() -> list[Polled]:
        from finetune_assets.training.polling import poll  # noqa: PLC0415 - what a router that only chats need not hold
        from finetune_assets.training.trainers import connect  # noqa: PLC0415

        jobs = due(ledger, now())
        return poll(ledger, jobs, lambda at, journal: connect(at, store, journal), environment.tables, SECONDS) if jobs else []

    async def check(request: Request) -> Response:
        secret = variable(SECRET)
        if secret is None:
            return JSONResponse({"success": False, "error": f"{SECRET} is not set, so nobody may ask."}, 404)
        said = request.headers.get("Authorization", "").encode()
        if not hmac.compare_digest(said, f"Bearer {secret}".encode()):
            return JSONResponse({"success": False, "error": f"Authorization is not `Bearer` and the value of {SECRET}."}, 401)
        polled = await run_in_threadpool(ask)
        return JSONResponse(
            {"success": True, "checked": sum(one.reached for one in polled), "results": [_row(one) for one in polled]}
        )

    return [Route("/cron/finetuning", check, methods=["GET", "POST"])]


def _row(one: Polled) -> dict[str, Any]:
    job = one.job
    about = {"job": job.id, "assistant": job.assistant, "provider": job.provider, "status": job.status}
    return {**about, "provider_status": one.provider_status, "error": job.error, "note": one.note}
