"""Trainings with other seeds: really trained, once, within the budget; their spread is told and widens the decision."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from finetune_assets.assistants.settings import Assistant
from finetune_assets.assistants.settings.training import Budget
from finetune_assets.errors import LaunchError
from finetune_assets.evaluation import benchmark, candidates, report, seeds
from finetune_assets.storage import Store, read_json, write_json
from finetune_assets.training.publish import publish
from finetune_assets.worker import benchmark as worker
from finetune_assets.worker.__main__ import run_task
from finetune_assets.worker.progress import Progress
from finetune_assets_tests.evaluation.frozen import make_dataset
from finetune_assets_tests.tiny_model import make_tiny_model
from finetune_assets_tests.training_jobs import make_spec

RUNS: Counter[str] = Counter()


def launch(spec: Path, output: Path) -> None:
    RUNS[output.name] += 1
    assert run_task(read_json(spec)) == 0


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Path, Path, Path]:
    """A store, a base model, a data set, and a version trained on it."""
    folder = tmp_path_factory.mktemp("seeds")
    store, base, dataset = Store(folder / "home"), make_tiny_model(folder / "base", context=192), make_dataset(folder / "data")
    job = make_spec(store.job("first"), base, dataset, hyperparameters={"epochs": 1, "max_length": 192})
    write_json(store.job("first") / "spec.json", job)
    assert run_task(job) == 0
    publish(store.job("first"), store.model("dental", "v1"))
    return store, base, dataset, store.model("dental", "v1")


def test_seeds_are_trained_once_measured_and_told(home: tuple[Store, Path, Path, Path], tmp_path: Path):
    store, base, dataset, version = home
    trained = seeds.train(store, version, dataset, 3, Budget(), launch)
    again = seeds.train(store, version, dataset, 3, Budget(), launch)
    assert trained == again
    assert [one.seed for one in trained] == [8, 9]
    assert sorted(RUNS.values()) == [1, 1]
    weights = {Path(one.model or "", "model.safetensors").read_bytes() for one in trained}
    assert len(weights | {(version / "model.safetensors").read_bytes()}) == 3  # another seed, other weights

    assistant = Assistant(
        name="dental",
        select={"vertical": "dental"},
        benchmark={"max_rows": 8, "max_new_tokens": 8, "retrieval": False, "seeds": 3},
    )
    asked = candidates.standard(dataset, str(base), str(version), assistant.benchmark)
    asked = [*asked, *(one.candidate for one in trained)]
    spec = benchmark.prepare(assistant, dataset, asked, tmp_path, threads=1)
    write_json(tmp_path / "result.json", worker.run(spec, Progress.open(tmp_path)))
    left_out = seeds.Training(10, None, "budget")
    made = benchmark.Made("v1", dataset, trained=[*trained, left_out], training_log=version / "training_log.jsonl")
    found = benchmark.summarise(assistant, tmp_path, made)
    assert set(found["candidates"]) == {"base", "few_shot", "tuned"}  # a seed is no candidate of the report
    assert set(found["differences"]) == {"tuned_vs_base", "tuned_vs_few_shot"}
    known = found["seeds"]["measures"]["bits_per_byte"]
    assert known["values"][0] == pytest.approx(found["candidates"]["tuned"]["bits_per_byte"]["value"])
    assert len(set(known["values"])) == 3
    assert known["deviation"] > 0
    assert found["seeds"]["left_out"] == [{"seed": 10, "why": "budget"}]
    step = next(step for step in found["decision"]["steps"] if step["to"] == "tuned" and step["from"] == "base")
    plain = found["differences"]["tuned_vs_base"]["bits_per_byte"]
    assert step["gain"]["value"] == pytest.approx(-plain["value"])
    assert step["gain"]["high"] - step["gain"]["low"] > plain["high"] - plain["low"]
    assert found["gates"] == ungated(found, assistant, tmp_path, dataset)  # this very version is judged
    page = report.html(found)
    assert "Otras semillas" in page
    assert "La semilla 10 no se entrenó" in page
    for curve in ("Tasa de aprendizaje × 10⁶", "Norma del gradiente", "Tokens por segundo", "Memoria, GiB"):
        assert f'aria-label="Gráfico de líneas, {curve}: de ' in page


def ungated(found: dict[str, Any], assistant: Assistant, output: Path, dataset: Path) -> list[dict[str, Any]]:
    """The gates of a report that knows nothing of seeds."""
    return benchmark.summarise(assistant, output, benchmark.Made("v1", dataset))["gates"]


def test_the_budget_is_that_of_all_of_them():
    training = {"seconds": 1800.0}
    assert seeds.affordable(3, training, Budget()) == 3
    assert seeds.affordable(3, training, Budget(hours=1)) == 2
    assert seeds.affordable(3, training, Budget(hours=0.1)) == 1  # the version itself has been trained
    assert seeds.affordable(5, training, Budget(training_usd=1.0, usd_per_hour=0.5)) == 4
    assert seeds.affordable(5, training, Budget(training_usd=1.0)) == 5  # no rate, so no price
    assert seeds.affordable(3, {}, Budget(hours=1)) == 3


def test_what_cannot_be_trained_is_told_and_stops_nothing(home: tuple[Store, Path, Path, Path], tmp_path: Path):
    store, _, dataset, version = home

    def dies(_spec: Path, _output: Path) -> None:
        raise LaunchError("killed")

    found = seeds.train(
        Store(tmp_path), version, dataset, 3, Budget(hours=2 * read_json(version / "result.json")["seconds"] / 3600), dies
    )
    assert [(one.seed, one.model, one.problem) for one in found] == [(8, None, "killed"), (9, None, "budget")]
    assert seeds.train(store, tmp_path, dataset, 3, Budget(), dies) == [seeds.Training(0, None, "rented")]  # it keeps no spec
    assert seeds.train(store, version, dataset, 1, Budget(), dies) == []
    assert seeds.spread({}, []) is None
