"""What is left of personal data in frozen files is told by its place and kind, never by its value."""

from __future__ import annotations

import json
from pathlib import Path

from finetune_assets.dataset.formats import FILES
from finetune_assets.dataset.residual import personal_data_left
from finetune_assets.dataset.selection import Left


def test_places_and_kinds_but_no_values(tmp_path: Path) -> None:
    for spec in FILES:
        (tmp_path / spec.name).write_text("")
    system = {"role": "system", "content": "Llama al +34 910 200 345."}
    rows = [
        [system, {"role": "user", "content": "hola"}, {"role": "assistant", "content": "el 25/10/2026 a las 10:30, [PHONE]"}],
        [system, {"role": "user", "content": "mi correo:\nana@example.org"}, {"role": "assistant", "content": "ok"}],
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    pair = {"prompt": rows[0][1:2], "chosen": [{"role": "assistant", "content": "Somos el +34 910 200 345"}], "rejected": []}
    (tmp_path / "preferences.jsonl").write_text(json.dumps(pair) + "\n")
    assert personal_data_left(tmp_path) == (["train.jsonl:2 email", "preferences.jsonl:1 phone"], 3)
    assert personal_data_left(tmp_path, Left(frozenset({"+34 910 200 345"}))) == (["train.jsonl:2 email"], 3)
