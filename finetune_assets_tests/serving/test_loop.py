"""From users back to the data: a correction is trained on in the next run, and people compare what a shadow would have said."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html import unescape
from pathlib import Path

import httpx
import polars as pl
import pytest
import sqlalchemy as sa

from finetune_assets.cli.serving import reads_itself
from finetune_assets.environment import ROOT, Environment
from finetune_assets.evaluation.human import book, study
from finetune_assets.evaluation.human.training import ratings_of
from finetune_assets.registry.traffic import shadow_replies
from finetune_assets.storage import Store
from finetune_assets_tests.serving.servers import Upstream
from finetune_assets_tests.serving.shop import Shop, wait_for

CORRECTION = "Sí, mañana a las 10:15 hay hora con la doctora; dígame su nombre y la dejo anotada."


def finetune(shop: Shop, *arguments: str) -> str:
    """Output of a command on the shop's store, with the router's database as one of its sources."""
    environment = {**shop.environment, "FINETUNE_SOURCE": f"data/sample,{shop.url}"}
    command = [sys.executable, "-m", "finetune_assets.cli", *arguments]
    made = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    return made.stdout


@pytest.mark.parametrize(
    ("source", "database", "told"),
    [
        ("data/sample", None, False),
        ("data/sample,sqlite:///{home}/ledger.db", None, True),
        ("sqlite:///data/store/ledger.db", "sqlite:///data/store/ledger.db", True),
        ("sqlite:///data/other.db", "sqlite:///data/store/ledger.db", False),
        ("postgresql://reader:a@db/finetune", "postgresql+psycopg2://router:b@db:5432/finetune", True),
        ("postgresql://reader:a@db/platform", "postgresql://router:b@db/finetune", False),
    ],
)
def test_whether_the_router_is_a_source_too(source: str, database: str | None, told: bool, tmp_path: Path) -> None:
    variables = {"FINETUNE_HOME": str(tmp_path), "FINETUNE_SOURCE": source.format(home=tmp_path)}
    variables |= {"FINETUNE_DATABASE_URL": database} if database else {}
    assert reads_itself(Environment.read(variables)) == told


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_correction_is_in_the_next_data_set(tmp_path: Path) -> None:
    upstream = Upstream()
    try:
        shop = Shop(tmp_path, upstream=upstream.url)
        shop.version("a")
        with shop.served("--no-judge") as served:
            assert any("reach no data set" in line for line in served.lines)
            answer = served.ask("¿Tienen una hora libre mañana por la mañana para una limpieza?", user="+59170012345")
            sent = {"request_id": answer.json()["id"], "feedback_type": "negative", "expected_response": CORRECTION}
            kept = served.client.post("/feedback", json=sent)
            assert kept.status_code == 202
    finally:
        upstream.close()
    settings = shop.assistants / "aurora.yaml"
    settings.write_text(settings.read_text() + "min_examples: 20\n")
    folder = Path(json.loads(finetune(shop, "run", "--assistant", "aurora", "--until", "jsonl_splits", "--json"))["made"])
    found = [
        (split, line)
        for split in ("train", "validation", "test")
        for line, row in enumerate((folder / f"{split}.jsonl").read_text().splitlines())
        if json.loads(row)["messages"][-1]["content"] == CORRECTION
    ]
    assert len(found) == 1
    lineage = pl.read_parquet(folder / "lineage.parquet").filter(
        (pl.col("split") == found[0][0]) & (pl.col("line") == found[0][1])
    )
    assert lineage["source"].to_list() == ["corrected"]
    assert lineage["message_id"].to_list() == [f"m-{answer.json()['id']}"]
    written = b"".join(file.read_bytes() for file in (shop.home / "datasets").rglob("*") if file.is_file())
    assert b"70012345" not in written
    traced = json.loads(finetune(shop, "explain", f"m-{answer.json()['id']}", "--assistant", "aurora", "--json"))
    [judged], [target] = traced["feedback"], traced["assistants"]
    assert (judged["feedback_id"], judged["expected_response"]) == (kept.json()["feedback_id"], CORRECTION)
    assert (target["state"], target["source"]) == ("kept", "corrected")
    assert target["place"] == f"{found[0][0]}.jsonl:{found[0][1] + 1}"


def test_people_compare_what_a_shadow_would_have_said(tmp_path: Path) -> None:
    """Live and shadow replies as blind pairs on the router's own page; what is chosen is a preference of the data set."""
    upstream = Upstream()
    try:
        shop = Shop(tmp_path, upstream=upstream.url)
        version = shop.version("a")
        shop.roll_out(version)
        with shop.served("--no-judge") as served:
            first = served.ask("Hola", user="ana")
            said = [("user", "Hola"), ("assistant", first.json()["choices"][0]["message"]["content"]), ("user", "¿Y mañana?")]
            served.ask(user="ana", messages=[{"role": role, "content": text} for role, text in said])

            def answered_unseen() -> bool:
                with shop.ledger() as ledger, ledger.engine.connect() as connection:
                    return connection.execute(sa.select(sa.func.count()).select_from(shadow_replies)).scalar() == 2

            assert wait_for(answered_unseen)
            start = ["rating", "start", "--assistant", "aurora", "--name", "unseen", "--against", "live", "--rater", "eva"]
            link = finetune(shop, *start, "--url", served.url).split()[-1]
            made = study.load(Store(shop.home), "aurora", "unseen")
            assert (made.version, made.candidates, len(made.items)) == (version, ["tuned", "live"], 2)
            longer = max(made.items, key=lambda item: len(item.context))
            assert [turn["content"] for turn in longer.context] == [text for _, text in said]
            item = made.item(made.raters["eva"][0])
            page = served.client.get(link)
            assert all(reply in unescape(page.text) for reply in item.replies.values())
            assert version not in re.sub("<[^>]*>", "", page.text.replace(item.replies["tuned"], ""))  # blind
            form = {"link": httpx.URL(link).params["link"], "item": item.item, "choice": "left", "started": "1"}
            assert served.client.post("/rate", data=form).status_code == 303
    finally:
        upstream.close()
    with shop.ledger() as ledger:
        (rated,) = book.of_study(ledger.engine, "aurora", "unseen")
        assert rated.choice == made.sides(item, "eva")[0]
        pairs = ratings_of(Store(shop.home), ledger.engine, "aurora").pairs
    assert pairs.select("message_id", "chosen").rows() == [(item.message_id, item.replies[rated.choice])]
