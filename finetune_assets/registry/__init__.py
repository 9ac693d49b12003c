"""The ledger: data sets, jobs, versions and rollouts in SQL tables that share names with the users' platform."""

from finetune_assets.registry.ledger import Ledger
from finetune_assets.registry.rollouts import Rollout
from finetune_assets.registry.tables import Job, Version

__all__ = ["Job", "Ledger", "Rollout", "Version"]
