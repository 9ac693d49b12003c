"""The dashboard: rendered here, renewed every two seconds, and the buttons of a rollout. No other server is needed.

With keys it asks for an administrator's (HTTP Basic: your name, and the key as password); the actor in the history is the key's
own name, and yours where it is another. Without keys, on loopback, anybody on this machine may look and press.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import datetime
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, urlencode

import jinja2
from sqlalchemy.exc import SQLAlchemyError
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Route

from finetune_assets.errors import FinetuneError
from finetune_assets.registry.tables import now
from finetune_assets.serving import control, experiments
from finetune_assets.serving.directory import ADMIN, Directory
from finetune_assets.serving.health import health_file
from finetune_assets.serving.intake import Refused, clean, page_of, read_body
from finetune_assets.serving.journal import Journal
from finetune_assets.serving.judge import judge
from finetune_assets.serving.observed import exposed, totals
from finetune_assets.storage import read_json

TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True, undefined=jinja2.StrictUndefined
)
ACTIONS = {"advance", "hold", "release", "rollback", "end"}
MOST_FORM = 16_384
"""Bytes of a form."""
EVENTS = 12
REST = 4.0
"""Times what a look at all requests of the week took, until the next one."""


def routes(directory: Directory, journal: Journal) -> list[Route]:
    """The pages of a worker."""
    page = Dashboard(directory, journal)
    return [
        Route("/", page.home),
        Route("/dashboard", page.show),
        Route("/dashboard/body", page.show_body),
        Route("/dashboard/{assistant}/experiment", page.experiment),
        Route("/dashboard/{assistant}/{action}", page.act, methods=["POST"]),
    ]


class Dashboard:
    """Assistants, versions, weights, guards, users exposed, cost, latency, last events."""

    def __init__(self, directory: Directory, journal: Journal) -> None:
        self.directory, self.ledger, self.journal = directory, directory.ledger, journal
        self.looking = threading.Lock()
        self.seen: tuple[dict[str, int], float, list[dict[str, Any]]] | None = None

    async def home(self, _: Request) -> Response:
        """The dashboard is what a browser wants here."""
        return RedirectResponse("/dashboard")

    async def show(self, request: Request) -> Response:
        """The whole page."""
        return await self._render(request, "dashboard.html.j2", self._data)

    async def show_body(self, request: Request) -> Response:
        """The part that is renewed."""
        return await self._render(request, "dashboard_body.html.j2", self._data)

    async def experiment(self, request: Request) -> Response:
        """The result of an A/B in staging so far, and of those that are over."""
        name = request.path_params["assistant"]
        if name not in self.directory.assistants:
            return HTMLResponse("There is no such assistant.", status_code=404)
        return await self._render(request, "experiment.html.j2", lambda: self._experiment(name))

    async def _render(self, request: Request, template: str, read: Callable[[], dict[str, Any]]) -> Response:
        actor = self._actor(request)
        if actor is None:
            return _who_are_you()
        try:
            data = await asyncio.get_running_loop().run_in_executor(None, read)
        except SQLAlchemyError as error:
            return HTMLResponse(f"<p>The ledger cannot be read right now ({type(error).__name__}).</p>", status_code=503)
        notice = request.query_params.get("notice", "")[:500]
        html = TEMPLATES.get_template(template).render(**data, actor=actor, notice=notice)
        return HTMLResponse(
            html, headers={"Cache-Control": "no-store", "Content-Security-Policy": _POLICY, "X-Frame-Options": "DENY"}
        )

    async def act(self, request: Request) -> Response:
        """A button: advance, hold, release, rollback, or the end of an experiment, with a reason."""
        actor = self._actor(request)
        if actor is None:
            return _who_are_you()
        if not _same_origin(request):
            return HTMLResponse("This button belongs to another page.", status_code=403)
        name, action = request.path_params["assistant"], request.path_params["action"]
        assistant = self.directory.assistants.get(name)
        if assistant is None or action not in ACTIONS:
            return HTMLResponse("There is no such assistant or action.", status_code=404)
        try:
            form = parse_qs((await read_body(request, MOST_FORM)).decode("utf-8", "replace"))
        except Refused as refused:
            return HTMLResponse(str(refused), status_code=refused.status, headers=refused.headers)
        reason, typed = (" ".join(clean(form.get(name, [""])[0]).split()) for name in ("reason", "who"))
        alone = self.directory.is_open or typed in ("", actor)
        who = typed or actor if alone else f"{actor} for {typed}"  # a login is not overwritten
        who = f"{who[:100]} (dashboard)"
        told = form.get("seen", [""])[0]
        seen = int(told) if told.isascii() and told.isdigit() else None
        ledger, settings = self.ledger, assistant.rollout

        def move() -> str:
            try:
                if action == "advance":
                    done = control.advance(ledger, name, settings, reason, who, seen)
                elif action == "rollback":
                    done = control.rollback(ledger, name, reason, who, seen=seen, settings=settings)
                elif action == "end":
                    return f"{name}: {experiments.end(ledger, name, settings, (reason, who)).text}"
                else:
                    done = (control.hold if action == "hold" else control.release)(ledger, name, reason, who, seen)
                return f"{name}: {done.event.replace('_', ' ')}"
            except FinetuneError as error:
                return str(error)
            except SQLAlchemyError as error:
                return f"{name}: nothing was changed, since the ledger cannot be written ({type(error).__name__}). Try again."

        notice = await asyncio.get_running_loop().run_in_executor(None, move)
        page = f"/dashboard/{quote(name)}/experiment" if action == "end" else "/dashboard"
        return RedirectResponse(f"{page}?{urlencode({'notice': notice})}", status_code=303)

    def _actor(self, request: Request) -> str | None:
        """Who looks; null: nobody who may."""
        if self.directory.is_open:
            return "local"
        scheme, _, value = request.headers.get("authorization", "").partition(" ")
        login, key = "", value.strip()
        if scheme.lower() == "basic":
            try:
                login, _, key = base64.b64decode(value, validate=True).decode().partition(":")
            except (binascii.Error, UnicodeDecodeError):
                return None
        found = self.directory.key(key)
        if found is None or found.tenant != ADMIN:
            return None
        login = clean(login)
        if found.name in (ADMIN, login):  # a key without a name, or its owner
            return login or "administrator"
        return f"{found.name} as {login}" if login else found.name

    def _data(self) -> dict[str, Any]:
        return {
            "assistants": self._assistants(),
            "ledger_seconds": self.directory.seconds_old,
            "problem": self.journal.problem,
            "backlog": self.journal.backlog,
            "at": datetime.datetime.now(datetime.UTC),
        }

    def _assistants(self) -> list[dict[str, Any]]:
        """What is shown of each; all who look within a while are shown the same, unless a rollout has moved."""
        with self.looking:
            moved = {state.assistant: state.generation for state in self.ledger.rollouts()}
            if self.seen is not None and self.seen[0] == moved and time.monotonic() < self.seen[1]:
                return self.seen[2]
            start, until = time.monotonic(), now() + datetime.timedelta(minutes=1)
            rows = [self._assistant(name, until) for name in self.directory.assistants]
            rows.sort(key=lambda row: (not row["state"].is_open, -row["week"]["requests"], row["name"]))
            self.seen = moved, time.monotonic() + REST * (time.monotonic() - start), rows
            return rows

    def _experiment(self, name: str) -> dict[str, Any]:
        ledger, settings = self.ledger, self.directory.assistants[name].rollout
        now_ = experiments.result(ledger, name, settings)
        at = datetime.datetime.now(datetime.UTC)
        return {"name": name, "at": at, "now": now_, "ended": experiments.ended(ledger, name)[:EVENTS]}

    def _drift(self, name: str) -> dict[str, Any] | None:
        """What `serving_health` measured last; null where it never did."""
        file = health_file(self.directory.store, name)
        if not file.exists():
            return None
        at = datetime.datetime.fromtimestamp(file.stat().st_mtime, datetime.UTC)
        return {"at": f"{at:%Y-%m-%d %H:%M}", "rows": read_json(file)["drift"]}

    def _assistant(self, name: str, until: datetime.datetime) -> dict[str, Any]:
        ledger, settings = self.ledger, self.directory.assistants[name].rollout
        state = ledger.rollout(name)
        events = ledger.events(name)
        experiment = self.directory.snapshot.experiments.get(name)
        return {
            "name": name,
            "state": state,
            "live": state.champion or self.directory.rollout(name).champion or "base model",
            "judged": judge(ledger, state, settings) if state.is_open else None,
            "exposed": exposed(ledger, name, state.salt) if state.salt else 0,
            "week": totals(ledger, name, until - datetime.timedelta(days=7), until),
            "events": events[::-1][:EVENTS],
            "steps": ["shadow", *(str(step) for step in settings.steps)],
            "experiment": experiments.result(ledger, name, settings) if experiment else None,
            "versions": ledger.versions(name)[:EVENTS],
            "drift": self._drift(name),
        }


_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; form-action 'self'"


def _who_are_you() -> Response:
    return HTMLResponse(
        "The dashboard needs an administrator's key as password.",
        status_code=401,
        headers={"WWW-Authenticate": 'Basic realm="finetune", charset="UTF-8"'},
    )


def _same_origin(request: Request) -> bool:
    """A form of this page, not of another site."""
    return page_of(request.headers) in (None, request.headers.get("host", ""))
