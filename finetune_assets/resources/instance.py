"""Dagster's own storage, put in `<FINETUNE_HOME>/dagster` whatever starts Dagster: `make dev`, `dg dev` or `finetune run`.

Named in `dagster.yaml`. Making the databases is done once under a file lock: two processes that open a fresh SQLite
storage at the same time break it for good.
"""

from __future__ import annotations

from typing import Any

from dagster._core.storage.local_compute_log_manager import LocalComputeLogManager
from dagster._core.storage.root import LocalArtifactStorage
from dagster._core.storage.sqlite_storage import DagsterSqliteStorage
from dagster._serdes import ConfigurableClassData
from filelock import FileLock

from finetune_assets.environment import Environment


def _folder() -> str:
    folder = Environment.read().dagster_storage
    folder.mkdir(parents=True, exist_ok=True)
    return str(folder)


class HomeSqliteStorage(DagsterSqliteStorage):
    """Runs, events and schedules in `<home>/dagster`."""

    @classmethod
    def config_type(cls) -> dict[str, Any]:
        """No settings: the folder comes from the environment."""
        return {}

    @classmethod
    def from_config_value(cls, inst_data: ConfigurableClassData, config_value: Any) -> HomeSqliteStorage:
        """Opens the storage, making it under a lock."""
        folder = _folder()
        with FileLock(f"{folder}/.create.lock"):
            return cls(folder, inst_data=inst_data)


class HomeArtifactStorage(LocalArtifactStorage):
    """Files that Dagster keeps, in `<home>/dagster`."""

    @classmethod
    def config_type(cls) -> dict[str, Any]:
        """No settings: the folder comes from the environment."""
        return {}

    @classmethod
    def from_config_value(cls, inst_data: ConfigurableClassData | None, config_value: Any) -> HomeArtifactStorage:
        """Opens the folder."""
        return cls(_folder(), inst_data=inst_data)


class HomeComputeLogs(LocalComputeLogManager):
    """Output of steps, in `<home>/dagster`."""

    @classmethod
    def config_type(cls) -> dict[str, Any]:
        """No settings: the folder comes from the environment."""
        return {}

    @classmethod
    def from_config_value(cls, inst_data: ConfigurableClassData | None, config_value: Any) -> HomeComputeLogs:
        """Opens the folder."""
        return cls(_folder(), inst_data=inst_data)
