"""Which back-end a connection has."""

from __future__ import annotations

from finetune_assets.errors import SettingsError
from finetune_assets.storage import Store
from finetune_assets.training.aws import AwsTrainer
from finetune_assets.training.bedrock import BedrockTrainer
from finetune_assets.training.openai_wire import OpenAIWire
from finetune_assets.training.remote import Connection, Journal, RemoteTrainer
from finetune_assets.training.sagemaker import SageMakerTrainer, limits
from finetune_assets.training.wire_profiles import PROFILES

AWS: dict[str, type[AwsTrainer]] = {"bedrock": BedrockTrainer, "sagemaker": SageMakerTrainer}


def connect(connection: Connection, store: Store, journal: Journal) -> RemoteTrainer:
    """The rented trainer of a connection; `journal` is that of the job it works on. Raises SettingsError for an unknown one."""
    if connection.provider in PROFILES:
        return OpenAIWire(connection, store, journal)
    if connection.provider in AWS:
        return AWS[connection.provider](connection, store, journal)
    raise SettingsError(f"trainer {connection.provider!r} is no rented trainer.")


def open_hours(connection: Connection) -> float:
    """Hours after which an open job is taken as stuck: `remote.max_hours`. SageMaker ends a job at limits of its own, which come
    first; an hour is for the upload before and the stopping afterwards."""
    if connection.provider == "sagemaker":
        return limits({**connection.options, **(connection.options.get("aws") or {})})[1] / 3600 + 1
    return float(connection.options["max_hours"])


def credentials(connection: Connection) -> str | None:
    """The environment variable that holds a connection's key; null where the provider has a chain of its own (AWS)."""
    if connection.key_env is not None or connection.provider not in PROFILES:
        return connection.key_env
    return PROFILES[connection.provider].key_env
