"""The way to another trainer: what of the old one's settings stays behind, and where the new one's come from."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from finetune_assets.errors import SettingsError
from finetune_assets.storage import Store
from finetune_assets.training.migration import retarget
from finetune_assets.training.remote import Connection, Notes
from finetune_assets.training.trainers import connect
from finetune_assets.training.wire_profiles import URL_VARIABLES, address
from finetune_assets_tests.training.fake_provider import FakeProvider
from finetune_assets_tests.training.remote_request import assistant, dataset, request, wire

OLD = {"base_url": "http://127.0.0.1:9/old", "key_env": "OLD_KEY"}
PLACE = {"role": "arn:aws:iam::123456789012:role/training", "bucket": "rows", "region": "us-east-1"}


@pytest.mark.parametrize("trainer", ["azure", "openai_compatible", "nebius"])
def test_another_wire_is_reached_by_its_own_variables(
    fake: FakeProvider, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trainer: str
) -> None:
    frozen = dataset(tmp_path / "frozen")
    fake.set(bom=trainer == "azure")
    there = retarget(assistant("openai", remote=OLD), f"{trainer}/gpt-4o-mini-2024-07-18")
    if trainer == "nebius":
        assert address(Connection.of(there)) == ("https://api.tokenfactory.nebius.com/v1/", "NEBIUS_API_KEY")
        return
    monkeypatch.delenv(URL_VARIABLES[trainer], raising=False)
    with pytest.raises(SettingsError, match=f"set {URL_VARIABLES[trainer]} in the environment"):
        wire(there, tmp_path).submit(request(frozen, there))
    monkeypatch.setenv(URL_VARIABLES[trainer], fake.url)
    with closing(wire(there, tmp_path)) as at:
        assert at.submit(request(frozen, there)).id == fake.jobs[0]["id"]


def test_the_same_trainer_keeps_its_address() -> None:
    same = retarget(assistant("openai_compatible", remote=OLD), "openai_compatible/open/other-7b")
    assert address(Connection.of(same)) == tuple(OLD.values())


def test_bedrock_works_where_the_settings_say(tmp_path: Path) -> None:
    frozen = dataset(tmp_path / "frozen")
    for places, missing in (({}, r"needs remote\.aws\.role in the assistant's YAML"), (PLACE, None)):
        there = retarget(assistant("openai", remote={**OLD, "deploy": True, "aws": places}), "bedrock/amazon.nova-lite-v1:0:300k")
        trainer, asked = connect(Connection.of(there), Store(tmp_path), Notes()), request(frozen, there)
        if missing is None:
            trainer.validate(asked)
            continue
        with pytest.raises(SettingsError, match=missing):
            trainer.validate(asked)
