"""A local training while it runs: its last report, on the timeline of `training_job`."""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread

import dagster as dg

from finetune_assets.training.local import last_progress

OBSERVED_SECONDS = 30.0


@contextmanager
def observed(context: dg.AssetExecutionContext, folder: Path) -> Generator[None]:
    """Inside the block: an observation every OBSERVED_SECONDS where there is a new report in a job's folder."""
    over = Event()

    def tell() -> None:
        told = last_progress(folder / "progress.jsonl")  # of an earlier start
        while not over.wait(OBSERVED_SECONDS):
            progress = last_progress(folder / "progress.jsonl")
            if progress != told:
                told = progress
                known = {f"progress/{key}": value for key, value in progress.items() if value is not None and key != "time"}
                seen = dg.AssetObservation(context.asset_key, partition=context.partition_key, metadata=known)
                context.instance.report_runless_asset_event(seen)  # the run's own events come when the step has ended

    teller = Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        over.set()
        teller.join()
