"""A frozen data set without one person's rows: rewritten under the fingerprint of what is left; a tombstone stays at the old one.

The order makes it safe to be killed anywhere: the new folder is whole before anything else changes, `latest` moves, the
tombstone is written, and only then the old files go, the manifest first. A second call goes on from there.
"""

from __future__ import annotations

import datetime
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl

from finetune_assets.corpus.erasure import Traces
from finetune_assets.dataset import manifest as manifests
from finetune_assets.dataset.formats import FILES, read_frames, write_files
from finetune_assets.dataset.leaks import examine
from finetune_assets.dataset.manifest import TOMBSTONE, counts, read_tombstone, tally
from finetune_assets.dataset.preferences import label_counts
from finetune_assets.dataset.selection import SYNTHETIC
from finetune_assets.dataset.wording import FILE as WORDINGS
from finetune_assets.storage import Store, point, replacing_folder, write_json, write_parquet

MADE_OF_WORDS = (WORDINGS, "teacher_replies.parquet")
"""Files of an assistant that hold what a language model made of people's words, one row a message."""
_LINEAGES = {spec.lineage for spec in FILES}


def frozen_folders(store: Store) -> Iterator[tuple[str, Path]]:
    """Every assistant and folder of a whole frozen data set, sorted; tombstones are left out."""
    for path in sorted((store.home / "datasets").glob("*/*/manifest.json")):
        folder = path.parent
        if not folder.is_symlink() and not folder.name.startswith(".") and not (folder / TOMBSTONE).exists():
            yield folder.parent.name, folder


def lineages(store: Store) -> list[Path]:
    """Files that say whose rows stand in a data set, staged ones too."""
    found = [path for _, folder in frozen_folders(store) for path in folder.glob("*.parquet")]
    return sorted([*found, *(store.home / "datasets").glob("*/staged/*.parquet")])


def rows_of(folder: Path, traces: Traces) -> int:
    """How many lines of a data set are theirs."""
    files = [path for path in folder.glob("*.parquet") if path.name in _LINEAGES]
    return sum(int(traces.mine(pl.read_parquet(path)).sum()) for path in files)


def names(folder: Path, traces: Traces) -> bool:
    """Whether any Parquet file of a folder holds a row of theirs, or names one (as a twin, as dropped)."""
    frames = (pl.read_parquet(path) for path in folder.glob("*.parquet"))
    return any(not traces.without(frame).equals(frame) for frame in frames)


def rewrite(store: Store, assistant: str, folder: Path, traces: Traces) -> str | None:
    """Takes their rows out of one data set; the fingerprint of what took its place, null where nothing is left to train on."""
    link = store.datasets(assistant) / "latest"
    mark = _write_rest(store, assistant, folder, traces)
    seen = manifests.seen_file(store, assistant, folder.name)
    if mark is not None and seen.exists():
        manifests.write_seen(store, assistant, mark, traces.without(pl.read_parquet(seen))["feedback_id"])
    if mark == folder.name:
        return mark
    if link.is_symlink() and link.readlink().name == folder.name:
        if mark is None:
            link.unlink()
        else:
            point(link, mark)
    seen.unlink(missing_ok=True)
    bury(folder, mark, rows_of(folder, traces))
    return mark


def _write_rest(store: Store, assistant: str, folder: Path, traces: Traces) -> str | None:
    """Writes the data set of the rows that are left, if it is not there yet; its fingerprint."""
    before = manifests.read_manifest(folder)
    frames = _frames(folder, traces)
    if frames["examples"].filter(pl.col("split") == "train").is_empty():
        return None
    mark = manifests.fingerprint(before["settings"], frames)
    target = store.dataset(assistant, mark)
    if mark == folder.name or (target / "manifest.json").exists():
        return mark if mark != folder.name else _unchanged(folder, traces)
    with replacing_folder(target) as draft:
        write_files(draft, {kind: [rows] for kind, rows in frames.items()})
        for path in sorted(folder.glob("*.parquet")):
            if path.name not in _LINEAGES:
                write_parquet(draft / path.name, traces.without(pl.read_parquet(path)))
        write_json(draft / "manifest.json", _manifest(before, mark, frames, draft))
    return mark


def _unchanged(folder: Path, traces: Traces) -> str:
    """The lines are not theirs, but a dropped row or a twin is: the same fingerprint, other side files."""
    for path in sorted(folder.glob("*.parquet")):
        frame = pl.read_parquet(path)
        if not traces.without(frame).equals(frame):
            write_parquet(path, traces.without(frame))
    manifest = manifests.read_manifest(folder)
    write_json(folder / "manifest.json", {**manifest, **_drops(folder, manifest["counts"])})
    return folder.name


def _frames(folder: Path, traces: Traces) -> dict[str, pl.DataFrame]:
    """Kind to the rows that are left. A line of which any target is theirs goes whole: they said what stands in it."""
    left: dict[str, pl.DataFrame] = {}
    for kind, rows in read_frames(folder).items():
        lines = rows.select("split", "line").filter(traces.mine(rows)).unique()
        left[kind] = traces.without(rows.join(lines, on=["split", "line"], how="anti", maintain_order="left"))
    return left


def _manifest(before: manifests.Manifest, mark: str, frames: dict[str, pl.DataFrame], draft: Path) -> manifests.Manifest:
    problems, compared = examine(draft, before["settings"])
    made = counts(frames["examples"])
    return {
        **before,
        "fingerprint": mark,
        "counts": made,
        **_drops(draft, made),
        "pairs": {
            **before["pairs"],
            **{kind: tally(frames[kind]["split"]) for kind in ("preferences", "kto")},
            "kto_labels": label_counts(frames["kto"]),
        },
        "leaks": {**before["leaks"], "found": problems, "compared": compared},
        "parents": [before["fingerprint"]],
        "created_at": _now(),
        "rewritten": "a person's rows were erased",
    }


def _drops(folder: Path, made: dict[str, Any]) -> dict[str, Any]:
    """`made`: the manifest's counts; a synthetic row was never read."""
    dropped = pl.read_parquet(folder / "dropped.parquet")
    read = made["examples"] - made["source"].get(SYNTHETIC, 0) + dropped.height
    return {"read": read, "rejected": tally(dropped["reason"])}


def bury(folder: Path, rewritten_as: str | None, rows: int = 0) -> None:
    """Leaves a tombstone in a data set's folder and nothing else; it says when and what took its place, not whose rows went."""
    if not (folder / TOMBSTONE).exists():
        stone = {"fingerprint": folder.name, "rewritten_as": rewritten_as, "erased_at": _now(), "rows": rows}
        write_json(folder / TOMBSTONE, stone)
    (folder / "manifest.json").unlink(missing_ok=True)
    for path in sorted(folder.iterdir()):
        if path.name != TOMBSTONE:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def finish(store: Store) -> None:
    """Buries what an earlier run gave its tombstone and did not empty."""
    for path in sorted((store.home / "datasets").glob(f"*/*/{TOMBSTONE}")):
        if not path.parent.is_symlink():
            bury(path.parent, None)


def buried(store: Store) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Assistant, fingerprint and tombstone of every data set that was rewritten."""
    for path in sorted((store.home / "datasets").glob(f"*/*/{TOMBSTONE}")):
        if not path.parent.is_symlink():
            yield path.parent.parent.name, path.parent.name, read_tombstone(path.parent) or {}


def drop_staged(store: Store, traces: Traces) -> list[str]:
    """Removes staged choices that hold rows of theirs; their assistants. The asset training_examples makes them again.

    What a language model made of their words goes too.
    """
    found: list[str] = []
    for path in sorted(path for name in MADE_OF_WORDS for path in (store.home / "datasets").glob(f"*/{name}")):
        frame = pl.read_parquet(path)
        if (left := traces.without(frame)).height < frame.height:
            write_parquet(path, left)
    for folder in sorted((store.home / "datasets").glob("*/staged")):
        if names(folder, traces):
            (folder / "notes.json").unlink(missing_ok=True)  # without it nothing reads the rest
            shutil.rmtree(folder)
            found.append(folder.parent.name)
    return found


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
