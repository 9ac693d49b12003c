"""`finetune run --full`: a row that changed without any sign of it is found."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from finetune_assets.environment import ROOT
from finetune_assets_tests.corpus.exports import export, write


@pytest.mark.slow
def test_a_row_that_changed_unseen_is_found_by_full(tmp_path: Path) -> None:
    source = write(tmp_path / "source", export(12), ".jsonl")
    (tmp_path / "assistants").mkdir()
    (tmp_path / "assistants" / "dental.yaml").write_text("select: {vertical: dental}\n")
    own = {"FINETUNE_HOME": tmp_path / "home", "FINETUNE_SOURCE": source, "FINETUNE_ASSISTANTS": tmp_path / "assistants"}

    def run(*options: str) -> str:
        command = [sys.executable, "-m", "finetune_assets.cli", "run", "--assistant", "dental", "--until", "clean_examples"]
        environment = {**os.environ, **{name: str(value) for name, value in own.items()}}
        return subprocess.run([*command, *options], cwd=ROOT, env=environment, check=True, capture_output=True, text=True).stderr

    assert "1 of 1 weeks to read" in run()
    messages = source / "messages.jsonl"
    before = messages.stat()
    messages.write_text(messages.read_text().replace("mensaje 0", "mensaje A"))
    os.utime(messages, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert "Corpus is up to date" in run()
    assert "1 of 1 weeks to read" in run("--full")
    assert "Corpus is up to date" in run("--full")
