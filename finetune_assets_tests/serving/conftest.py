"""What the router's tests share: an upstream, a store with one version, and a router with a candidate at 50 %."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune_assets_tests.registry.conftest import postgres, postgres_server  # noqa: F401
from finetune_assets_tests.serving.servers import Hook, Upstream
from finetune_assets_tests.serving.shop import Served, Shop


@pytest.fixture(scope="module")
def shared_upstream() -> Iterator[Upstream]:
    made = Upstream()
    yield made
    made.close()


@pytest.fixture
def upstream(shared_upstream: Upstream) -> Upstream:
    """Without the faults of the test before."""
    shared_upstream.faults.clear()
    shared_upstream.shapes.clear()
    return shared_upstream


@pytest.fixture
def fresh(tmp_path: Path, upstream: Upstream) -> Shop:
    """A version that nobody is served by."""
    made = Shop(tmp_path, upstream=upstream.url)
    made.version("a")
    return made


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory, shared_upstream: Upstream) -> Shop:
    """Two versions; the first is champion, the second at 50 %. Nothing judges but the tests."""
    made = Shop(tmp_path_factory.mktemp("shop"), upstream=shared_upstream.url)
    made.two_versions("50")
    return made


@pytest.fixture(scope="module")
def served(shop: Shop) -> Iterator[Served]:
    with shop.served("--no-judge", "--workers", "2") as running:
        yield running


@pytest.fixture
def hook() -> Iterator[Hook]:
    made = Hook()
    yield made
    made.close()
