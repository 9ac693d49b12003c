"""How well personal data are found in an assistant's own texts: made-up people planted into a sample of its data set.

The figures (`corpus.planted`) stand beside the frozen folder, which never changes: `<home>/datasets/<assistant>/privacy/`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl

from finetune_assets.assistants.settings import Assistant
from finetune_assets.corpus.planted import Planted, measure
from finetune_assets.corpus.scrubbing import regions_of
from finetune_assets.dataset.reading import scan, selected, window
from finetune_assets.dataset.selection import Left
from finetune_assets.errors import NothingSelected
from finetune_assets.storage import Store, read_json, write_json

VERSION = 1
"""Of what is planted; another one is measured anew."""
EACH = 30  # planted values of a kind: about a second
MOST_ROWS = 20_000


def planted_in(store: Store, assistant: Assistant, dataset: Path) -> dict[str, Any]:
    """The figures of a frozen data set's assistant (`Planted.as_dict`), measured once for each data set."""
    known = known_figures(dataset)
    if known is None:
        known = planted(store, assistant, EACH).as_dict()
        write_json(_path(dataset), {"version": VERSION, "figures": known})
    return known


def known_figures(dataset: Path) -> dict[str, Any] | None:
    """The figures of a frozen data set; null where nobody has measured them."""
    kept: dict[str, Any] = read_json(_path(dataset)) if _path(dataset).exists() else {}
    return kept["figures"] if kept.get("version") == VERSION else None


def _path(dataset: Path) -> Path:
    return dataset.parent / "privacy" / f"{dataset.name}.json"


def planted(store: Store, assistant: Assistant, each: int, seed: int = 0) -> Planted:
    """Plants into the newest stored conversations of an assistant. Raises NothingSelected where there are none."""
    left = Left.of(store)
    talks: list[list[str]] = []
    whose: set[tuple[str, str]] = set()
    for week in reversed(window(store.weeks("conversations"), assistant.window_weeks)):
        lazy = scan(store, "conversations", [week])
        frame = pl.DataFrame() if lazy is None else lazy.filter(selected(assistant)).collect()
        if frame.height:
            talks += [[turn["content"] for turn in turns] for turns in frame["messages"].head(MOST_ROWS)]
            whose |= set(frame.select("tenant_id", "vertical").unique().rows())
        if len(talks) >= MOST_ROWS:
            break
    if not talks:
        raise NothingSelected(f"Assistant {assistant.name!r}: the corpus holds no conversation of it; start `finetune run`.")
    common = set.intersection(*(set(regions_of(left.regions, tenant, vertical)) for tenant, vertical in whose))
    return measure(talks, language=assistant.language, regions=sorted(common), allow=left.contacts, each=each, seed=seed)


def kind_rows(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """The figures by kind, as rows of a table."""
    parts = ((figures["kinds"], "yes"), (figures["not_looked_for"], "no"))
    return [{"kind": kind, **n, "looked_for": looked} for kinds, looked in parts for kind, n in kinds.items()]
