"""Raw export to frozen JSONL: the sample, and 10,000 conversations beside two pipelines of pandas, re and datasketch.

The first peer is what people write in a day (`peers/pipeline.py`). The second does the same work where it decides what may be
trained on: phone numbers by the phonenumbers library, check digits, introduced names, the same patterns (`--same-work`).
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from benchmarks.exports import MADE, corpus_of, make
from benchmarks.measure import ROOT, SAMPLE, Row, cpu, peak_mb, peer
from benchmarks.privacy import PATTERNS
from finetune_assets.assistants import Assistant, load_assistant
from finetune_assets.corpus.personal_data import DEFAULT_REGIONS
from finetune_assets.dataset import choose, freeze

CONVERSATIONS, WEEKS = 10_000, 12
EVERYONE = Assistant.model_validate({"name": "everyone", "select": {"vertical": "dental"}, "system_prompt": "Eres amable."})
"""Default settings, over every conversation of an export of `exports.make`."""
PEERS = (
    ("pandas + datasketch", (), "no check digits, names, reasons, lineage, preferences or proof of no leak"),
    ("the same, our patterns, phonenumbers", ("--same-work",), "no reasons, lineage, preferences or proof of no leak"),
)


def rows(rounds: int) -> list[Row]:
    """The shipped `dental` assistant; then one with default settings over every conversation."""
    dental = load_assistant(ROOT / "finetune_assets" / "assistants", "dental")
    made = [Row("sample of 2,010 conversations: export to frozen JSONL", cpu(lambda: build(SAMPLE, dental), rounds))]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        numbers = make(folder, CONVERSATIONS, WEEKS)
        kept: list[int] = []
        mine = cpu(lambda: kept.append(build(folder, EVERYONE)), rounds)
        what = f"{CONVERSATIONS:,} conversations, {numbers['messages']:,} messages: export to JSONL"
        (folder / "patterns.json").write_text(json.dumps([[p.pattern, p.flags] for p in PATTERNS]), encoding="utf-8")
        (folder / "regions.json").write_text(json.dumps(DEFAULT_REGIONS), encoding="utf-8")
        for beside, arguments, less in PEERS:
            theirs = peer("pipeline", *arguments, str(folder))
            if isinstance(theirs, str):
                made.append(Row(what, mine, beside, peak_mb=peak_mb(), bar="≥ 20 times", note=f"{MADE}; {theirs}"))
                continue
            note = f"{MADE}; {kept[0]:,} rows, theirs {theirs['rows']:,}; they have {less}"
            seconds = theirs["cpu_seconds"]
            made.append(
                Row(
                    what,
                    mine,
                    f"{beside} {theirs['version']}",
                    seconds,
                    peak_mb=peak_mb(),
                    bar="≥ 20 times",
                    met=seconds >= 20 * mine,
                    note=note,
                )
            )
    return made


def build(source: Path, assistant: Assistant) -> int:
    """Every step in a fresh store; the rows that were frozen."""
    with tempfile.TemporaryDirectory() as folder:
        store = corpus_of(source, Path(folder))
        choice = choose(store, assistant)
        freeze(store, assistant, choice)
        return choice.kept.height
