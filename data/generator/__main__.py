"""Command line: `python -m data.generator sample --out data/sample`, `python -m data.generator general --out FILE.parquet`."""

from __future__ import annotations

import argparse
from pathlib import Path

from .general import write_general
from .write import write_sample


def main() -> None:
    """Parse the arguments and write what was asked for."""
    parser = argparse.ArgumentParser(
        prog="python -m data.generator", description="Synthetic Spanish conversations, always the same for the same seed."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    sample = commands.add_parser("sample", help="the committed sample: conversations, messages, feedback, truth")
    sample.add_argument("--out", type=Path, required=True, help="folder to write to")
    sample.add_argument("--seed", type=int, default=20261025)
    general = commands.add_parser("general", help="dialogues of other domains, to train the base model on")
    general.add_argument("--out", type=Path, required=True, help="Parquet file to write")
    general.add_argument("--count", type=int, default=20_000, help="number of dialogues")
    general.add_argument("--seed", type=int, default=11)
    args = parser.parse_args()
    if args.command == "sample":
        print(write_sample(args.out, args.seed))
    else:
        print({"dialogues": write_general(args.out, args.count, args.seed)})


if __name__ == "__main__":
    main()
