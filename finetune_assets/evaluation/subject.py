"""A registered version as what a benchmark is about: its settings, data set, rivals and folders, found in store and ledger.

    subject = Subject.of(store, book, assistant, version, dataset)
    subject = subject.with_seeds(launch)                    where the settings ask for further trainings
    spec = subject.prepare(threads)                         the worker runs it
    report = subject.report(human)                          written beside the earlier ones, with the history

The steps are those of the asset `benchmark_report`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finetune_assets import __version__
from finetune_assets.assistants.settings import Assistant
from finetune_assets.assistants.settings.evaluation import EndpointSettings, Judge
from finetune_assets.dataset.selection import own_contacts
from finetune_assets.evaluation import seeds
from finetune_assets.evaluation.benchmark import Made, prepare, summarise
from finetune_assets.evaluation.candidates import CHAMPION, TUNED, Candidate, rented_endpoints, standard
from finetune_assets.evaluation.history import write_history
from finetune_assets.evaluation.human.book import of_study
from finetune_assets.evaluation.human.statistics import choices
from finetune_assets.evaluation.human.study import newest
from finetune_assets.evaluation.rented import with_rented
from finetune_assets.evaluation.report import write_report
from finetune_assets.evaluation.traffic import requests_per_month
from finetune_assets.registry import Ledger, Version
from finetune_assets.storage import Store, point, read_json
from finetune_assets.training.remote import RemoteModel


@dataclass(frozen=True)
class Subject:
    """A version and what it is measured with."""

    store: Store
    assistant: Assistant
    """Its settings, with the addresses of candidates that a provider serves."""
    version: Version
    champion: Version | None
    """What is served now, where that is another version."""
    plan: Mapping[str, Any]
    dataset: Path
    candidates: Sequence[Candidate]
    trained: Sequence[seeds.Training] = ()

    @classmethod
    def of(cls, store: Store, book: Ledger, assistant: Assistant, version: Version, dataset: Path) -> Subject:
        """`dataset`: the folder that it was trained on. Raises LedgerError where the ledger does not know a version."""
        plan = book.job(version.job_id).plan
        champion = book.rollout(assistant.name).champion or plan.get("compare_with")
        served = book.version(assistant.name, champion) if champion and champion != version.version else None
        base = Path(version.path) / "base"  # beside a rented model's own address, its base's
        base_model = str(base) if RemoteModel.read(base) else version.base_model
        asked = standard(dataset, base_model, version.path, assistant.benchmark, served.path if served else None)
        assistant = with_rented(assistant, rented_endpoints(asked), TUNED, CHAMPION)
        return cls(store, assistant, version, served, plan, dataset, asked)

    @property
    def folder(self) -> Path:
        """Of the report."""
        return self.store.report(self.assistant.name, self.version.version)

    @property
    def output(self) -> Path:
        """Of the worker's files."""
        return self.folder.parent / "work" / self.version.version

    @property
    def endpoints(self) -> list[EndpointSettings]:
        """Candidates that cost money."""
        return self.assistant.benchmark.endpoints

    def with_seeds(self, launch: seeds.Launch) -> Subject:
        """With the further trainings that `benchmark.seeds` asks for, as candidates that are measured and not shown."""
        settings = self.assistant
        wanted = settings.benchmark.seeds
        trained = seeds.train(self.store, Path(self.version.path), self.dataset, wanted, settings.budget, launch)
        asked = [*self.candidates, *(one.candidate for one in trained if one.model is not None)]
        return replace(self, candidates=asked, trained=trained)

    def prepare(self, threads: int) -> dict[str, Any]:
        """Writes the worker's spec and prompts into `output`; the spec."""
        cache = self.store.home / "cache" / "replies"
        return prepare(self.assistant, self.dataset, self.candidates, self.output, threads=threads, cache=cache)

    def report(self, human: Mapping[str, str]) -> dict[str, Any]:
        """Writes the report of what the worker measured, the history and the link to the newest; the content."""
        model = Path(self.version.path)
        training = read_json(model / "result.json")
        made = Made(
            model_version=self.version.version,
            dataset=self.dataset,
            training=training,
            training_log=model / "training_log.jsonl",
            plan=self.plan,
            code_version=(training.get("environment") or {}).get("code") or __version__,
            reproduce=f"finetune reproduce {self.version.version} --assistant {self.assistant.name}",
            contacts=own_contacts(self.store),
            champion=self.champion.version if self.champion else None,
            requests_per_month=requests_per_month(self.store, self.assistant),
            trained=self.trained,
            human=human,
        )
        report = summarise(self.assistant, self.output, made)
        write_report(report, self.folder)
        point(self.folder.parent / "latest", self.version.version)
        write_history(self.folder.parent)
        return report


def rated(store: Store, book: Ledger, version: Version, judge: Judge | None) -> dict[str, str]:
    """What people said of the pairs that the judge is asked about, by message; empty where nobody was asked, or no judge is."""
    study = newest(store, version.assistant, version.version, [TUNED, judge.against]) if judge is not None else None
    if study is None:
        return {}
    return choices(study, of_study(book.engine, version.assistant, study.name))
