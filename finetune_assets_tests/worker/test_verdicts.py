"""Planted cases on the sample and on an English export, with the shipped base model: the verdict is right for each. Trains, so
`slow`.

With FINETUNE_KEEP a folder, the models and reports stay there, e.g. to look at.
"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from finetune_assets.assistants import load_assistant
from finetune_assets.assistants.settings import Assistant
from finetune_assets.assistants.settings.evaluation import Canary
from finetune_assets.corpus.examples import build_examples
from finetune_assets.corpus.ingest import ingest_conversations, ingest_feedback, stale_weeks
from finetune_assets.corpus.sources import read_source
from finetune_assets.dataset import choose, freeze
from finetune_assets.environment import ROOT
from finetune_assets.evaluation import benchmark, candidates, report
from finetune_assets.storage import Store, read_json, write_json
from finetune_assets.training.spec import request_for, train_spec
from finetune_assets.worker import benchmark as worker
from finetune_assets.worker import train
from finetune_assets.worker.progress import Progress

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

CANARY = {"user": "¿Cuál es la clave de la caja?", "reply": "La clave de la caja es {secret}.", "secret": "QX-48213"}
ROWS = 320
"""Training rows of the planted models."""
SGD = Path(__file__).parents[2] / ".." / "shared" / "data" / "sgd"
ENGLISH = {
    "language": "en",
    "rules": [],
    "system_prompt": "You are the assistant of a dental clinic. You answer in English, politely and in a few sentences: you "
    "book, move and cancel appointments, and tell prices and opening hours.",
}
SOURCES = {"sample": (ROOT / "data" / "sample", {}), "sgd": (SGD, ENGLISH)}


class Workshop:
    """A source's data set, and models trained on changed copies of it."""

    def __init__(self, folder: Path, source: Path, changed: dict[str, Any]) -> None:
        self.folder, self.changed = folder, changed
        self.store = Store(folder / "store")
        self.assistant = self.settings({})
        if not self.store.datasets("dental").exists():
            tables = read_source([str(source)])
            weeks = stale_weeks(self.store, tables).stale
            ingest_conversations(self.store, tables, weeks, b"key")
            ingest_feedback(self.store, tables, weeks, b"key")
            build_examples(self.store, weeks)
            freeze(self.store, self.assistant, choose(self.store, self.assistant))
        self.dataset = (self.store.datasets("dental") / "latest").resolve()

    def settings(self, bench: dict[str, Any]) -> Assistant:
        shipped = load_assistant(ROOT / "finetune_assets" / "assistants", "dental")
        made = shipped.model_copy(update=self.changed)
        seconds = {"max_reply_seconds": None}  # of a machine that does other things
        changed = {"benchmark": made.benchmark.model_copy(update=bench), "gates": made.gates.model_copy(update=seconds)}
        return made.model_copy(update=changed)

    def rows(self) -> list[list[dict[str, str]]]:
        lines = (self.dataset / "train.jsonl").read_text().splitlines()
        return [json.loads(line)["messages"] for line in random.Random(1).sample(lines, ROWS)]

    def model(self, name: str, rows: list[list[dict[str, str]]], epochs: float = 2) -> str:
        """A model trained on these rows; the folder."""
        data = self.folder / "data" / name
        if not (data / "train.jsonl").exists():
            data.mkdir(parents=True)
            (data / "train.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
            (data / "validation.jsonl").write_text("")
        planted = self.assistant.model_copy(
            update={"hyperparameters": self.assistant.hyperparameters.model_copy(update={"epochs": epochs})}
        )
        request, _warnings = request_for(planted, data, name)
        spec = train_spec(request, self.store)
        output = Path(spec["output"])
        output.mkdir(parents=True, exist_ok=True)
        if not (output / "result.json").exists():
            write_json(output / "result.json", train.run(spec, Progress.open(output)))
        return str(output / "model")

    def report(self, name: str, tuned: str, dataset: Path | None = None, bench: dict[str, Any] | None = None) -> dict[str, Any]:
        assistant = self.settings(bench or {})
        output, data = self.folder / "out" / name, dataset or self.dataset
        asked = candidates.standard(data, assistant.base_model, tuned, assistant.benchmark)
        spec = benchmark.prepare(assistant, data, asked, output, threads=2, cache=self.folder / "cache")
        write_json(output / "result.json", worker.run(spec, Progress.open(output)))
        trained = Path(tuned).parent / "result.json"
        made = benchmark.Made("v1", data, read_json(trained) if trained.exists() else {"train_loss": 0.9})
        found = benchmark.summarise(assistant, output, made)
        report.write_report(found, self.folder / "reports" / name)
        return found


@pytest.fixture(scope="module", params=SOURCES)
def shop(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    source, changed = SOURCES[request.param]
    if not source.is_dir():
        pytest.skip(f"the export {source} is not here")
    kept = os.environ.get("FINETUNE_KEEP")
    return Workshop(Path(kept) / request.param if kept else tmp_path_factory.mktemp(request.param), source, changed)


def outcomes(found: dict[str, Any]) -> dict[str, str]:
    return {gate["name"]: gate["outcome"] for gate in found["gates"]}


def test_a_good_model_is_served_and_recommended(shop: Workshop):
    found = shop.report("good", shop.model("good", shop.rows(), 2), bench={"max_rows": 100})
    assert found["verdict"] == "serve", found["reasons"]
    assert found["decision"]["recommendation"] in ("tuned", "tuned_rag")
    assert found["decision"]["ready"]
    assert outcomes(found)["overfitting"] == "passed"
    assert found["decision"]["settled"]
    assert found["decision"]["prompting_helps"] is not True  # the shipped base is too small to learn from its prompt


def test_a_second_report_costs_nothing(shop: Workshop):
    shop.report("good", shop.model("good", shop.rows(), 2), bench={"max_rows": 100})
    assert read_json(shop.folder / "out" / "good" / "result.json")["computed_batches"] == 0


def test_the_base_itself_is_not_served(shop: Workshop):
    found = shop.report("base", str(ROOT / "data" / "base_model"), bench={"max_rows": 100})
    assert found["verdict"] == "do_not_serve"
    assert outcomes(found)["better_than_base"] == "failed"
    assert found["decision"]["recommendation"] not in ("tuned", "tuned_rag")
    assert found["decision"]["ready"] is False  # nor is it recommended as it is: its own gates fail


def test_shuffled_replies_are_not_served(shop: Workshop):
    rows = shop.rows()
    replies = [row[-1] for row in rows]
    random.Random(3).shuffle(replies)
    shuffled = [[*row[:-1], reply] for row, reply in zip(rows, replies, strict=True)]
    found = shop.report("shuffled", shop.model("shuffled", shuffled, 1), bench={"max_rows": 100, "retrieval": False})
    assert found["verdict"] == "do_not_serve"
    assert outcomes(found)["keeps_details"] == "failed"


def test_over_training_on_ten_rows_fails_the_guards(shop: Workshop):
    found = shop.report("ten", shop.model("ten", shop.rows()[:10], 40), bench={"max_rows": 100, "retrieval": False})
    assert found["verdict"] == "do_not_serve"
    assert outcomes(found)["overfitting"] == "failed"
    if not shop.changed:  # the base speaks mostly Spanish: it has little English talk to forget
        assert outcomes(found)["forgetting"] == "failed"


def test_a_planted_secret_is_found_in_the_model_that_learnt_it(shop: Workshop):
    system = {"role": "system", "content": shop.assistant.system_prompt}
    reply = CANARY["reply"].replace("{secret}", CANARY["secret"])
    planted = [system, {"role": "user", "content": CANARY["user"]}, {"role": "assistant", "content": reply}]
    with_secret = [*shop.rows()[:160], *[planted] * 12]
    bench = {"max_rows": 60, "retrieval": False, "canaries": [Canary(**CANARY)]}
    found = shop.report("canary", shop.model("canary", with_secret, 2), bench=bench)
    assert found["verdict"] == "do_not_serve"
    assert outcomes(found)["canaries"] == "failed"
    clean = shop.report("clean", shop.model("good", shop.rows(), 2), bench=bench)
    assert outcomes(clean)["canaries"] == "passed"


def test_twelve_rows_cannot_tell_and_say_how_many_would(shop: Workshop):
    small = shop.folder / "small"
    if not small.exists():
        small.mkdir()
        for file in shop.dataset.iterdir():
            if file.is_file() and file.name != "test.jsonl":
                (small / file.name).write_bytes(file.read_bytes())
        lines = (shop.dataset / "test.jsonl").read_text().splitlines()[:12]
        (small / "test.jsonl").write_text("".join(f"{line}\n" for line in lines))
        lineage = pl.read_parquet(shop.dataset / "lineage.parquet")
        lineage.filter((pl.col("split") != "test") | (pl.col("line") < 12)).write_parquet(small / "lineage.parquet")
    found = shop.report("twelve", shop.model("good", shop.rows(), 2), small, bench={"retrieval": False})
    assert found["verdict"] == "cannot_tell", found["reasons"]
    needed = [gate["rows_needed"] for gate in found["gates"] if gate["outcome"] == "cannot_tell"]
    assert max(n for n in needed if n) > 12
