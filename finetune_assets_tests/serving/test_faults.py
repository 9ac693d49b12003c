"""What befalls a running router: a client that leaves, a disk that takes nothing, a row that the ledger refuses."""

from __future__ import annotations

import json
import re
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from finetune_assets.registry.traffic import conversations, requests
from finetune_assets.serving.journal import Journal
from finetune_assets.serving.writer import transfer
from finetune_assets_tests.serving.shop import Shop, Upstream, wait_for

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    made = Upstream()
    yield made
    made.close()


def ids(shop: Shop, table: sa.Table, column: str, **where: Any) -> set[str]:
    query = sa.select(table.c[column]).where(*(table.c[name] == value for name, value in where.items()))
    with shop.ledger() as book, book.engine.connect() as connection:
        return set(connection.execute(query).scalars())


def test_a_client_that_leaves_a_stream_ends_it(tmp_path: Path, upstream: Upstream) -> None:
    shop = Shop(tmp_path, upstream=upstream.url)
    shop.version("a")
    upstream.faults["base"] = "slow"
    body = {"model": "aurora", "stream": True, "messages": [{"role": "user", "content": " ".join(["hola"] * 15)}]}
    with shop.served("--no-judge") as served:
        with served.client.stream("POST", "/v1/chat/completions", json=body) as answer:
            assert next(answer.iter_lines()).startswith("data:")
        assert wait_for(lambda: ids(shop, requests, "outcome") == {"gone"}, 5)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="prlimit(2)")
def test_a_full_disk_costs_rows_not_chats_and_is_told(tmp_path: Path, upstream: Upstream) -> None:
    shop = Shop(tmp_path, upstream=upstream.url)
    shop.version("a")
    with shop.served("--no-judge") as served:
        before = served.ask(user="ana")
        worker = served.children("worker")[0]
        limits = resource.prlimit(worker, resource.RLIMIT_FSIZE)
        resource.prlimit(worker, resource.RLIMIT_FSIZE, (0, limits[1]))  # the kernel refuses every write to a file
        lost = served.ask(user="ana")
        assert lost.status_code == 200
        ready = served.client.get("/readyz")
        assert ready.status_code == 503
        assert "could not be kept" in ready.json()["problems"][0]
        resource.prlimit(worker, resource.RLIMIT_FSIZE, limits)
        after = served.ask(user="ana")
        assert served.client.get("/readyz").status_code == 200
        told = re.search(r"^finetune_lost_rows_total (\S+)", served.client.get("/metrics").text, re.MULTILINE)
        assert told
        assert float(told[1]) == 4  # request, conversation, question, reply
    stored = ids(shop, requests, "request_id")
    assert {before.json()["id"], after.json()["id"]} <= stored
    assert lost.json()["id"] not in stored


def test_a_row_that_the_ledger_refuses_is_set_aside_and_holds_up_nobody(tmp_path: Path) -> None:
    shop = Shop(tmp_path)
    folder = tmp_path / "journal"
    journal = Journal(folder)
    journal.append([("conversations", {"conversation_id": "c1"})])
    journal.append([("requests", {"request_id": "r1"}), ("conversations", {"conversation_id": {"no": "text"}})])
    journal.close()
    later = Journal(folder)
    later.append([("conversations", {"conversation_id": "c2"})])
    with shop.ledger() as book:
        transfer(folder, book.engine)
        assert ids(shop, conversations, "conversation_id") == {"c1"}  # the second segment is still its worker's
        later.close()
        transfer(folder, book.engine)
    assert ids(shop, conversations, "conversation_id") == {"c1", "c2"}
    refused = [json.loads(line)[0] for file in (folder / "refused").iterdir() for line in file.read_text().splitlines()]
    assert refused == ["requests", "conversations"]
    assert not list(folder.glob("*.jsonl"))
