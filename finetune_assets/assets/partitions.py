"""The two kinds of partition: a week of the corpus, an assistant of everything else; and words that the assets share."""

import dagster as dg

from finetune_assets.environment import Environment

WEEK_FORMAT = "%Y-%m-%d"

weeks = dg.WeeklyPartitionsDefinition(
    start_date=Environment.read().first_week.isoformat(), day_offset=1, end_offset=1, timezone="UTC", fmt=WEEK_FORMAT
)
"""Mondays, UTC; `end_offset` includes the current week, which is rebuilt until it is over."""

assistants = dg.DynamicPartitionsDefinition(name="assistant")

OWNERS = ["team:data"]
GPU_POOL = "gpu"


def every_week(asset: str) -> dg.AssetDep:
    """A dependency of an assistant's asset on all weeks of a corpus asset.

    The inferred mapping between a weekly and a dynamic definition is identity, which fails at load.
    """
    return dg.AssetDep(asset, partition_mapping=dg.AllPartitionMapping())
