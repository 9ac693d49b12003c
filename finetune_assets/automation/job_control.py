"""`finetune jobs` in the UI: list, events, cancel, pause and resume, launched from the Launchpad of the job `control_jobs`."""

from typing import Any

import dagster as dg
from pydantic import Field

from finetune_assets.assets.metadata import records_table
from finetune_assets.environment import Environment
from finetune_assets.errors import SettingsError
from finetune_assets.overview import cancel_job, hold_job, job_events, job_rows

SHOWN = ["id", "assistant", "provider", "status", "created_at", "trained_tokens", "fine_tuned_model", "error"]
EVENTS = ["created_at", "level", "message", "data"]
ACTIONS = ("list", "events", "cancel", "pause", "resume")
MOST_EVENTS = 200
"""Newest events on the page; `finetune jobs events` prints all."""


class Control(dg.Config):
    """One wish of a person about training jobs, local or remote."""

    do: str = Field(default="list", description="list, events, cancel, pause or resume.")
    job: str = Field(default="", description="The job's id, as `list` shows it; not needed for `list`.")
    ended: bool = Field(default=False, description="With cancel: you have seen at the provider that the job runs no more.")


@dg.op(description="Does one of list, events, cancel, pause, resume; what came of it is in the output's metadata.")
def control(context: dg.OpExecutionContext, config: Control) -> str:
    """The same functions as the command line's."""
    environment = Environment.read()
    if config.do not in ACTIONS:
        raise SettingsError(f"do: {config.do!r} is none of {', '.join(ACTIONS)}.")
    if config.do != "list" and not config.job:
        raise SettingsError(f"`{config.do}` needs the id of a job; launch `list` to see them.")
    metadata: dict[str, Any] = {}
    if config.do == "list":
        rows = job_rows(environment, None)
        said, metadata["jobs"] = f"{len(rows)} jobs", records_table(rows, SHOWN)
    elif config.do == "events":
        events = job_events(environment, config.job)
        said, metadata["events"] = f"{len(events)} events", records_table(events[-MOST_EVENTS:], EVENTS)
    elif config.do == "cancel":
        said = cancel_job(environment, config.job, config.ended)
    else:
        state = hold_job(environment, config.job, pause=config.do == "pause")
        said = f"{config.job}: {state.provider_status}"
    context.log.info(said)
    context.add_output_metadata({"said": said, **metadata})
    return said


@dg.job(description="Training jobs, local and remote: list, events, cancel, pause, resume. Choose in the Launchpad.")
def control_jobs() -> None:
    """One op; its configuration says what and for which job."""
    control()


JOBS = [control_jobs]
