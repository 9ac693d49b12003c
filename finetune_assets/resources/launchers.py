"""Dagster Pipes on each launcher: `run(context, workers, spec file, output folder)` starts one worker and waits for it.

Each raises `Ended` where the worker ended badly, and ends the worker where this process is interrupted.
"""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dagster as dg
from dagster._core.errors import DagsterPipesExecutionError  # not exported at the top

from finetune_assets.environment import Environment
from finetune_assets.errors import SettingsError
from finetune_assets.workers import Workers, noted, pod, ray_job, stop

POLL_SECONDS = 1.0


class Ended(Exception):
    """The worker ended badly; the message is the launcher's."""


def run_subprocess(context: dg.AssetExecutionContext, _workers: Workers, spec_file: Path, _output: Path) -> None:
    """A child of this process, which dies with it."""
    try:
        dg.PipesSubprocessClient().run(
            context=context,
            command=[sys.executable, "-m", "finetune_assets.worker", str(spec_file)],
            env={"FINETUNE_DIE_WITH_PARENT": str(os.getpid())},
        )
    except DagsterPipesExecutionError as failed:
        raise Ended(str(failed)) from None


def run_ray(context: dg.AssetExecutionContext, workers: Workers, spec_file: Path, output: Path) -> None:
    """A job of a running Ray cluster."""
    from dagster_ray import PipesRayJobClient  # noqa: PLC0415 (an extra)  # pyright: ignore[reportMissingImports]

    job = ray_job(workers, spec_file, _task_id(output), Environment.variables())
    client = PipesRayJobClient(address=workers.ray_address, poll_interval=POLL_SECONDS)
    try:
        _ = client.client
    except Exception as error:  # Ray raises ConnectionError, RuntimeError or its own, by version and by what answers
        raise SettingsError(
            f"No Ray cluster answers at RAY_ADDRESS={workers.ray_address} ({str(error).splitlines()[0]}). Start one "
            "(`ray start --head`), correct the address, or set FINETUNE_LAUNCHER=subprocess."
        ) from None
    task = {"launcher": "ray", "id": str(job["submission_id"]), "address": workers.ray_address}
    _at_cluster(output, task, lambda: _ray(client, context, job))


def _ray(client: Any, context: dg.AssetExecutionContext, job: dict[str, Any]) -> None:
    try:
        client.run(context=context, submit_job_params=job)
    except RuntimeError as failed:  # what the client raises for a job that failed or was stopped
        raise Ended(str(failed).splitlines()[-1]) from None


def run_kubernetes(context: dg.AssetExecutionContext, workers: Workers, spec_file: Path, output: Path) -> None:
    """A pod."""
    from dagster_k8s import PipesK8sClient  # noqa: PLC0415 (an extra)  # pyright: ignore[reportMissingImports]
    from kubernetes.config import ConfigException  # noqa: PLC0415  # pyright: ignore[reportMissingImports]

    task_id = _task_id(output)
    made = pod(workers, spec_file, task_id, Environment.variables())
    namespace = made["metadata"].pop("namespace", "default")
    client = PipesK8sClient(poll_interval=POLL_SECONDS)

    def work() -> None:
        try:
            client.run(context=context, namespace=namespace, base_pod_meta=made["metadata"], base_pod_spec=made["spec"])
        except ConfigException as error:
            raise SettingsError(
                f"FINETUNE_LAUNCHER=kubernetes finds no cluster ({error}): set KUBECONFIG, or run inside of one."
            ) from None
        except Exception as failed:  # the client's errors have no common base: gone, evicted, no image, exit code
            raise Ended(f"pod of {task_id}: {failed}") from failed

    _at_cluster(output, {"launcher": "kubernetes", "id": task_id, "namespace": namespace}, work)


RUN = {"subprocess": run_subprocess, "ray": run_ray, "kubernetes": run_kubernetes}


def _task_id(output: Path) -> str:
    """A new id that tells whose it is: part of the folder's name, and something random."""
    name = "".join(letter for letter in output.name.lower() if letter.isalnum())[:24]
    return f"finetune-{name}-{secrets.token_hex(4)}"


def _at_cluster(output: Path, task: dict[str, str], work: Callable[[], None]) -> None:
    """Waits for a task; ends it where the wait itself is ended.

    Where an earlier starter was killed its worker may still be at work: the new one waits for it by the folder's lock.
    """
    with noted(output, task):
        try:
            work()
        except (Ended, SettingsError):
            raise
        except BaseException:  # interrupted: Dagster's own error, or Ctrl-C
            stop(task)
            raise
