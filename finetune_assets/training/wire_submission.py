"""From files to exactly one job, over OpenAI's API: each step is in the journal before the next request.

step                  journal afterwards             after a crash here, the next try
upload, per file      training_file, …               finds the file by its name, or uploads it again (costs nothing)
about to create       create_started                 looks for the run key before anything else
created               provider_job_id                attaches to the job

A plain no to such a second creation is about that one: the first one's job may still come to be listed, so it is looked for on.
A job that was cancelled before its creation was begun is not created: the journal's answer to `create_started` says so.
A creation that was not answered and is not listed is tried again, so there may be two jobs, of which one is listed late: the
journal says `doubtful`, and whoever asks for the job in the next ten minutes looks for the other one, too.
"""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

from finetune_assets.errors import DataError, ProviderError, ProviderUnsettled
from finetune_assets.training import remote, wire_request
from finetune_assets.training.provider_formats import Prepared
from finetune_assets.training.remote import ADDRESS, DOUBTFUL, GIVEN_UP, Connection, Journal, without_secrets
from finetune_assets.training.trainer import TrainingRequest
from finetune_assets.training.wire_errors import refused, translated
from finetune_assets.training.wire_profiles import MOST_PAGES, PAGE, PROFILES, address, bounded, is_mine
from finetune_assets.training.wire_states import STATUS

if TYPE_CHECKING:
    from openai import APIError, OpenAI
    from openai.types import FileObject

CREATE_TRIES = 3
UPLOAD_TRIES = 3
DOUBT_SECONDS = 600.0
"""How long after an unanswered creation a list may still come to show its job."""
UNLISTED_SECONDS = 3600.0
"""How long it is waited for a list that the provider does not give."""
FILE_SECONDS = 300.0
ROLES = ("training", "validation")


class Submission:
    """One job's way to the provider."""

    def __init__(self, client: OpenAI, connection: Connection, journal: Journal, key: str | None, settle_seconds: float) -> None:
        self.client, self.connection, self.journal = client, connection, journal
        self.provider, self.profile = connection.provider, PROFILES[connection.provider]
        self.key, self.settle_seconds = key, settle_seconds

    def run(self, request: TrainingRequest, suffix: str, files: Callable[[], dict[str, Prepared]]) -> None:
        """Does what the journal does not have yet; at the end it has `provider_job_id`."""
        state = self.journal.load()
        if not state.get("suffix"):
            first = {"suffix": suffix, "run_key": request.run_key, "fingerprint": request.fingerprint}
            self.journal.save(**first)
            state |= first
        again, here = bool(state.get("create_started")), {ADDRESS: address(self.connection)[0]}
        if again:
            found = self.find_settled(state)
            if found is not None:
                self.journal.save(provider_job_id=found)
                return
            self.journal.save(**{DOUBTFUL: True})
        else:
            for role, file in files().items():
                if not state.get(f"{role}_file"):
                    state[f"{role}_file"] = self.upload(file, file_name(request.run_key, role))
                    self.journal.save(**{f"{role}_file": state[f"{role}_file"]}, **here)
            for role in ROLES:
                self.await_file(state.get(f"{role}_file"))
        state["create_started"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        begun = self.journal.save(create_started=state["create_started"], **here)
        remote.stop_if_cancelled(self.journal, begun, again)
        self.journal.save(provider_job_id=self.create(wire_request.body(self.connection, request, state), state))

    def upload(self, file: Prepared, name: str) -> str:
        """Uploads a file as a stream, or finds the one that an earlier try of the same job uploaded; its id.

        The client's own retries are off: an upload whose answer is lost would lie there twice. Each try looks by name first.
        """
        wait = 1.0
        for attempt in range(UPLOAD_TRIES):
            if (there := self._uploaded(file, name)) is not None:
                return there
            try:
                return self._upload(file, name)
            except ProviderUnsettled:
                if attempt + 1 == UPLOAD_TRIES:
                    raise
            time.sleep(min(wait, self.settle_seconds))
            wait *= 4
        raise AssertionError("the last try returns or raises")

    def _uploaded(self, file: Prepared, name: str) -> str | None:
        with translated(self.provider, f"looking for {name}", self.key):
            there = named_files(self.client, {name})
        return next((known.id for known in there if known.bytes == file.bytes and known.status != "error"), None)

    def _upload(self, file: Prepared, name: str) -> str:
        arguments: dict[str, Any] = {"purpose": "fine-tune", "timeout": 600.0}
        if self.profile.expires:
            seconds = int(self.connection.options.get("file_days", 7)) * 86400
            arguments["expires_after"] = {"anchor": "created_at", "seconds": seconds}
        once = self.client.with_options(max_retries=0)
        with translated(self.provider, f"uploading {file.path.name}", self.key), file.path.open("rb") as stream:
            made = once.files.create(file=(name, stream, "application/jsonl"), **arguments)
        if not getattr(made, "id", None):
            raise ProviderUnsettled(f"{self.provider} answered the upload of {file.path.name} without an id; run the same again.")
        return made.id

    def await_file(self, file_id: str | None) -> None:
        """Waits until a file is checked. Raises DataError where the provider refuses it."""
        end = time.monotonic() + FILE_SECONDS
        while file_id:
            with translated(self.provider, f"asking for file {file_id}", self.key):
                file = self.client.files.retrieve(file_id)
            status = str(getattr(file, "status", "") or "")
            if status in ("error", "failed"):
                why = without_secrets(str(getattr(file, "status_details", None) or "no reason given"), self.key)
                raise DataError(f"{self.provider} refuses the file {file_id}: {why}. No job was created.")
            if status not in ("pending", "running", "notRunning") or time.monotonic() > end:
                return
            time.sleep(1)

    def create(self, body: dict[str, Any], state: Mapping[str, Any]) -> str:
        """Creates the job once; its id. Where it is unclear whether it was created, it is looked for before it is tried again."""
        import openai

        wait = 1.0
        for attempt in range(CREATE_TRIES):
            try:
                job = self.client.with_options(max_retries=0).fine_tuning.jobs.create(**body)
                if getattr(job, "id", None):
                    return job.id
            except openai.RateLimitError as error:
                if getattr(error, "code", None) == "insufficient_quota":
                    raise self._not_created(error) from None
                if attempt + 1 == CREATE_TRIES:
                    raise refused(error, self.provider, "creating the job", self.key, ProviderUnsettled) from None
                time.sleep(min(wait, self.settle_seconds))
                wait *= 4
                continue  # refused before anything was done
            except openai.APIError as error:
                status = getattr(error, "status_code", None)
                if status is not None and status < 500 and status not in (408, 409):
                    raise self._not_created(error) from None
            except json.JSONDecodeError:  # an answer that is no JSON says nothing about the job
                pass
            self.journal.save(**{DOUBTFUL: True})
            found = self.find_settled(state)
            if found is not None:
                return found
        raise ProviderUnsettled(
            f"{self.provider} did not say whether it created the job of {state['run_key']}, and lists none. Nothing is lost: "
            "run the same again, it looks for the job first."
        )

    def _not_created(self, error: APIError) -> ProviderError:
        """A plain no: there is no job, and the journal says so before anybody is told. If it is `doubtful`, one may be."""
        if self.journal.load().get(DOUBTFUL):
            no = refused(error, self.provider, "a second try to create the job", self.key)
            return ProviderUnsettled(f"{no} {remote.MAY_BE_THERE}", no.status, no.code)
        self.journal.save(create_started=None)
        return refused(error, self.provider, "creating the job", self.key)

    def find_settled(self, state: Mapping[str, Any]) -> str | None:
        """Looks for the job until `settle_seconds` after its creation: a list may show it a moment after the answer was lost."""
        since = seconds_since(state)
        end, pause = time.monotonic() + min(self.settle_seconds, max(0.0, self.settle_seconds + 1 - since)), 0.2
        while True:
            try:
                found = self.find(state)
            except ProviderUnsettled:
                found = None
            if found is not None or time.monotonic() + pause > end:
                return found
            time.sleep(pause)
            pause = min(pause * 2, 5.0)

    def find(self, state: Mapping[str, Any]) -> str | None:
        """Of this run key, or of this file and suffix: the job that succeeded, else the oldest that has not failed.

        Others that are open are cancelled; where it was given up, all of them.
        """
        query: dict[str, Any] = {"limit": PAGE}
        if self.provider == "openai":
            query["metadata"] = {"run_key": str(state["run_key"])}
        with translated(self.provider, "looking for the job", self.key):
            listed = bounded(self.client.fine_tuning.jobs.list(**query), PAGE * MOST_PAGES)
            mine = [job for job in listed if is_mine(job, state)]
            last = {"succeeded": 0, "failed": 2, "cancelled": 2}
            mine.sort(key=lambda job: (last.get(str(job.status), 1), getattr(job, "created_at", 0) or 0, job.id))
            for extra in mine if state.get(GIVEN_UP) else mine[1:]:
                if STATUS.get(str(extra.status), "running") in ("pending", "running"):
                    self.client.fine_tuning.jobs.cancel(extra.id)
        return mine[0].id if mine else None


def file_name(run_key: str, role: str) -> str:
    """Of an uploaded file; no other job has files of this name."""
    return f"{run_key}.{role}.jsonl"


def named_files(client: OpenAI, names: Collection[str]) -> list[FileObject]:
    """The files at the provider that have one of these names."""
    listed = bounded(client.files.list(purpose="fine-tune"), PAGE * MOST_PAGES)
    return [known for known in listed if known.filename in names]


def seconds_since(state: Mapping[str, Any]) -> float:
    """Since the last creation was begun, by this machine's clock; 0 where none was."""
    begun = state.get("create_started")
    if not begun:
        return 0.0
    return (datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(str(begun))).total_seconds()
