"""Old data sets go by a setting, never one that is in use, and a kill at any point leaves whole folders or drafts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from finetune_assets.dataset import choose, freeze, latest, prune
from finetune_assets.registry import Ledger
from finetune_assets.storage import Store, sweep
from finetune_assets_tests.dataset.small_corpus import Corpus, dental


def frozen(corpus: Corpus, count: int) -> list[str]:
    """Data sets of one assistant, each with one more example; their fingerprints, oldest first."""
    corpus.fill(110)
    made: list[str] = []
    for number in range(count):
        corpus.example(7000 + number)
        assistant = dental()
        made.append(freeze(corpus.write(), assistant, choose(corpus.store, assistant))["fingerprint"])
        manifest = corpus.store.dataset("dental", made[-1]) / "manifest.json"
        text = manifest.read_text().replace('"created_at": "2', f'"created_at": "{number}2')  # years apart, in their order
        manifest.write_text(text)
    return made


def there(store: Store) -> set[str]:
    return {path.parent.name for path in store.datasets("dental").glob("*/manifest.json")} - {"latest"}


def test_the_newest_stay_and_so_does_what_is_used(corpus: Corpus) -> None:
    made = frozen(corpus, 5)
    assert prune(corpus.store, dental(), set()) == []
    assert there(corpus.store) == set(made)
    assert prune(corpus.store, dental(keep_datasets=2), {made[1]}) == [made[0], made[2]]
    assert there(corpus.store) == {made[1], made[3], made[4]}
    assert prune(corpus.store, dental(keep_datasets=1), set()) == [made[1], made[3]]
    folder = latest(corpus.store, "dental")
    assert folder is not None
    assert folder.name == made[4]
    seen = {path.stem for path in (corpus.store.datasets("dental") / "feedback_seen").iterdir()}
    assert seen == {made[4]}
    again = freeze(corpus.store, dental(), choose(corpus.store, dental()))
    assert again["fingerprint"] == made[4]


def test_versions_and_open_jobs_use_their_data_sets(corpus: Corpus, tmp_path: Path) -> None:
    made = frozen(corpus, 4)
    ledger = Ledger(f"sqlite:///{tmp_path / 'ledger.db'}")
    try:
        jobs = []
        for fingerprint in made[:3]:
            manifest = {"fingerprint": fingerprint, "counts": {}}
            dataset = ledger.record_dataset("dental", None, corpus.store.dataset("dental", fingerprint), manifest)
            job = {
                **{"assistant": "dental", "tenant_id": None, "dataset_id": dataset, "dataset_fingerprint": fingerprint},
                **{"base_model": "b", "provider": "local", "spec_hash": fingerprint, "hyperparameters": {}, "plan": {}},
            }
            jobs.append(ledger.open_job(job))
        ledger.set_job(jobs[0].id, "succeeded")
        ledger.mint_version(ledger.job(jobs[0].id), "abcdef0123456789", tmp_path)
        ledger.release_done(jobs[0].id)
        ledger.set_job(jobs[1].id, "failed")
        assert ledger.datasets_in_use("dental") == {made[0], made[2]}
        assert prune(corpus.store, dental(keep_datasets=1), ledger.datasets_in_use("dental")) == [made[1]]
    finally:
        ledger.close()


KILLED = """
import shutil, sys
from pathlib import Path
from finetune_assets.dataset import prune
from finetune_assets.storage import Store
from finetune_assets_tests.dataset.small_corpus import dental
import os, signal

def die(path):
    (Path(path) / "train.jsonl").unlink()
    os.kill(os.getpid(), signal.SIGKILL)

shutil.rmtree = die
prune(Store(Path(sys.argv[1])), dental(keep_datasets=1), set())
"""


def test_a_kill_while_files_go_leaves_no_broken_data_set(corpus: Corpus) -> None:
    made = frozen(corpus, 3)
    killed = subprocess.run([sys.executable, "-c", KILLED, str(corpus.store.home)], check=False, env=os.environ)
    assert killed.returncode == -signal.SIGKILL
    assert there(corpus.store) >= {made[1], made[2]}
    whole = [path for path in corpus.store.datasets("dental").glob("*/manifest.json") if not path.parent.name.startswith(".tmp")]
    assert all((path.parent / "train.jsonl").exists() for path in whole)
    sweep(corpus.store.home, recursive=True)
    assert prune(corpus.store, dental(keep_datasets=1), set()) == [made[1]]
    assert there(corpus.store) == {made[2]}


@pytest.mark.parametrize("kept", [0, -1])
def test_a_number_below_one_is_refused(kept: int) -> None:
    with pytest.raises(ValueError, match="keep_datasets"):
        dental(keep_datasets=kept)
