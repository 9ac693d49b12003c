"""The command line, stopped for ever at one function, so that a test can kill it exactly there.

    python -m finetune_assets_tests.matrix.stopping MODULE:NAME before|after MARK finetune's arguments …

MARK is a file that is written when the function is reached (`before`), or has done its work and nobody has heard of it (`after`).
"""

from __future__ import annotations

import importlib
import sys
import time
from pathlib import Path
from typing import Any


def stop_at(where: str, when: str, mark: Path) -> None:
    """Replaces the function where its callers look for it."""
    module, _, name = where.partition(":")
    holder: Any = importlib.import_module(module)
    *path, last = name.split(".")
    for part in path:
        holder = getattr(holder, part)
    real = getattr(holder, last)

    def stopped(*args: Any, **more: Any) -> Any:
        if when == "after":
            real(*args, **more)
        mark.write_text(where, encoding="utf-8")
        time.sleep(600)

    setattr(holder, last, stopped)


if __name__ == "__main__":
    stop_at(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
    from finetune_assets.cli import main

    sys.argv = ["finetune", *sys.argv[4:]]
    main()
