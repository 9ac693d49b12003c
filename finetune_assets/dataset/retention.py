"""Old frozen data sets, removed by a setting: `keep_datasets` newest stay, and each one that something still uses."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Collection

from finetune_assets.assistants.settings import Assistant
from finetune_assets.dataset.manifest import latest, read_manifest, seen_file
from finetune_assets.storage import TEMPORARY, Store


def prune(store: Store, assistant: Assistant, in_use: Collection[str]) -> list[str]:
    """Removes the assistant's oldest frozen data sets beyond `keep_datasets`; the fingerprints removed, oldest first.

    `in_use` are fingerprints that stay and do not count: those of versions, of open jobs and, through versions, of rollouts. The
    latest one stays too. A folder leaves its name in one step before its files go: what a killed process leaves is a draft.
    """
    if assistant.keep_datasets is None:
        return []
    newest = latest(store, assistant.name)
    folders = [path.parent for path in store.datasets(assistant.name).glob("*/manifest.json")]
    folders = [folder for folder in folders if not folder.is_symlink() and not folder.name.startswith(TEMPORARY)]
    made = sorted((str(read_manifest(folder)["created_at"]), folder.name, folder) for folder in folders)
    current = newest.name if newest else None
    free = [(name, folder) for _, name, folder in made if name not in in_use and name != current]
    room = assistant.keep_datasets - (current is not None)
    removed: list[str] = []
    for name, folder in free[: max(len(free) - room, 0)]:
        gone = folder.with_name(f"{TEMPORARY}old-{name}-{secrets.token_hex(4)}")
        os.replace(folder, gone)
        seen_file(store, assistant.name, name).unlink(missing_ok=True)
        shutil.rmtree(gone)
        removed.append(name)
    return removed
