"""Checkpoints: whole or not used."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune_assets.worker import checkpoints


def make(folder: Path, step: int) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir()
    (path / "model.safetensors").write_bytes(bytes(1000))
    (path / "totals.json").write_text("{}")
    checkpoints.seal(path)
    return path


@pytest.mark.parametrize("harm", ["truncated", "changed", "missing", "unsealed"])
def test_a_broken_newest_checkpoint_is_passed_over(tmp_path: Path, harm: str):
    good, bad = make(tmp_path, 9), make(tmp_path, 10)
    assert checkpoints.newest_whole(tmp_path) == (bad, [])
    weights = bad / "model.safetensors"
    if harm == "truncated":
        weights.write_bytes(bytes(999))
    elif harm == "changed":
        weights.write_bytes(b"\1" * 1000)
    elif harm == "missing":
        weights.unlink()
    else:
        (bad / checkpoints.WHOLE).unlink()
    assert checkpoints.newest_whole(tmp_path) == (good, [bad])


def test_a_change_far_into_a_large_file_is_seen(tmp_path: Path):
    path = make(tmp_path, 9)
    with (path / "optimizer.pt").open("wb") as file:
        file.truncate(66 * 2**20)
    checkpoints.seal(path)
    assert checkpoints.is_whole(path)
    with (path / "optimizer.pt").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\1")
    assert not checkpoints.is_whole(path)


def test_pruning_keeps_the_newest_by_number_and_removes_leftovers(tmp_path: Path):
    for step in (8, 9, 10, 100):
        make(tmp_path, step)
    (tmp_path / ".tmp-checkpoint-101-abcd").mkdir()
    checkpoints.prune(tmp_path, 2)
    assert [path.name for path in checkpoints.listed(tmp_path)] == ["checkpoint-10", "checkpoint-100"]
    assert len(list(tmp_path.iterdir())) == 2
