"""The code location: every asset, check, job, schedule, sensor and resource of the project, and nothing else."""

from __future__ import annotations

import warnings

import dagster as dg

# Partitioned checks are a preview in Dagster 1.13, which is pinned; the gates need them.
warnings.filterwarnings("ignore", category=dg.PreviewWarning)
warnings.filterwarnings("ignore", category=dg.BetaWarning)

from finetune_assets.assets import corpus, dataset, deployment, distillation, evaluation, training, watch  # noqa: E402
from finetune_assets.automation import job_control, rollouts  # noqa: E402
from finetune_assets.automation.jobs import JOBS  # noqa: E402
from finetune_assets.automation.schedules import SCHEDULES  # noqa: E402
from finetune_assets.automation.sensors import SENSORS  # noqa: E402
from finetune_assets.resources import (  # noqa: E402
    AssistantsResource,
    LauncherResource,
    LedgerResource,
    SourceResource,
    StoreResource,
    TrainerResource,
)

PARTS = (corpus, watch, dataset, distillation, training, evaluation, deployment)


@dg.definitions
def defs() -> dg.Definitions:
    """Everything that Dagster loads."""
    return dg.Definitions(
        assets=[asset for part in PARTS for asset in part.ASSETS],
        asset_checks=[check for part in PARTS for check in part.CHECKS],
        jobs=[*JOBS, *job_control.JOBS, *rollouts.JOBS],
        schedules=[*SCHEDULES, *rollouts.SCHEDULES],
        sensors=[*SENSORS, *rollouts.SENSORS],
        executor=dg.in_process_executor,  # light steps; a heavy one is a child process anyway
        resources={
            "source": SourceResource(),
            "store": StoreResource(),
            "assistants": AssistantsResource(),
            "ledger": LedgerResource(),
            "launcher": LauncherResource(),
            "trainer": TrainerResource(),
        },
    )
