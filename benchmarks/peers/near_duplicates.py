"""Near-duplicates by a peer: `python near_duplicates.py PEER TEXTS.json OUT.json`.

Writes cpu_seconds (children included), version, and `pairs` or `clusters` of row numbers. rensa and datasketch get character
5-grams, 128 permutations and threshold 0.7, and each candidate is verified by rapidfuzz at 90, as we do; text-dedup and datatrove
run with their defaults, which have no verification.
"""

from __future__ import annotations

import json
import resource
import struct
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

PERMUTATIONS, THRESHOLD = 128, 0.7


def verified(texts: list[str], candidates: set[tuple[int, int]]) -> list[tuple[int, int]]:
    """The pairs with ratio 90 or more."""
    from rapidfuzz import fuzz

    return [(i, j) for i, j in candidates if fuzz.ratio(texts[i], texts[j], score_cutoff=90)]


def grams(text: str) -> set[str]:
    """Character 5-grams; a shorter text is one."""
    return {text[i : i + 5] for i in range(max(1, len(text) - 4))}


def rensa(texts: list[str]) -> dict[str, list[tuple[int, int]]]:
    """https://github.com/beowolx/rensa"""
    from rensa import RMinHash, RMinHashLSH

    hashes = RMinHash.from_token_sets([list(grams(text)) for text in texts], PERMUTATIONS, 42)
    index = RMinHashLSH(THRESHOLD, PERMUTATIONS, 32)
    index.insert_many(hashes)
    found = index.query_all(hashes)
    return {"pairs": verified(texts, {(i, j) for i, others in enumerate(found) for j in others if i < j})}


def datasketch(texts: list[str]) -> dict[str, list[tuple[int, int]]]:
    """https://github.com/ekzhu/datasketch"""
    from datasketch import MinHash, MinHashLSH

    index = MinHashLSH(threshold=THRESHOLD, num_perm=PERMUTATIONS)
    hashes = MinHash.bulk([[gram.encode() for gram in grams(text)] for text in texts], num_perm=PERMUTATIONS)
    candidates: set[tuple[int, int]] = set()
    for i, one in enumerate(hashes):
        candidates.update((j, i) for j in index.query(one))
        index.insert(i, one)
    return {"pairs": verified(texts, candidates)}


def text_dedup(texts: list[str]) -> dict[str, list[list[int]]]:
    """https://github.com/ChenghaoMou/text-dedup: its MinHash command over a local data set."""
    from datasets import Dataset, load_from_disk

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        Dataset.from_dict({"text": texts, "row": list(range(len(texts)))}).save_to_disk(str(folder / "in"))
        command = [
            "--path",
            str(folder / "in"),
            "--local",
            "--column",
            "text",
            "--output",
            str(folder / "out"),
            "--num_proc",
            "1",
        ]
        flags = ["--cache_dir", str(folder / "cache"), "--min_length", "1", "--debug"]
        done = subprocess.run(
            [sys.executable, "-m", "text_dedup.minhash", *command, *flags],
            check=False,
            cwd=folder,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(done.stderr.strip().splitlines()[-1])
        kept = set(load_from_disk(str(folder / "out"))["row"])
        import pickle

        joined = pickle.loads((folder / "out" / "uf.pkl").read_bytes())
        clusters: dict[int, list[int]] = {}
        for row in range(len(texts)):
            clusters.setdefault(joined.find(row), []).append(row)
    assert len(kept) == len(clusters)
    return {"clusters": [rows for rows in clusters.values() if len(rows) > 1]}


def datatrove(texts: list[str]) -> dict[str, list[list[int]]]:
    """https://github.com/huggingface/datatrove: its four MinHash stages."""
    from datatrove.data import Document
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.base import PipelineStep
    from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupSignature
    from datatrove.pipeline.dedup.minhash import MinhashConfig

    class Texts(PipelineStep):
        def run(self, data: object = None, rank: int = 0, world_size: int = 1):
            for row, text in enumerate(texts):
                yield Document(text=text, id=str(row))

    config = MinhashConfig()
    with tempfile.TemporaryDirectory() as name:
        signatures, buckets, removed = (f"{name}/{part}" for part in ("signatures", "buckets", "removed"))
        stages = (
            (1, [Texts(), MinhashDedupSignature(output_folder=signatures, config=config)]),
            (config.num_buckets, [MinhashDedupBuckets(input_folder=signatures, output_folder=buckets, config=config)]),
            (1, [MinhashDedupCluster(input_folder=buckets, output_folder=removed, config=config, save_cluster_id=True)]),
        )
        for number, (tasks, stage) in enumerate(stages):
            LocalPipelineExecutor(pipeline=stage, tasks=tasks, workers=1, logging_dir=f"{name}/log{number}").run()
        content = b"".join(file.read_bytes() for file in Path(removed).glob("*.clusters"))
    clusters: dict[int, list[int]] = {}
    for row, cluster in struct.iter_unpack("<II", content):
        clusters.setdefault(cluster, []).append(row)
    return {"clusters": list(clusters.values())}


PEERS = {"rensa": rensa, "datasketch": datasketch, "text-dedup": text_dedup, "datatrove": datatrove}


def main(name: str, source: str, target: str) -> None:
    """Runs one peer."""
    texts = json.loads(Path(source).read_text(encoding="utf-8"))
    PEERS[name](texts[:50])  # imports and compiles
    before, children = time.process_time(), resource.getrusage(resource.RUSAGE_CHILDREN)
    found = PEERS[name](texts)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = time.process_time() - before + after.ru_utime + after.ru_stime - children.ru_utime - children.ru_stime
    Path(target).write_text(json.dumps({"cpu_seconds": spent, "version": version(name), **found}), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
