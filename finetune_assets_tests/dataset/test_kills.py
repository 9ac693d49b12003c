"""Killed between any two writes of a build, the next build makes the same data set, and `latest` is whole at every moment."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from finetune_assets.dataset import check_leaks, choose, freeze, latest, read_manifest
from finetune_assets_tests.dataset.small_corpus import Corpus, dental

BUILD = """
import os, signal, sys
from pathlib import Path
from finetune_assets.dataset import choose, freeze, load_staged, prune, stage
from finetune_assets.storage import Store
from finetune_assets_tests.dataset.small_corpus import dental

home, left = Path(sys.argv[1]), int(sys.argv[2])
rename = os.replace

def replace(*paths):
    global left
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    rename(*paths)

os.replace = replace
store, assistant = Store(home), dental(keep_datasets=1, rows=sys.argv[3])
stage(store, assistant, choose(store, assistant))
freeze(store, assistant, load_staged(store, assistant))
prune(store, assistant, set())
"""


@pytest.mark.slow
@pytest.mark.parametrize("rows", ["per_reply", "per_conversation"])
def test_a_build_that_is_killed_anywhere_is_made_again(corpus: Corpus, rows: str) -> None:
    corpus.fill(110)
    assistant = dental(rows=rows)
    old = freeze(corpus.write(), assistant, choose(corpus.store, assistant))["fingerprint"]
    corpus.fill(15, first=6000)
    corpus.rate("msg_01001", "negative", "Una corrección del equipo para esto.")
    corpus.write()
    for writes in range(60):
        arguments = [sys.executable, "-c", BUILD, str(corpus.store.home), str(writes), rows]
        code = subprocess.run(arguments, check=False).returncode
        folder = latest(corpus.store, "dental")
        assert folder is not None
        assert check_leaks(folder) == []
        assert read_manifest(folder)["fingerprint"] == folder.name
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert writes > 15
    assert folder.name != old
    assert freeze(corpus.store, assistant, choose(corpus.store, assistant))["fingerprint"] == folder.name
    assert not (corpus.store.dataset("dental", old) / "manifest.json").exists()
