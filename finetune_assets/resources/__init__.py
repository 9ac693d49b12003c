"""Resources: where data come from, where results go, who trains, and how a heavy step is started."""

from finetune_assets.resources.project import AssistantsResource, LedgerResource, SourceResource, StoreResource
from finetune_assets.resources.workers import LauncherResource, TrainerResource

__all__ = ["AssistantsResource", "LauncherResource", "LedgerResource", "SourceResource", "StoreResource", "TrainerResource"]
