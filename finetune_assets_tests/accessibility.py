"""axe-core in a page: FINETUNE_AXE names axe.min.js, else that of `npm i axe-core` in the project's root; skipped without it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from finetune_assets.environment import ROOT

VIEWS = {
    "desktop-light": (1200, "light"),
    "desktop-dark": (1200, "dark"),
    "phone-light": (390, "light"),
    "phone-dark": (390, "dark"),
}
"""Width and colour scheme under which every page is looked at."""


def axe() -> Path:
    """The script. Skips the test where there is none."""
    path = Path(os.environ.get("FINETUNE_AXE") or ROOT / "node_modules" / "axe-core" / "axe.min.js")
    if not path.exists():
        pytest.skip("axe-core is not installed: npm i axe-core, or FINETUNE_AXE")
    return path


def violations(page: Any, script: Path) -> list[str]:
    """What axe finds wrong with the page as it is: rule and first element."""
    page.add_script_tag(path=str(script))
    return page.evaluate("async () => (await axe.run()).violations.map((v) => `${v.id}: ${v.nodes[0].html}`)")
