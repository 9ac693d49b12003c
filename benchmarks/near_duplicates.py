"""Near-duplicates at ratio ≥ 0.9: recall against brute force, speed and memory at two sizes, a new week, templates, and peers.

Brute force is `rapidfuzz.process.cdist`. Memory is that of a process that loads the texts from a file and does nothing else.
"""

from __future__ import annotations

import json
import multiprocessing
import random
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from rapidfuzz import fuzz, process

from benchmarks.measure import Row, cpu, peak_mb, peer
from benchmarks.texts import texts
from finetune_assets.corpus.near_duplicates import drop_near_duplicates, find_pairs, pairs_between, signatures

Pairs = set[tuple[int, int]]
SIZES = ((92_000, 150_000, None), (919_000, 75_000, 1_200))
PEERS = ("rensa", "datasketch", "text-dedup", "datatrove")


def rows(rounds: int) -> list[Row]:
    """All of them."""
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "texts.json"
        made.write_text(json.dumps(texts(20_000)), encoding="utf-8")
        found = [*_recall(made, rounds), _in_child(_templates)]
        for number, bar, memory in SIZES:
            made.write_text(json.dumps(_in_child(texts, number)), encoding="utf-8")
            found.append(_in_child(_speed, made, rounds, (bar, memory)))
        found.append(_in_child(_new_week, made, rounds))
    return found


def _in_child(work: Callable[..., Any], *arguments: object) -> Any:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as child:
        return child.submit(work, *arguments).result()


def _load(path: Path) -> list[str]:
    """The texts of a file; compiles the kernels."""
    loaded: list[str] = json.loads(path.read_text(encoding="utf-8"))
    drop_near_duplicates(loaded[:200], np.arange(200))
    return loaded


def _exact(compared: list[str]) -> Pairs:
    pairs: Pairs = set()
    for start in range(0, len(compared), 1_000):
        block = compared[start : start + 1_000]
        scores = process.cdist(block, compared[start:], scorer=fuzz.ratio, score_cutoff=90, dtype=np.uint8, workers=1)
        left, right = np.nonzero(scores)
        pairs.update((a + start, b + start) for a, b in zip(left.tolist(), right.tolist(), strict=True) if a < b)
    return pairs


def _recall(path: Path, rounds: int) -> list[Row]:
    compared = _load(path)
    found: Pairs = set()

    def ours() -> None:
        pairs = find_pairs(compared)
        found.update(zip(pairs.left.tolist(), pairs.right.tolist(), strict=True))

    mine = cpu(ours, rounds)
    start = time.process_time()
    exact = _exact(compared)
    brute = time.process_time() - start
    what = f"pairs among {len(compared):,} texts"
    recall, false = len(found & exact) / len(exact), len(found - exact)
    short = {pair for pair in exact if len(compared[pair[0]]) < 40}
    note = f"recall {recall:.4f} of {len(exact):,}, {false} false; under 40 characters {len(found & short)} of {len(short)}"
    met = recall >= 0.995 and not false
    made = [Row(what, mine, "rapidfuzz, all against all", brute, bar="recall ≥ 0.995, precision 1", met=met, note=note)]
    for name in PEERS:
        theirs = peer("near_duplicates", name, str(path))
        if isinstance(theirs, str):
            made.append(Row(what, mine, name, note=theirs))
        else:
            beside = f"{name} {theirs['version']}"
            made.append(Row(what, mine, beside, theirs["cpu_seconds"], note=_quality(theirs, exact)))
    return made


def _quality(theirs: dict[str, list[list[int]]], exact: Pairs) -> str:
    """Recall and precision of a peer's pairs; a cluster stands for all pairs within it."""
    clusters = theirs.get("clusters", [])
    pairs = {(min(a, b), max(a, b)) for a, b in theirs.get("pairs", [])}
    pairs |= {(a, b) for rows in clusters for a in rows for b in rows if a < b}
    hits = len(pairs & exact)
    return f"recall {hits / len(exact):.3f}, precision {hits / max(1, len(pairs)):.3f}"


def _speed(path: Path, rounds: int, bars: tuple[int, int | None]) -> Row:
    compared, (bar, memory) = _load(path), bars
    rank = np.arange(len(compared), dtype=np.int64)
    kept: list[int] = []
    mine = cpu(lambda: kept.append(int((drop_near_duplicates(compared, rank) == -1).sum())), rounds)
    speed, peak = len(compared) / mine, peak_mb()
    said = f"≥ {bar:,} texts per CPU-second" + (f" within {memory:,} MB" if memory else "")
    met = speed >= bar and (memory is None or peak <= memory)
    note = f"{speed:,.0f} texts per CPU-second, {kept[0]:,} stay"
    return Row(f"which of {len(compared):,} texts stay", mine, peak_mb=peak, bar=said, met=met, note=note)


def _new_week(path: Path, rounds: int) -> Row:
    compared = _load(path)
    stored, week = compared[:750_000], compared[750_000:770_000]
    start = time.process_time()
    kept = signatures(stored)
    signed = time.process_time() - start
    sizes = [array.nbytes for array in (kept.keys, kept.histograms, kept.lengths, kept.starts)]
    pairs: list[int] = []
    mine = cpu(lambda: pairs.append(len(pairs_between(kept, stored, signatures(week), week))), rounds)
    note = f"{pairs[0]:,} pairs; {sum(sizes) / len(stored):.0f} bytes a stored text; signing all again takes {signed:.2f} s"
    what = "a week of 20,000 texts against 750,000 with signatures"
    return Row(what, mine, peak_mb=peak_mb(), bar="≤ 1.5 CPU-seconds", met=mine <= 1.5, note=note)


def _templates() -> Row:
    draw = random.Random(1)
    templates = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz ", k=160)) for _ in range(50)]
    made = dict.fromkeys(f"{t[:60]}{draw.randrange(10**9):09d}{t[60:]}" for t in templates for _ in range(2_000))
    compared = list(made)
    stay: list[int] = []
    mine = cpu(lambda: stay.append(int((drop_near_duplicates(compared, np.arange(len(compared))) == -1).sum())), 1)
    note = f"{stay[0]} stay of 100 million pairs"
    return Row("100,000 texts out of 50 templates", mine, peak_mb=peak_mb(), bar="50 stay", met=stay[0] == 50, note=note)
