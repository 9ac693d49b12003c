"""The launcher says what became of its child process."""

import sys
from pathlib import Path

import dagster as dg
import pytest

from finetune_assets.errors import LaunchError
from finetune_assets.resources import LauncherResource


@pytest.mark.filterwarnings("ignore:AssetExecutionContext.run_id:DeprecationWarning")  # inside Dagster
def test_a_killed_child_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    dying = tmp_path / "python"
    dying.write_text("#!/bin/sh\nkill -9 $$\n")
    dying.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(dying))

    @dg.asset
    def heavy(context: dg.AssetExecutionContext, launcher: LauncherResource) -> None:
        launcher.run(context, tmp_path / "spec.json", tmp_path)

    with dg.DagsterInstance.ephemeral() as instance, pytest.raises(LaunchError, match=r"heavy was ended from outside .*killed"):
        dg.materialize([heavy], instance=instance, resources={"launcher": LauncherResource()})
