"""Some weeks of one table of the corpus: several of these tasks build a long history at once, here or on a cluster.

The source's address and its password, and the secret of the pseudonyms, are those of the worker's own environment.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from finetune_assets.assistants import own_contacts, own_regions
from finetune_assets.corpus import presidio
from finetune_assets.corpus.erasure import Erased
from finetune_assets.corpus.examples import build_examples
from finetune_assets.corpus.ingest import ingest_conversations, ingest_feedback
from finetune_assets.corpus.sources import read_source
from finetune_assets.environment import Environment
from finetune_assets.storage import Store
from finetune_assets.worker.progress import Progress

READ = {"conversations": ingest_conversations, "feedback": ingest_feedback}


def run(spec: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Task `weeks`: `table` (conversations, feedback, examples), `weeks`, `home`; of the first two also `sources` (null: the
    environment's), `assistants` (a folder) and `erased` (subjects). Gives the numbers of each week as `counts`."""
    store, weeks, environment = Store(Path(spec["home"])), list(spec["weeks"]), Environment.read()
    progress.update(str(spec["table"]), 0, len(weeks))
    if spec["table"] == "examples":
        counts = build_examples(store, weeks)
    else:
        key = environment.user_key.encode() if environment.user_key else store.key()
        presidio.check()
        source = Erased(frozenset(spec["erased"]), key).leave_out(read_source(spec["sources"] or list(environment.sources)))
        folder = Path(spec["assistants"])
        source.contacts, source.regions = own_contacts(folder), own_regions(folder)
        counts = READ[spec["table"]](store, source, weeks, key)
    progress.update(str(spec["table"]), len(weeks), len(weeks))
    return {"counts": counts}
