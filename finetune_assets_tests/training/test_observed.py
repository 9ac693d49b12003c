"""A local training is on its asset's timeline while it runs."""

import json
import time
from pathlib import Path

import dagster as dg
import pytest

from finetune_assets.assets import live


def test_the_last_report_is_observed_while_the_job_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(live, "OBSERVED_SECONDS", 0.05)
    file, seen = tmp_path / "progress.jsonl", list[dict[str, object]]()

    def report(step: int) -> None:
        with file.open("a") as lines:
            lines.write(json.dumps({"time": 1.0, "stage": "train", "step": step, "loss": 2.5, "grad_norm": None}) + "\n")

    report(1)  # of a start that was killed

    @dg.asset(partitions_def=dg.StaticPartitionsDefinition(["dental"]))
    def training_job(context: dg.AssetExecutionContext) -> None:
        with live.observed(context, tmp_path):
            time.sleep(0.2)
            report(7)
            end = time.monotonic() + 20
            while not seen:
                assert time.monotonic() < end
                for record in context.instance.fetch_observations(context.asset_key, limit=10).records:
                    assert record.partition_key == "dental"
                    assert record.asset_observation is not None
                    seen.append({name: value.value for name, value in record.asset_observation.metadata.items()})

    with dg.DagsterInstance.ephemeral() as instance:
        assert dg.materialize([training_job], partition_key="dental", instance=instance).success
    assert seen == [{"progress/stage": "train", "progress/step": 7, "progress/loss": 2.5}]
