"""The corpus of a few weeks, built by Dagster as the settings of the environment say."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import dagster as dg

from finetune_assets.assets import corpus
from finetune_assets.resources import LauncherResource, LedgerResource, SourceResource, StoreResource
from finetune_assets_tests.corpus.exports import Row, at, conversation, judgement, message, write

WEEKS = 5
RANGE = {
    "dagster/asset_partition_range_start": f"{at():%Y-%m-%d}",
    "dagster/asset_partition_range_end": f"{at(weeks=WEEKS - 1):%Y-%m-%d}",
}


def source(folder: Path) -> Path:
    """Conversations of five weeks of three tenants; phone numbers in them, and feedback that comes a week late."""
    tables: dict[str, list[Row]] = {"conversations": [], "messages": [], "feedback": []}
    for number in range(WEEKS * 4):
        start = {"weeks": number // 4, "minutes": number}
        tenant = f"clinic_{number % 3}"
        tables["conversations"].append(conversation(number, tenant_id=tenant, started_at=at(**start), ended_at=None))
        for turn in range(4):
            content = f"mensaje {number} {turn}, mi correo es persona{number}@example.org"
            when = at(weeks=start["weeks"], minutes=number + turn / 10)
            tables["messages"].append(message(number * 4 + turn, number, content=content, created_at=when))
        late = at(weeks=min(start["weeks"] + 1, WEEKS - 1), minutes=number)
        tables["feedback"].append(judgement(number, number * 4 + 1, number, tenant_id=tenant, created_at=late))
    return write(folder, tables)


def build(
    home: Path, folder: Path, assets: Sequence[dg.AssetsDefinition] = corpus.ASSETS
) -> tuple[dg.ExecuteInProcessResult, list[str]]:
    """One run over all weeks, and what its log says."""
    resources = {
        "store": StoreResource(home=str(home)),
        "source": SourceResource(urls=[str(folder)]),
        "ledger": LedgerResource(url=f"sqlite:///{home}.db"),
        "launcher": LauncherResource(),
    }
    home.mkdir(parents=True, exist_ok=True)
    with dg.DagsterInstance.ephemeral() as instance:
        done = dg.materialize(assets, resources=resources, instance=instance, tags=RANGE, raise_on_error=False)
        return done, [entry.user_message for entry in instance.all_logs(done.run_id)]
