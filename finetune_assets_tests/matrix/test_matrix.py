"""Each objective and adapter on each export, from the source to the report, by `finetune run`.

One is in the default tier; all of them (about half a minute each) are in `make test-all`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml

from finetune_assets.environment import ROOT
from finetune_assets.training.machine import has_gpu
from finetune_assets_tests.tiny_model import make_tiny_model

SGD = ROOT.parent / "shared" / "data" / "sgd"
EXPORTS = {"sample": (ROOT / "data" / "sample", "dental", "es"), "sgd": (SGD, "restaurant", "en")}
"""Export, the vertical that is trained, and its language."""
CHAINS = (
    ("sft",),
    ("dpo",),
    ("kto",),
    ("continued_pretraining",),
    ("tools",),
    ("sft", "dpo"),
    ("sft", "kto"),
    ("continued_pretraining", "sft", "dpo"),
    ("continued_pretraining", "tools"),
)
SHORT = {"epochs": 0.1, "by_objective": {"dpo": {"epochs": 1}, "kto": {"epochs": 1}, "continued_pretraining": {"epochs": 1}}}


REASONS = {
    "es": (
        "Me duele una muela desde ayer.",
        "Mi hija necesita su primera revisión antes de las vacaciones.",
        "Se me cayó un empaste comiendo turrón.",
        "Quisiera blanquear los dientes para mi boda.",
        "Hace dos años que nadie me hace una limpieza.",
        "El aparato de mi hijo le roza la mejilla y no puede dormir.",
        "Me sangran las encías cuando me cepillo.",
        "Necesito un presupuesto para dos implantes.",
        "Perdí el recibo de la visita pasada y quiero otro.",
        "Mi madre, de ochenta años, busca una dentadura nueva.",
        "Me partí un diente jugando al fútbol.",
        "¿Atienden urgencias? Tengo la cara hinchada.",
    ),
    "en": (
        "It is our anniversary, so a quiet corner would be lovely.",
        "Ten colleagues and I want pizza after work.",
        "My grandmother cannot climb stairs.",
        "Do you have a high chair? We bring twins.",
        "I am allergic to peanuts and a little afraid.",
        "We would love the terrace if it does not rain.",
        "Somebody told me that your ramen is the best in town.",
        "A birthday cake will come with us, please keep it cold.",
        "Just me and a book, near a window.",
        "Our dog is small and sleeps all evening.",
        "Half of us eat no meat, the other half nothing else.",
        "The concert begins early, so we must be quick.",
    ),
}
ASKS = {
    "es": {
        "lunes": "Quiero venir el {day} a las {hour}.",
        "martes": "¿Les queda algún hueco el {day}, digamos sobre las {hour} en punto?",
        "jueves": "Apúntenme por favor para este {day}; puedo desde las {hour}.",
    },
    "en": {
        "Monday": "I would come on {day} at {hour}.",
        "Tuesday": "Is there anything left on {day}, let us say around {hour} o'clock?",
        "Thursday": "Please put me down for this {day}; any time from {hour} will do.",
    },
}
"""Why somebody books and how they ask: sentences that are no near-duplicates of each other."""


@dataclass
class Store:
    """A store that the combinations of one export share: its corpus is read once."""

    folder: Path
    source: str
    settings: dict[str, Any]
    environment: dict[str, str] = field(default_factory=dict[str, str])

    def finetune(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """The command line, as a user starts it."""
        command = [sys.executable, "-m", "finetune_assets.cli", *arguments]
        own = {"FINETUNE_HOME": str(self.folder / "home"), "FINETUNE_ASSISTANTS": str(self.folder / "assistants")}
        environment = {**os.environ, **own, "FINETUNE_SOURCE": self.source, "HF_HUB_OFFLINE": "1", **self.environment}
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)

    def run(self, name: str, **settings: Any) -> subprocess.CompletedProcess[str]:
        """`finetune run` of an assistant with these settings."""
        file = self.folder / "assistants" / f"{name}.yaml"
        file.parent.mkdir(exist_ok=True)
        file.write_text(yaml.safe_dump({**self.settings, **settings}), encoding="utf-8")
        return self.finetune("run", "--assistant", name, "--json")


def made(folder: Path, export: str) -> Store:
    """A store of an export; its text is made from nothing but this file."""
    source, vertical, language = EXPORTS[export]
    if not source.is_dir():
        pytest.skip(f"needs the export {source}")
    text = folder / "text"
    text.mkdir()
    for number in range(4):
        topics = ("citas", "horarios", "precios", "tratamientos") if language == "es" else ("tables", "hours", "prices", "menus")
        (text / f"{number}.md").write_text(f"# {topics[number]}\n\n" + f"{topics[number].title()} {number}: {topics}. " * 150)
    settings = {
        "select": {"vertical": vertical},
        "language": language,
        "text": str(text),
        "min_examples": 20,
        "hyperparameters": SHORT,
        "benchmark": {"max_rows": 12, "retrieval": False, "max_new_tokens": 32},
    }
    return Store(folder, str(source), settings)


def with_tools(store: Store) -> Store:
    """The store with an export of tool calls beside its own."""
    language = store.settings["language"]
    rows = [
        {
            "instruction": f"{reason} {ask.format(day=day, hour=9 + at)}",
            "output": {"name": "book", "arguments": {"day": day, "hour": 9 + at}},
            "user_id": f"person{at}{day}",
        }
        for at, reason in enumerate(REASONS[language])
        for day, ask in ASKS[language].items()
    ]
    file = store.folder / "tools.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    origin = ("--tenant", "booker", "--vertical", "booking", "--date", "2026-10-05")
    done = store.finetune("import", str(file), "--to", str(store.folder / "tools"), *origin)
    assert done.returncode == 0, done.stderr
    store.source += f",{store.folder / 'tools'}"
    return store


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Store]:
    """By export, made when first asked for."""
    folder, found = tmp_path_factory.mktemp("stores"), dict[str, Store]()

    class Made(dict[str, Store]):
        def __missing__(self, export: str) -> Store:
            (folder / export).mkdir()
            return self.setdefault(export, with_tools(made(folder / export, export)))

    return Made(found)


def check(store: Store, chain: tuple[str, ...], adapter: str) -> None:
    """Runs a combination to its report and looks at what it left."""
    name = "-".join([*chain, adapter]).replace("continued_pretraining", "text")
    of_tools = {"select": {"vertical": "booking"}} if "tools" in chain else {}
    done = store.run(name, objective=list(chain), adapter=adapter, **of_tools)
    assert done.returncode == 0, done.stderr[-3000:]
    outcome = json.loads(done.stdout)
    assert outcome["verdict"] in ("serve", "do_not_serve", "cannot_tell")
    report = json.loads(Path(outcome["report"]).with_suffix(".json").read_text())
    assert {"base", "tuned"} <= set(report["candidates"])
    version = store.folder / "home" / "models" / name / outcome["version"]
    result = json.loads((version / "result.json").read_text())
    assert (result["objective"], result["adapter"]) == (list(chain), adapter)
    assert all(stage["steps"] > 0 and stage["train_loss"] > 0 for stage in result["stages"])
    assert (version / "adapter" / "adapter_model.safetensors").exists() == (adapter == "lora")
    assert (version / "model.safetensors").exists()
    if chain[-1] in ("dpo", "kto"):
        held = result["stages"][-1]["heldout"]
        assert held["reward_accuracy"]["low"] <= held["reward_accuracy"]["value"] <= held["reward_accuracy"]["high"]
        assert not held["likelihood_fell"]
        assert "reward accuracy" in (version / "card.md").read_text()
        page = Path(outcome["report"]).with_suffix(".html").read_text()
        assert ("acierto de la recompensa" if store.settings["language"] == "es" else "reward accuracy") in page


def few(folder: Path, tenant: str, conversations: int) -> Path:
    """An export of some of a tenant's conversations of the sample, with their messages and feedback."""
    folder.mkdir()
    chosen = pl.read_parquet(EXPORTS["sample"][0] / "conversations.parquet").filter(pl.col("tenant_id") == tenant)
    chosen = chosen.sort("started_at").head(conversations)
    chosen.write_parquet(folder / "conversations.parquet")
    for table in ("messages", "feedback"):
        rows = pl.read_parquet(EXPORTS["sample"][0] / f"{table}.parquet")
        rows.join(chosen, on="conversation_id", how="semi").write_parquet(folder / f"{table}.parquet")
    return folder


@pytest.mark.timeout(900)
def test_an_adapter_goes_to_its_report(tmp_path: Path):
    store = made(tmp_path, "sample")
    store.source = str(few(tmp_path / "source", "clinica_aurora", 90))
    short = {"max_rows": 4, "retrieval": False, "max_new_tokens": 16}
    store.settings |= {"select": {"tenant": "clinica_aurora"}, "benchmark": short, "min_examples": 10}
    check(store, ("sft",), "lora")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_gpt2_without_a_template_learns_to_answer_and_to_stop(tmp_path: Path):
    """Random weights and a tokenizer of its own, no chat template: lower loss than before, replies that are there and end."""
    base = make_tiny_model(
        tmp_path / "gpt2", architecture="gpt2", template=False, hidden=96, layers=3, heads=3, vocabulary=1024, context=1024
    )
    assert not (base / "chat_template.jinja").exists()
    store = made(tmp_path, "sample")
    values = {"epochs": 3, "learning_rate": 3e-3, "batch_size": 8, "max_length": 768}
    store.settings |= {"select": {"tenant": "clinica_aurora"}, "hyperparameters": values, "benchmark": {"max_rows": 12}}
    done = store.run("gpt2", base_model=str(base))
    assert done.returncode == 0, done.stderr[-3000:]
    outcome = json.loads(done.stdout)
    report = json.loads(Path(outcome["report"]).with_suffix(".json").read_text())
    version = store.folder / "home" / "models" / "gpt2" / outcome["version"]
    result = json.loads((version / "result.json").read_text())
    assert result["eval_losses"][-1] < result["eval_losses"][0] < 6.9  # ln 1024 at the start
    tuned, before = (report["candidates"][name] for name in ("tuned", "base"))
    assert tuned["loss"]["value"] < before["loss"]["value"] - 2
    assert tuned["empty"]["value"] == 0
    assert tuned["unfinished"]["value"] < 0.5
    assert "eos_token" in (version / "chat_template.jinja").read_text()
    assert "GPT2LMHeadModel" in (version / "config.json").read_text()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_four_bits_are_refused_without_a_gpu(stores: dict[str, Store]):
    if has_gpu():
        pytest.skip("has a GPU")
    refused = stores["sample"].run("four_bits", objective=["sft"], adapter="qlora")
    assert refused.returncode == 1
    assert "Set `adapter: lora`" in refused.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("adapter", ["full", "lora"])
@pytest.mark.parametrize("chain", CHAINS, ids="-".join)
@pytest.mark.parametrize("export", EXPORTS)
def test_every_objective_and_adapter(stores: dict[str, Store], export: str, chain: tuple[str, ...], adapter: str):
    check(stores[export], chain, adapter)
