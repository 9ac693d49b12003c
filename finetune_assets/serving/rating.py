"""The rating page: blind pairs of replies, and training examples to accept or to reject. Server-rendered, for phone and keyboard.

    app = Starlette(routes=rating_routes(store, engine, key))        GET /rate?link=…   POST /rate

The link says who rates what (`evaluation.human.links`), so there is no login. Which candidate a reply is from is not in the page.
An answer goes to the next open item; a link opened again goes on there, and `?item=` shows an earlier one to change it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qs, urlencode

import sqlalchemy as sa
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Route

from finetune_assets.dataset.tool_calls import said
from finetune_assets.errors import DataError
from finetune_assets.evaluation.human import book, links, study
from finetune_assets.evaluation.human.study import CHOICES, TAGS, Study
from finetune_assets.serving.intake import Refused, read_body
from finetune_assets.serving.rating_texts import TEXTS
from finetune_assets.storage import Store

TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; form-action 'self'",
    "Referrer-Policy": "no-referrer",  # the link is a secret
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
}
LARGEST = 8_192  # bytes of an answer
LONGEST = 3_600.0  # seconds on a page, above which the time says nothing


def rating_routes(store: Store, engine: sa.Engine, key: bytes, clock: Callable[[], float] = time.time) -> list[Route]:
    """Routes of the page. `engine`: the ledger's; `key`: what links are signed with; `clock`: Unix seconds."""
    page = _Page(store, engine, key, clock)
    return [Route("/rate", page.show, methods=["GET"]), Route("/rate", page.answer, methods=["POST"])]


@dataclass(frozen=True)
class _Page:
    store: Store
    engine: sa.Engine
    key: bytes
    clock: Callable[[], float]

    async def show(self, request: Request) -> Response:
        """The item asked for, else the first open one, else thanks."""
        query = request.query_params
        return await run_in_threadpool(self._show, query.get("link", ""), query.get("item"))

    async def answer(self, request: Request) -> Response:
        """Stores an answer and goes on."""
        try:
            form = parse_qs((await read_body(request, LARGEST)).decode("utf-8", "replace"))
        except Refused as refused:
            return _text(str(refused), refused.status)
        return await run_in_threadpool(self._answer, form)

    def _open(self, token: str) -> tuple[links.Rater, Study]:
        rater = links.read(token, self.key, self.clock())
        found = study.load(self.store, rater.assistant, rater.study)
        if rater.rater not in found.raters:
            raise links.LinkRefused("This link is not valid. Ask whoever sent it for a new one.")
        return rater, found

    def _show(self, token: str, wanted: str | None) -> Response:
        try:
            rater, found = self._open(token)
        except (links.LinkRefused, DataError) as refused:
            return _text(str(refused) if isinstance(refused, links.LinkRefused) else "This study is gone.", 403)
        mine = found.raters[rater.rater]
        given = {r.item: r for r in book.of_study(self.engine, rater.assistant, rater.study) if r.rater == rater.rater}
        item = wanted if wanted in mine else next((name for name in mine if name not in given), None)
        texts = TEXTS.get(found.language, TEXTS["en"])
        shared = {
            "t": texts,
            "language": found.language if found.language in TEXTS else "en",
            "done": len(given),
            "total": len(mine),
        }
        if item is None:
            return HTMLResponse(TEMPLATES.get_template("rated.html.j2").render(**shared), headers=HEADERS)
        about = found.item(item)
        sides = found.sides(about, rater.rater)
        before = mine[mine.index(item) - 1] if mine.index(item) else None
        answer = given.get(item)
        html = TEMPLATES.get_template("rating.html.j2").render(
            **shared,
            kind=found.kind,
            item=about,
            turns=[(turn["role"], said(turn)) for turn in about.context],
            replies=[about.replies[name] for name in sides],
            choices=CHOICES[found.kind],
            tags=TAGS[found.kind],
            chosen={sides[0]: "left", sides[-1]: "right"}.get(answer.choice, answer.choice) if answer else None,
            marked=answer.tags if answer else [],
            link=token,
            started=f"{self.clock():.3f}",
            back=f"/rate?{urlencode({'link': token, 'item': before})}" if before else None,
            number=mine.index(item) + 1,
        )
        return HTMLResponse(html, headers=HEADERS)

    def _answer(self, form: dict[str, list[str]]) -> Response:
        token = form.get("link", [""])[0]
        try:
            rater, found = self._open(token)
            started = form.get("started", [""])[0]
            number = started.replace(".", "", 1)
            seconds = self.clock() - float(started) if number.isascii() and number.isdecimal() else None
            taken = round(seconds, 1) if seconds is not None and 0 <= seconds <= LONGEST else None
            item, choice = form.get("item", [""])[0], form.get("choice", [""])[0]
            rating = book.rating_of(found, rater.rater, item, choice, form.get("tag", []), taken)
        except links.LinkRefused as refused:
            return _text(str(refused), 403)
        except DataError:
            return _text("This answer does not belong to this study.", 400)
        book.record(self.engine, rating)
        return RedirectResponse(f"/rate?{urlencode({'link': token})}", status_code=303, headers=HEADERS)


def _text(text: str, status: int) -> Response:
    html = TEMPLATES.get_template("notice.html.j2").render(text=text)
    return HTMLResponse(html, status_code=status, headers=HEADERS)
