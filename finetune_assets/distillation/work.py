"""One distillation from end to end: permission, money, the teacher's replies, and the frozen data set of them."""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from finetune_assets.assistants.settings import Assistant
from finetune_assets.dataset.manifest import Manifest
from finetune_assets.dataset.selection import common_regions, own_contacts
from finetune_assets.distillation import build, teacher
from finetune_assets.distillation.replies import Allowance, Question, Replies, collect, estimated
from finetune_assets.distillation.teacher import Ask, Teacher
from finetune_assets.errors import SettingsError
from finetune_assets.registry import Ledger
from finetune_assets.registry.spending import Limits, Purchase, extend, reserve, settle, unsettled
from finetune_assets.storage import Store
from finetune_assets.training import prices
from finetune_assets.training.screening import check_files


@dataclass(frozen=True)
class Wishes:
    """What a person asked for."""

    teacher: str | None = None
    max_usd: float | None = None
    """Most US dollars for this data set's replies; 0: nothing is asked, the log has to do."""
    said_since: datetime.date | None = None
    """From this day on the replies of the data set are the teacher's own."""

    @classmethod
    def of(cls, tags: Mapping[str, str], names: tuple[str, str, str]) -> Wishes:
        """From a run's tags; `names`: those of the three. Raises SettingsError for a value that is none."""
        wanted, most, since = (tags.get(name) for name in names)
        try:
            return cls(
                wanted if wanted != "auto" else None,
                float(most) if most else None,
                datetime.date.fromisoformat(since) if since else None,
            )
        except ValueError as error:
            raise SettingsError(f"The run's tags {', '.join(names[1:])} hold no amount or no day: {error}.") from None


@dataclass(frozen=True)
class Work:
    """For whom, with which ledger, and who is told."""

    store: Store
    ledger: Ledger
    assistant: Assistant
    say: Callable[[str], None]
    project_usd: float | None = None
    """FINETUNE_MONTHLY_USD."""
    asker: Callable[[Teacher], AbstractContextManager[Ask]] = teacher.asker

    def distil(self, folder: Path, wishes: Wishes) -> Manifest:
        """Collects what the teacher says to the training contexts of a frozen data set, and freezes the result; its manifest.

        Raises BudgetExceeded or SettingsError before anything is asked, ProviderError, TooFewExamples, LeakError.
        """
        name = self.assistant.name
        chosen = teacher.find(self.assistant, self.ledger, wishes.teacher)
        found = build.targets(folder)
        said = build.said_in_production(self.ledger, chosen, found, wishes.said_since)
        with FileLock(self.store.datasets(name) / "teacher_replies.lock"):
            book = Replies(self.store.datasets(name))
            self._settle_left(book)
            wanted = build.questions(chosen, found, said)
            missing = [one for one in {one.key: one for one in wanted}.values() if book.get(one.key) is None]
            self.say(
                f"{chosen.name}: {len(found)} training contexts, {sum(one.fixed for one in found)} stay as they are, "
                f"{len(found) - sum(one.fixed for one in found) - len(missing)} replies known, {len(missing)} to ask."
            )
            if missing and wishes.max_usd != 0:
                check_files([folder / "train.jsonl"], own_contacts(self.store), common_regions(self.store))
                teacher.check_answers(chosen)
                left = wishes.max_usd
                if left is not None and (before := book.cost({one.key for one in wanted})):
                    left = max(0.0, left - before)
                    used = f"${before:.4f} of --max-usd {wishes.max_usd:g} went into the replies known"
                    self.say(f"{chosen.name}: {used}, ${left:.4f} is left.")
                self._ask(chosen, book, missing, left)
            return build.freeze(self.store, self.assistant, folder, (chosen, book, said))

    def _ask(self, chosen: Teacher, book: Replies, missing: list[Question], most_usd: float | None) -> None:
        """Reserves the estimate, asks as long as both budgets have the money for longer replies, and settles by what was used."""
        model, name = chosen.model, self.assistant.name
        tokens, estimate = estimated(model, missing)
        if estimate is None:
            unknown = prices.unknown(model.provider, model.of or model.model, "input, output")
            raise SettingsError(
                f"{chosen.name} is not asked for {len(missing)} replies: {unknown}; 0 where it costs nothing. "
                "--max-usd 0 asks nothing: the log has to do."
            )
        self.say(f"{chosen.name}: about ${estimate:.4f} for {len(missing)} replies.")
        usd = estimate if most_usd is None else min(estimate, most_usd)
        keys = hashlib.sha256("".join(sorted(one.key for one in missing)).encode()).hexdigest()[:16]
        reference = f"distil:{name}:{keys}:{datetime.datetime.now(datetime.UTC):%Y%m%dT%H%M%S%f}"
        purchase = Purchase(reference, name, model.provider, "replies", usd, tokens)
        limits = Limits(self.assistant.budget.monthly_usd, self.project_usd)
        reserve(self.ledger, purchase, limits)
        pays = Allowance(reference, most_usd, lambda usd: extend(self.ledger, reference, usd, limits))
        try:
            with self.asker(chosen) as ask:
                collect(book, missing, chosen, ask, pays, self.say)
        finally:
            spent, used = book.spent(reference)
            settle(self.ledger, reference, spent, used)

    def _settle_left(self, book: Replies) -> None:
        """Settles what a killed collection had reserved, by what it has answers for."""
        for reference in unsettled(self.ledger, self.assistant.name, "distil:"):
            settle(self.ledger, reference, *book.spent(reference))
