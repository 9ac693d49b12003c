"""What became of everything that was planted in an export: broken rows, duplicates, wrong replies, corrections.

    python -m benchmarks.truth [FOLDER …]     default: the sample, and ../shared/data/sgd where it is there

FOLDER is an export with `truth.json` (`bad_rows`, `exact_duplicates`, `near_duplicates`, `bad_replies`, `corrected`). One
assistant with default settings is built for each vertical. `benchmarks.privacy` does the same for personal data.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import polars as pl
from rapidfuzz.fuzz import ratio

from benchmarks.exports import EXPORTS, Truth, corpus_of
from finetune_assets.assistants import Assistant
from finetune_assets.corpus.near_duplicates import normalise
from finetune_assets.dataset import choose
from finetune_assets.storage import Store


@dataclass(frozen=True)
class Kind:
    """A kind of planted row: how many there are, and of how many the right thing became."""

    what: str
    right: int
    planted: int

    @property
    def share(self) -> float:
        """0..1."""
        return self.right / max(self.planted, 1)


def kinds(folder: Path) -> list[Kind]:
    """What became of the rows planted in an export."""
    with tempfile.TemporaryDirectory() as home:
        store = corpus_of(folder, Path(home))
        files = sorted(store.home.glob("corpus/examples/week=*/part.parquet"))
        verticals = pl.scan_parquet(files, hive_partitioning=False).select(pl.col("vertical").unique().sort()).collect()
        settings = [
            {"name": "truth", "select": {"vertical": vertical}, "augment": {"share": 0}} for vertical in verticals["vertical"]
        ]
        return compared(folder, store, pl.concat([choose(store, Assistant.model_validate(one)).kept for one in settings]))


def compared(folder: Path, store: Store, kept: pl.DataFrame) -> list[Kind]:
    """The same where corpus and chosen rows are there already."""
    truth: Truth = json.loads((folder / "truth.json").read_text(encoding="utf-8"))
    corpus = store.home / "corpus"
    rejected = pl.read_parquet(corpus / "rejected/**/*.parquet", columns=["table", "id"], hive_partitioning=False)
    said = pl.read_parquet(corpus / "examples/**/*.parquet", columns=["message_id"], hive_partitioning=False)["message_id"]
    kept = kept.filter(pl.col("source") != "synthetic")
    set_aside = set(rejected.iter_rows())
    found = [Kind(_SET_ASIDE, sum((row["table"], row["id"]) in set_aside for row in truth["bad_rows"]), len(truth["bad_rows"]))]
    for name in ("exact_duplicates", "near_duplicates"):
        pairs = truth[name]
        found.append(Kind(f"{name.replace('_', ' ')} that give no example twice", len(pairs) - _twice(kept, pairs), len(pairs)))
    corrections = kept.filter(pl.col("source") == "corrected")
    corrected = {*corrections["message_id"], *corrections["replaced"].explode().drop_nulls()}
    targets, bad = set(kept["message_id"]) - corrected, set(truth["bad_replies"])
    found.append(Kind("wrong replies that are no target", len(bad - targets), len(bad)))
    answered = set(truth["corrected"]) & set(said.filter(said.is_in(truth["corrected"])))
    return [*found, Kind("corrections that are the reply, or whose twin is", len(answered & corrected), len(answered))]


_SET_ASIDE = "broken rows set aside with a reason"


def _twice(kept: pl.DataFrame, pairs: list[list[str]]) -> int:
    """Pairs of conversations of which two examples stay that are near-duplicates (rapidfuzz ratio of 90 and more)."""
    concerned = pl.col("conversation_id").is_in([conversation for pair in pairs for conversation in pair])
    kept = kept.filter(concerned)
    texts = kept.select("conversation_id", text=normalise(kept["user_text"]) + "\n" + normalise(kept["reply"]))
    by_conversation = {str(key[0]): group["text"].to_list() for key, group in texts.group_by("conversation_id")}
    return sum(
        any(ratio(a, b) >= 90 for a in by_conversation.get(one, []) for b in by_conversation.get(other, []))
        for one, other in pairs
    )


def main() -> None:
    """Prints the figures of each export."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path)
    folders = parser.parse_args().folders or [folder for folder in EXPORTS if (folder / "truth.json").exists()]
    for folder in folders:
        print(f"{folder.resolve().name}:")
        for kind in kinds(folder):
            print(f"  {kind.share:7.2%} of {kind.planted:>5}  {kind.what}")


if __name__ == "__main__":
    main()
