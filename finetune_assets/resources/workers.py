"""How a heavy step is started, and who trains. The child process is the same module with the same JSON spec everywhere."""

# pyright: reportMissingTypeArgument=false
from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed, wait
from dataclasses import replace
from pathlib import Path

import dagster as dg
from pydantic import Field

from finetune_assets.assistants import Assistant
from finetune_assets.environment import Environment
from finetune_assets.errors import LaunchError
from finetune_assets.resources.launchers import RUN, Ended
from finetune_assets.storage import Store, read_json
from finetune_assets.training.local import LocalTrainer, cancel
from finetune_assets.training.remote import Connection, Journal, Notes, RemoteTrainer
from finetune_assets.training.trainer import Trainer
from finetune_assets.training.trainers import connect
from finetune_assets.workers import Workers


class LauncherResource(dg.ConfigurableResource):
    """Starts `python -m finetune_assets.worker SPEC` and waits for it, its progress in the run's log (Dagster Pipes)."""

    launcher: str | None = Field(default=None, description="subprocess, ray or kubernetes; default: FINETUNE_LAUNCHER.")

    @property
    def workers(self) -> Workers:
        """How children are started."""
        configured = Environment.read().workers
        return replace(configured, launcher=self.launcher) if self.launcher else configured

    def run(self, context: dg.AssetExecutionContext, spec_file: Path, output: Path) -> None:
        """Runs one task. Raises LaunchError with the child's own message, SettingsError where the launcher cannot be used."""
        workers = self.workers
        workers.check()
        try:
            RUN[workers.launcher](context, workers, spec_file, output)
        except Ended as failed:
            error = output / "error.json"
            if error.exists():
                raise LaunchError(str(read_json(error)["message"])) from None
            raise LaunchError(
                f"The child process of {context.asset_key.to_user_string()} was ended from outside ({failed}): killed, or out of "
                "memory. Run the same again: it goes on from its last checkpoint."
            ) from None

    def run_all(self, context: dg.AssetExecutionContext, tasks: Sequence[tuple[Path, Path]]) -> None:
        """Runs tasks (spec file, output folder) at once. Where one fails, or the run is interrupted, the others are ended."""
        with ThreadPoolExecutor(len(tasks)) as pool:
            running = {pool.submit(self.run, context, spec, output): output for spec, output in tasks}
            try:
                for done in as_completed(running):
                    done.result()
            except BaseException:
                while left := [output for future, output in running.items() if not future.done()]:
                    for output in left:  # again, since a worker that is just starting cannot be found yet
                        cancel(output)
                    wait(running, timeout=0.5)
                raise


class TrainerResource(dg.ConfigurableResource):
    """The trainer that an assistant's YAML names."""

    def of(self, assistant: Assistant, store: Store, launch: Callable[[Path, Path], None]) -> Trainer:
        """The back-end of `assistant.trainer`; `launch(spec file, output folder)` starts a child process."""
        if assistant.trainer == "local":
            return LocalTrainer(launch, store, Environment.read().workers)
        return connect(Connection.of(assistant), store, Notes())

    def rented(self, connection: Connection, store: Store, journal: Journal) -> RemoteTrainer:
        """A rented trainer that goes on with the job of a journal."""
        return connect(connection, store, journal)
