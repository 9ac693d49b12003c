"""How many replies an assistant gives in a month, by what its corpus has seen: what a monthly cost is reckoned with."""

from __future__ import annotations

import polars as pl

from finetune_assets.assistants.settings import Assistant
from finetune_assets.storage import Store

WEEKS = 4
"""Newest whole weeks that are looked at."""
A_MONTH = 365.25 / 12 / 7  # weeks


def requests_per_month(store: Store, assistant: Assistant) -> int | None:
    """Assistant messages a month in the newest weeks of the corpus; null where there are none."""
    weeks = store.weeks("examples")[:-1][-WEEKS:] or store.weeks("examples")
    files = [file for week in weeks for file in sorted(store.corpus("examples", week).glob("*.parquet"))]
    if not files:
        return None
    select = assistant.select
    mine = pl.col("tenant_id") == select.tenant if select.tenant is not None else pl.col("vertical") == select.vertical
    count = sum(int(pl.scan_parquet(file).filter(mine).select(pl.len()).collect().item()) for file in files)
    return round(count / len(weeks) * A_MONTH) if count else None
