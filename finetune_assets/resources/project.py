"""Source, store, assistants and ledger. A field that is null follows the environment (or `.env`), so no secret is in the UI."""

# pyright: reportMissingTypeArgument=false
from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

import dagster as dg
from pydantic import Field

from finetune_assets.assistants import Assistant, assistant_names, load_assistant, own_contacts, own_regions
from finetune_assets.corpus import presidio
from finetune_assets.corpus.erasure import Erased, key_check
from finetune_assets.corpus.requests import Requests, read_requests
from finetune_assets.corpus.sources import SourceTables, read_source
from finetune_assets.environment import Environment
from finetune_assets.registry import Ledger, erasures
from finetune_assets.storage import Store, read_json


class SourceResource(dg.ConfigurableResource):
    """Exports to read conversations, messages and feedback from."""

    urls: list[str] | None = Field(default=None, description="Folders or database URLs; default: FINETUNE_SOURCE.")

    assistants: str | None = Field(
        default=None, description="Folder of assistant files, whose `contacts` stay in texts; default: FINETUNE_ASSISTANTS."
    )

    def addresses(self) -> list[str]:
        """The folders and database URLs."""
        return list(self.urls or Environment.read().sources)

    def read(self, erased: Erased, run_id: str | None = None) -> SourceTables:
        """All sources, opened, without the rows of erased people. Raises SourceError.

        The assets of one run see the same state, read once.
        """
        urls = self.addresses()
        if run_id is None:
            return self._opened(urls, erased)
        if _opened is None or _opened[0] != (urls, erased.subjects) or _opened[1] not in (run_id, ANY_RUN):
            keep_source(urls, erased, self._opened(urls, erased), run_id)
        assert _opened is not None
        return _opened[2]

    def requests(self) -> Requests:
        """Who asks to be forgotten, in the sources' own tables. Raises SourceError."""
        return read_requests(self.addresses())

    @property
    def folder(self) -> Path:
        """The folder of assistant files."""
        return Path(self.assistants) if self.assistants else Environment.read().assistants

    def _opened(self, urls: list[str], erased: Erased) -> SourceTables:
        presidio.check()
        source, folder = erased.leave_out(read_source(urls)), self.folder
        source.contacts, source.regions = own_contacts(folder), own_regions(folder)
        return source


ANY_RUN = "*"
_opened: tuple[tuple[list[str], frozenset[str]], str, SourceTables] | None = None


def keep_source(urls: Sequence[str], erased: Erased, source: SourceTables, run_id: str = ANY_RUN) -> None:
    """Makes `SourceResource.read` give this opened source to the assets of a run of this process."""
    global _opened  # noqa: PLW0603
    _opened = (list(urls), erased.subjects), run_id, source


def let_go() -> None:
    """Forgets the kept source, and what was read of it."""
    global _opened  # noqa: PLW0603
    _opened = None


class StoreResource(dg.ConfigurableResource):
    """Everything the project makes."""

    home: str | None = Field(default=None, description="Folder; default: FINETUNE_HOME.")

    @property
    def store(self) -> Store:
        """The folder tree."""
        return Store(Path(self.home) if self.home else Environment.read().home)

    @property
    def key(self) -> bytes:
        """The secret of the user pseudonyms."""
        configured = Environment.read().user_key
        return configured.encode() if configured else self.store.key()

    def tenants(self) -> dict[str, str]:
        """Tenant to vertical, as the corpus last saw them; empty before the first ingestion."""
        path = self.store.tenants
        return read_json(path) if path.exists() else {}


class AssistantsResource(dg.ConfigurableResource):
    """The folder of assistant YAML files."""

    folder: str | None = Field(default=None, description="Folder; default: FINETUNE_ASSISTANTS.")

    @property
    def path(self) -> Path:
        """The folder."""
        return Path(self.folder) if self.folder else Environment.read().assistants

    def names(self) -> list[str]:
        """Assistants that have a file."""
        return assistant_names(self.path)

    def load(self, name: str, tenants: dict[str, str]) -> Assistant:
        """One assistant's settings. Raises SettingsError."""
        return load_assistant(self.path, name, tenants)


class LedgerResource(dg.ConfigurableResource):
    """Data sets, jobs, versions and rollouts."""

    url: str | None = Field(default=None, description="SQLAlchemy URL; default: FINETUNE_DATABASE_URL.")

    @contextmanager
    def open(self) -> Generator[Ledger]:
        """The ledger, its connections given back at the end."""
        ledger = Ledger(self.url or Environment.read().database_url)
        try:
            yield ledger
        finally:
            ledger.close()

    def erased(self, key: bytes, asked: Requests | None = None) -> Erased:
        """Whom no build may read; what a source asks for is recorded first. Raises LedgerError where they were recorded with
        another key."""
        with self.open() as book:
            if asked is not None:
                erasures.record_asked(book, asked.subjects(key), key_check(key))
            return Erased(erasures.subjects(book, key_check(key)), key)
