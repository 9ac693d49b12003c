"""What scrubbing finds of the personal data that was planted, and what it replaces needlessly.

    python -m benchmarks.privacy [FOLDER …] [--show]     default: the sample, and ../shared/data/sgd where it is there

FOLDER is an export with `truth.json` (`pii`: message_id, kind, value; `own_contacts`: tenant -> values that stay). Beside them
`privacy.yaml`: single texts in many forms. A needless replacement is one in a message in which nothing was planted. In exports
without `own_contacts` a business's own phone number is a find: such messages are left out and counted. `--show` lists all.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl
import yaml

from benchmarks.exports import EXPORTS
from benchmarks.measure import ROOT, Row, cpu
from finetune_assets.corpus import names, personal_data, phones, recognisers
from finetune_assets.corpus.personal_data import find, may_hold, needs_look, scrub_conversation

CASES = ROOT / "benchmarks" / "privacy.yaml"
BUSINESS = r"\(?\d{3}\)?[- ]\d{3}[- ]\d{4}"
PLACED = re.compile(r"\[[A-Z_]+?(?:_\d+)?\]")


@dataclass
class Figures:
    """Planted values by kind, those that are gone, and messages that were changed without need."""

    name: str
    planted: Counter[str] = field(default_factory=Counter[str])
    gone: Counter[str] = field(default_factory=Counter[str])
    clean: int = 0
    needless: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    replaced: Counter[str] = field(default_factory=Counter[str])
    right: Counter[str] = field(default_factory=Counter[str])
    missed: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    left_out: int = 0

    @property
    def recall(self) -> float:
        """Share of the planted values that are gone."""
        return self.gone.total() / max(self.planted.total(), 1)

    @property
    def needless_share(self) -> float:
        """Share of clean messages that were changed."""
        return len(self.needless) / max(self.clean, 1)

    def lines(self) -> list[str]:
        """For a reader."""
        head = (
            f"{self.name}: recall {self.recall:.2%} of {self.planted.total()} planted, needless {self.needless_share:.3%} of "
            f"{self.clean:,} clean texts" + (f" ({self.left_out} with a business's own number left out)" if self.left_out else "")
        )
        kinds = [
            f"  {kind:<12} recall {self.gone[kind] / self.planted[kind]:7.2%} of {self.planted[kind]:>5}"
            + (
                f"   precision {self.right[kind] / self.replaced[kind]:7.2%} of {self.replaced[kind]:>5}"
                if self.replaced[kind]
                else ""
            )
            for kind in sorted(self.planted)
        ]
        return [head, *kinds]


def export_figures(folder: Path) -> Figures:
    """Scrubs every conversation of an export."""
    truth: dict[str, Any] = json.loads((folder / "truth.json").read_text(encoding="utf-8"))
    figures = Figures(folder.resolve().name)
    planted: dict[str, list[tuple[str, str]]] = {}
    for one in truth["pii"]:
        planted.setdefault(one["message_id"], []).append((one["kind"], one["value"]))
    own: dict[str, list[str]] = truth.get("own_contacts", {})
    tenants = dict(pl.read_parquet(folder / "conversations.parquet").select("conversation_id", "tenant_id").iter_rows())
    messages = pl.read_parquet(folder / "messages.parquet").drop_nulls("content").sort("created_at", "message_id")
    talks = (
        messages.with_columns(look=needs_look(messages["content"])).group_by("conversation_id", maintain_order=True).agg(pl.all())
    )
    for talk, ids, texts, look in talks.select("conversation_id", "message_id", "content", "look").iter_rows():
        allow = frozenset(own.get(tenants.get(talk, ""), ()))
        after = scrub_conversation(texts, allow=allow)[0] if any(look) else texts
        for message, old, new in zip(ids, texts, after, strict=True):
            _message(figures, planted.get(message, []), old, new, own_known=bool(own))
    return figures


def _message(figures: Figures, planted: list[tuple[str, str]], old: str, new: str, *, own_known: bool) -> None:
    for kind, value in planted:
        figures.planted[kind] += 1
        if value in new:
            figures.missed.append((kind, old))
        else:
            figures.gone[kind] += 1
    kinds = Counter(_kind(mark) for mark in PLACED.findall(new)) - Counter(_kind(mark) for mark in PLACED.findall(old))
    if planted:
        values = Counter(kind for kind, _ in planted)
        for kind, n in kinds.items():
            figures.replaced[kind] += n
            figures.right[kind] += min(n, values[kind])
    elif not own_known and re.search(BUSINESS, old):
        figures.left_out += 1
    else:
        figures.clean += 1
        figures.replaced.update(kinds)
        if old != new:
            figures.needless.append((", ".join(kinds), old))


def _kind(mark: str) -> str:
    return re.sub(r"_\d+$", "", mark.strip("[]")).lower()


def case_figures(path: Path = CASES) -> Figures:
    """The single texts."""
    cases: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    figures = Figures(path.name)
    for kind, texts in cases["found"].items():
        for text in texts:
            before, value, after = _parted(text)
            plain = before + value + after
            found = [f for f in find(plain) if f.start <= len(before) + len(value) - len(value.lstrip())]
            whole = any(f.end >= len((before + value).rstrip()) for f in found)
            seen = needs_look(pl.Series([plain]))[0]
            figures.planted[kind] += 1
            figures.replaced.update(f.kind for f in find(plain))
            figures.right[kind] += any(f.kind == kind for f in found)
            if whole and seen:
                figures.gone[kind] += 1
            else:
                figures.missed.append((kind, text))
    for text in cases["clean"]:
        figures.clean += 1
        found = find(str(text))
        figures.replaced.update(f.kind for f in found)
        if found:
            figures.needless.append((found[0].kind, str(text)))
    return figures


def _parted(text: str) -> tuple[str, str, str]:
    before, _, rest = text.partition("[[")
    value, _, after = rest.rpartition("]]")
    return before, value, after


def rows(rounds: int) -> list[Row]:
    """Finding values, beside `re.sub` of the same patterns on every text, as such scripts are written; it checks no digits."""
    made: list[Row] = []
    for folder in (folder for folder in EXPORTS if (folder / "messages.parquet").exists()):
        texts = pl.read_parquet(folder / "messages.parquet").drop_nulls("content")["content"]
        plain = texts.to_list()
        find("llámame al +34 612 345 678")

        def ours(texts: pl.Series = texts) -> int:
            personal_data.found_in.cache_clear()  # what an earlier round saw would make this one look faster than a first run
            phones._valid_phone.cache_clear()
            return sum(len(find(text)) for text in texts.filter(may_hold(texts)))

        def theirs(plain: list[str] = plain) -> int:
            changed = 0
            for text in plain:
                new = text
                for pattern in PATTERNS:
                    new = pattern.sub("[X]", new)
                changed += new != text
            return changed

        what = f"personal data, {len(plain):,} messages of {folder.resolve().name}, {ours():,} found"
        taken, peer = cpu(ours, rounds), cpu(theirs, rounds)
        made.append(Row(what, taken, "re.sub, same patterns", peer, bar="≥ 10 times", met=peer >= 10 * taken))
    return made


PATTERNS: list[re.Pattern[str]] = [
    *(
        recognisers._LINK_SECRET,
        recognisers._PEM,
        recognisers._KEYS,
        recognisers._BEARER,
        recognisers._WORDED,
        recognisers._BESIDE,
    ),
    *(recognisers._EMAIL, recognisers._IBAN, recognisers._CARD, recognisers._ES_ID, recognisers._CURP, recognisers._RUT),
    *(recognisers._CPF, recognisers._CNPJ, recognisers._RFC, recognisers._WORDED_ID, recognisers._IPV4, recognisers._IPV6),
    *(phones._TIMES, phones._PHONE),
    *(re.compile(words.pattern, re.IGNORECASE) for words in (names._INTRO, names._CALLER)),
]


def all_figures(folders: list[Path] | None = None) -> list[Figures]:
    """Of each export that is there, and of the single texts."""
    there = [folder for folder in folders or EXPORTS if (folder / "truth.json").exists()]
    return [*(export_figures(folder) for folder in there), case_figures()]


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--show", action="store_true", help="list what was missed and what was replaced needlessly")
    given = parser.parse_args()
    for figures in all_figures(given.folders):
        print("\n".join(figures.lines()))
        if given.show:
            print("\n".join(f"    missed   {kind}: {text}" for kind, text in figures.missed))
            print("\n".join(f"    needless {kind}: {text}" for kind, text in figures.needless))


if __name__ == "__main__":
    main()
