"""Made files are whole or absent, whatever happens in between."""

import multiprocessing
from pathlib import Path

import pytest

from finetune_assets.environment import Environment
from finetune_assets.errors import SettingsError
from finetune_assets.storage import Store, point, read_json, replacing, replacing_folder, sweep, write_json


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"old": 1})

    def fail() -> None:
        with replacing(tmp_path / "a.json") as draft:
            draft.write_text("half")
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError):
        fail()
    assert read_json(tmp_path / "a.json") == {"old": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_folder_replaces_another_whole(tmp_path: Path) -> None:
    for text in ("one", "two"):
        with replacing_folder(tmp_path / "f") as draft:
            (draft / "x").write_text(text)
    assert (tmp_path / "f" / "x").read_text() == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_drafts_of_killed_processes_are_swept(tmp_path: Path) -> None:
    (tmp_path / ".tmp-model-1").mkdir()
    (tmp_path / ".tmp-model-1" / "half").write_text("x")
    (tmp_path / ".tmp-a.json-2").write_text("x")
    (tmp_path / "whole.json").write_text("x")
    sweep(tmp_path, seconds=60)
    assert len(list(tmp_path.iterdir())) == 3
    sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["whole.json"]


def test_latest_moves_in_one_step(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        point(tmp_path / "latest", name)
    assert (tmp_path / "latest").resolve().name == "b"


def _key(home: Path) -> bytes:
    return Store(home).key()


def test_many_processes_make_one_key(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        keys = set(pool.map(_key, [tmp_path / "home"] * 8))
    assert len(keys) == 1
    assert (tmp_path / "home" / "key").stat().st_mode & 0o777 == 0o600


def test_environment_defaults_and_errors(tmp_path: Path) -> None:
    environment = Environment.read({"FINETUNE_HOME": str(tmp_path), "FINETUNE_SOURCE": "a, sqlite:///b"})
    assert environment.database_url == f"sqlite:///{tmp_path}/ledger.db"
    assert [source.endswith("/a") for source in environment.sources] == [True, False]
    with pytest.raises(SettingsError, match="is a Tuesday"):
        Environment.read({"FINETUNE_FIRST_WEEK": "2020-01-07"})
    with pytest.raises(SettingsError, match="not a date"):
        Environment.read({"FINETUNE_FIRST_WEEK": "soon"})
    with pytest.raises(SettingsError, match="FINETUNE_LAUNCHER"):
        Environment.read({"FINETUNE_LAUNCHER": "slurm"})
