"""From a correction to the next data set: what a user says on Monday is trained on in the next run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from finetune_assets.environment import ROOT
from finetune_assets_tests.serving.shop import Shop, Upstream

CORRECTION = "Sí, mañana a las 10:15 hay hora con la doctora; dígame su nombre y la dejo anotada."


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_correction_is_in_the_next_data_set(tmp_path: Path) -> None:
    upstream = Upstream()
    try:
        shop = Shop(tmp_path, upstream=upstream.url)
        shop.version("a")
        with shop.served("--no-judge") as served:
            answer = served.ask("¿Tienen una hora libre mañana por la mañana para una limpieza?", user="+59170012345")
            sent = {"request_id": answer.json()["id"], "feedback_type": "negative", "expected_response": CORRECTION}
            assert served.client.post("/feedback", json=sent).status_code == 202
    finally:
        upstream.close()
    settings = shop.assistants / "aurora.yaml"
    settings.write_text(settings.read_text() + "min_examples: 20\n")
    environment = {**shop.environment, "FINETUNE_SOURCE": f"data/sample,{shop.url}"}
    command = [sys.executable, "-m", "finetune_assets.cli", "run", "--assistant", "aurora", "--until", "jsonl_splits", "--json"]
    made = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    folder = Path(json.loads(made.stdout)["made"])
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
