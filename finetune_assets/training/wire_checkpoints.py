"""Providers whose jobs name no model (Nebius): the newest checkpoint is files, which come home, or are served under a name.

https://docs.tokenfactory.nebius.com/post-training/how-to-fine-tune (checkpoints and their `result_files`) and
https://docs.studio.nebius.com/api-reference/models/create-a-custom-model (`POST /v0/models` of `JOB:CHECKPOINT`).
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from finetune_assets.errors import ProviderUnsettled, TrainingError
from finetune_assets.storage import replacing_folder
from finetune_assets.training.remote import TRAIN_AGAIN, Journal
from finetune_assets.training.wire_profiles import MOST_PAGES, PAGE, bounded

if TYPE_CHECKING:
    from openai import OpenAI

SERVED, BROKEN = ("active",), ("error", "failed")
MODEL_FILES = ("config.json", "adapter_config.json")


def newest(client: OpenAI, job_id: str) -> Any:
    """The checkpoint of the most steps. Raises TrainingError where there is none."""
    pages = client.fine_tuning.jobs.checkpoints.list(job_id, limit=PAGE)
    found = bounded(pages, PAGE * MOST_PAGES)
    if not found:
        raise TrainingError(f"Job {job_id} succeeded, but lists no checkpoint: its model is gone. {TRAIN_AGAIN}")
    return max(found, key=lambda one: (getattr(one, "step_number", None) or 0, getattr(one, "created_at", None) or 0))


def fetch(client: OpenAI, checkpoint: Any, folder: Path) -> None:
    """Downloads a checkpoint's files into a new folder, as a stream.

    Raises TrainingError for what is no model, ProviderUnsettled where the connection breaks.
    """
    import httpx2  # noqa: PLC0415 - the client's own transport, whose errors come out of a stream as they are

    files = getattr(checkpoint, "result_files", None) or []
    if not files:
        raise TrainingError(
            f"Checkpoint {checkpoint.id} lists no files, so the model cannot come home. Set `remote.deploy: true`."
        )
    with replacing_folder(folder) as draft:
        for file_id in files:
            name = client.files.retrieve(file_id).filename
            target = draft / Path(name).name  # whatever path it had there
            try:
                with client.files.with_streaming_response.content(file_id) as answer:
                    answer.stream_to_file(target)
            except httpx2.HTTPError as error:
                raise ProviderUnsettled(f"Downloading {name} ended early ({error}); run the same again.") from None
        if not any((draft / name).exists() for name in MODEL_FILES):
            names = ", ".join(sorted(path.name for path in draft.iterdir()))
            raise TrainingError(f"Checkpoint {checkpoint.id} is no model: of {' and '.join(MODEL_FILES)} it has none ({names}).")


def serve(
    client: OpenAI, journal: Journal, lock: AbstractContextManager[Any], job_id: str, base_model: str, name: str
) -> tuple[str, str, str | None]:
    """Makes the newest checkpoint answer, once: the name to ask it by, its status, and why it failed.

    `lock`: of whoever may ask for the same job meanwhile.
    """
    served = journal.load().get("served")
    if not served:
        with lock:
            served = journal.load().get("served") or _make(client, journal, job_id, base_model, name)
    told: Any = client.get(f"{_url(client)}/{quote(served, safe='')}", cast_to=object)
    return served, str(told.get("status") or "missing"), told.get("status_reason")


def _make(client: OpenAI, journal: Journal, job_id: str, base_model: str, name: str) -> str:
    """The custom model of the newest checkpoint, found where it was made before; its name, which the journal has then."""
    source = f"{job_id}:{newest(client, job_id).id}"
    listed: Any = client.get(_url(client), cast_to=object) if journal.load().get("serve_started") else []
    journal.save(serve_started=True)
    models = listed.get("data", []) if isinstance(listed, dict) else listed
    made: Any = next((one for one in models if one.get("source") == source), None)
    if made is None:
        asked = {"name": name, "base_model": base_model, "source": source}
        made = client.with_options(max_retries=0).post(_url(client), body=asked, cast_to=object)
    journal.save(served=made["name"])
    return made["name"]


def _url(client: OpenAI) -> str:
    return str(client.base_url).rstrip("/").removesuffix("/v1") + "/v0/models"
