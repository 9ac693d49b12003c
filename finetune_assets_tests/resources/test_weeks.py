"""Weeks of the corpus in several processes at once: the same files as from one, and an error that is told."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_assets.assets.corpus import clean_examples
from finetune_assets.corpus.parallel import Reading, shared_out
from finetune_assets_tests.corpus.exports import made
from finetune_assets_tests.resources.weeks import WEEKS, build, source

pytestmark = pytest.mark.filterwarnings("ignore:AssetExecutionContext.:DeprecationWarning")  # inside Dagster


@given(st.integers(0, 60), st.integers(1, 9))
def test_every_week_is_somebodys(number: int, workers: int) -> None:
    weeks = [f"{week:03d}" for week in range(number)]
    shares = shared_out(weeks[::-1], workers)
    assert [week for share in shares for week in share] == weeks
    assert len(shares) == min(number, workers)
    sizes = [len(share) for share in shares] or [0]
    assert max(sizes) - min(sizes) <= 1


def test_a_password_is_left_to_the_workers_environment(tmp_path: Path) -> None:
    for url in ("postgresql://reader:secret@db/chat", "postgresql://db/chat?user=reader&password=secret"):
        assert Reading.of(["/data", url], tmp_path, frozenset()).sources is None
    files = ["/data", "sqlite:////data/chat@2026.db"]
    assert Reading.of(files, tmp_path, frozenset()).sources == files


def test_two_workers_write_what_one_process_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = source(tmp_path / "source")
    monkeypatch.setenv("FINETUNE_USER_KEY", "one key")
    alone, _ = build(tmp_path / "alone", folder)
    monkeypatch.setenv("FINETUNE_WEEK_WORKERS", "2")
    together, log = build(tmp_path / "together", folder)
    assert alone.success
    assert together.success, log
    files = {name: text for name, text in made(tmp_path / "alone").items() if name.startswith("corpus/")}
    assert len(files) >= WEEKS * 3 * 2
    assert {name: text for name, text in made(tmp_path / "together").items() if name.startswith("corpus/")} == files
    assert sum("conversations 0/" in line for line in log) == 2  # both told how far they were
    assert not any("persona1@" in text for text in files.values())


def test_a_worker_that_fails_ends_the_run_with_its_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = source(tmp_path / "source")
    home = tmp_path / "home"
    assert build(home, folder)[0].success
    monkeypatch.setenv("FINETUNE_WEEK_WORKERS", "2")
    weeks = sorted((home / "corpus" / "conversations").iterdir())
    (weeks[0] / "part.parquet").unlink()
    done, log = build(home, folder, [clean_examples])
    assert not done.success
    errors = [str(event.step_failure_data.error) for event in done.get_step_failure_events()]
    assert "LaunchError" in errors[0], log
    assert f"{weeks[0].name.removeprefix('week=')} has no finished conversations" in errors[0]
    assert not list((home / "corpus").glob(".tmp-*"))
