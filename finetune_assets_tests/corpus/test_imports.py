"""Files of every form become the same conversations, wherever they stand; what cannot be read is named, and nothing fails."""

from __future__ import annotations

import csv
import json
import re
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from finetune_assets.cli import main
from finetune_assets.corpus import imports
from finetune_assets.corpus.examples import build_examples
from finetune_assets.corpus.forms import REASONS, Unusable, parsed_call, record_of
from finetune_assets.corpus.ingest import ingest_conversations, ingest_feedback, stale_weeks
from finetune_assets.corpus.row_files import SUFFIXES
from finetune_assets.corpus.sources import read_source
from finetune_assets.corpus.validation import validate
from finetune_assets.errors import SourceError
from finetune_assets.storage import Store
from finetune_assets_tests.corpus.exports import KEY, export, write

ORIGIN = imports.Origin(tenant="clinic_a", vertical="dental", date=date(2026, 10, 21))
TURNS = (("user", "¿Cuánto cuesta?"), ("assistant", "Son 30 euros."))
FORMS: dict[str, dict[str, Any]] = {
    "messages": {"messages": [{"role": "system", "content": "Eres"}, *({"role": r, "content": c} for r, c in TURNS)]},
    "parts": {"messages": [{"role": r, "content": [{"type": "text", "text": c}]} for r, c in TURNS]},
    "prompt": {"prompt": TURNS[0][1], "completion": TURNS[1][1]},
    "prompt_messages": {
        "prompt": [{"role": "user", "content": TURNS[0][1]}],
        "completion": [{"role": "assistant", "content": TURNS[1][1]}],
    },
    "pair": {"user": TURNS[0][1], "assistant": TURNS[1][1]},
    "instruction": {"instruction": TURNS[0][1], "input": "", "output": TURNS[1][1]},
    "sharegpt": {
        "conversations": [
            {"from": "system", "value": "Eres"},
            {"from": "human", "value": TURNS[0][1]},
            {"from": "gpt", "value": TURNS[1][1]},
        ]
    },
    "log": {
        "timestamp": 1760000000,
        "workload_id": "chat",
        "client_id": "app",
        "request": {"model": "m", "messages": [{"role": "system", "content": "Eres"}, {"role": "user", "content": TURNS[0][1]}]},
        "response": {"choices": [{"message": {"role": "assistant", "content": TURNS[1][1]}, "finish_reason": "stop"}]},
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_says_the_same(form: str) -> None:
    assert record_of(FORMS[form]).turns == TURNS


@pytest.mark.parametrize(
    "output",
    [
        '[{"name":"book","arguments":{"people":2,"phone":34612345678}}]',
        {"tool": "book", "parameters": {"people": 2, "phone": 34612345678}},
        {"tool_calls": [{"function": {"name": "book", "arguments": '{"people": 2, "phone": 34612345678}'}}]},
    ],
)
def test_tool_calls_of_every_writing_are_one(output: Any) -> None:
    said = record_of({"instruction": "Reserva", "output": output}).turns[1][1]
    assert said == '{"tool_calls":[{"name":"book","arguments":{"people":2,"phone":"34612345678"}}]}'
    assert parsed_call(said) == {"tool_calls": [{"name": "book", "arguments": {"people": 2, "phone": "34612345678"}}]}


def test_a_function_call_of_sharegpt_is_a_tool_call() -> None:
    turns = [
        {"from": "human", "value": "Reserva"},
        {"from": "function_call", "value": '{"name":"book","arguments":{"people":2}}'},
        {"from": "observation", "value": "ok"},
    ]
    assert [role for role, _ in record_of({"conversations": turns}).turns] == ["user", "assistant", "user"]
    said = record_of({"conversations": turns}).turns[1][1]
    assert parsed_call(said) == {"tool_calls": [{"name": "book", "arguments": {"people": 2}}]}


def test_a_log_of_requests_is_whole_conversations_of_their_own_week() -> None:
    said = ["Hola", "Buenas, ¿qué necesita?", "Una cita el lunes", "¿A las 10?", "Sí", "Hecho."]
    messages = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(said)]

    def logged(turns: int, at: int, user: str) -> dict[str, Any]:
        return {
            "timestamp": at,
            "request": {"messages": messages[: turns - 1], "user": user},
            "response": {"choices": [{"message": messages[turns - 1]}]},
        }

    rows = [logged(2, 1760000000, "ana"), logged(4, 1760000060, "ana"), logged(6, 1760000120, "ana"), logged(6, 1760009999, "b")]
    for order in (rows, rows[::-1]):
        made = imports.tables_of(((str(row["timestamp"]), row) for row in order), ORIGIN)
        assert made.tables["conversations"]["user_id"].to_list() == ["ana"]
        assert made.tables["conversations"]["started_at"].dt.epoch("s").to_list() == [1760000120]
        assert made.tables["messages"].drop_nulls("content")["content"].to_list() == said
        assert sorted(problem.reason for problem in made.problems) == ["row_continued", "row_continued", "row_repeated"]


def test_preferences_and_labels_are_feedback(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "¿Abren los sábados por la mañana?"}]
    chosen, rejected = "Sí, los sábados abrimos de nueve a dos.", "No sabría decirle, llame otro día."
    rows = [
        {"prompt": "¿Tienen parking?", "chosen": "Sí, en la planta baja.", "rejected": "Eso no lo sé."},
        {
            "chosen": [*talk, {"role": "assistant", "content": chosen}],
            "rejected": [*talk, {"role": "assistant", "content": rejected}],
        },
        {"prompt": "¿Aceptan tarjeta?", "completion": "Claro que sí, todas.", "label": True},
        {"prompt": "¿Hacen descuento?", "completion": "Pregunte por ahí.", "label": "false"},
    ]
    made = imports.import_files([write_rows(tmp_path / "in", ".jsonl", rows)], tmp_path / "out", ORIGIN)
    assert made.added == 4
    store = Store(tmp_path / "home")
    source = read_source([str(tmp_path / "out")])
    ingest_conversations(store, source, ["2026-10-19"], KEY)
    ingest_feedback(store, source, ["2026-10-19"], KEY)
    given = pl.read_parquet(store.corpus("feedback", "2026-10-19") / "part.parquet").sort("expected_response", nulls_last=True)
    assert given["expected_response"].to_list() == ["Sí, en la planta baja.", chosen, None, None]
    assert sorted(given["feedback_type"].to_list()) == ["negative", "negative", "negative", "positive"]


TURN = {"prompt": "¿Abren hoy?", "completion": "No lo sé."}


@pytest.mark.parametrize(
    ("rows", "kept"),
    [
        ([{**TURN, "label": True}, {**TURN, "label": False}], ("negative", None)),
        (
            [{**TURN, "label": False, "timestamp": 1760000000}, {**TURN, "label": True, "timestamp": 1760000060}],
            ("positive", None),
        ),
        ([{**TURN, "timestamp": 10**9}, {**TURN, "label": True, "timestamp": 10**9 + 60}], ("positive", None)),
        (
            [{**TURN, "label": True}, {"prompt": TURN["prompt"], "chosen": "Sí, hasta las dos.", "rejected": TURN["completion"]}],
            ("negative", "Sí, hasta las dos."),
        ),
    ],
)
def test_of_rows_with_the_same_turns_the_feedback_counts_as_of_one_message(
    tmp_path: Path, rows: list[dict[str, Any]], kept: tuple[str, str | None]
) -> None:
    for number, order in enumerate((rows, rows[::-1])):
        made = imports.tables_of(((f"f:{n}", row) for n, row in enumerate(order)), ORIGIN)
        assert made.tables["feedback"].select("feedback_type", "expected_response").rows() == [kept]
        assert [problem.reason for problem in made.problems] == ["row_repeated"]
        for row in order:  # the same rows, each imported by itself
            imports.add(imports.tables_of(iter([("f:1", row)]), ORIGIN), tmp_path / str(number))
        there = pl.read_parquet(tmp_path / str(number) / "feedback.parquet")
        assert there.select("feedback_type", "expected_response").rows() == [kept]


def test_json_that_is_no_call_stays_a_text() -> None:
    assert record_of({"instruction": "Datos", "output": '{"name": "Ana"}'}).turns[1][1] == '{"name": "Ana"}'
    assert parsed_call('{"tool_calls": broken') is None


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ([1], "not_an_object"),
        ({"user": "hola"}, "form_unknown"),
        ({**FORMS["pair"], **FORMS["prompt"]}, "form_unknown"),
        ({"user": "hola", "assistant": ""}, "content_missing"),
        ({"user": "hola", "assistant": " "}, "content_missing"),
        ({"messages": []}, "content_missing"),
        ({"messages": "{"}, "json_invalid"),
        ({"messages": [{"role": "robot", "content": "hola"}]}, "role_unknown"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "content_unsupported"),
        ({"messages": [{"role": "user", "content": "hola"}]}, "no_reply"),
        ({"messages": [{"role": "assistant", "content": "hola"}]}, "no_user_turn"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]},
            "weight_zero",
        ),
        ({"instruction": "x", "output": {"tool_calls": [{"arguments": {}}]}}, "tool_call_invalid"),
        ({"conversations": [{"from": "alien", "value": "hola"}]}, "role_unknown"),
        ({"request": {"messages": [{"role": "user", "content": "hola"}]}, "response": {"choices": []}}, "content_missing"),
        ({"request": "{", "response": {}}, "json_invalid"),
        ({"prompt": "hola", "chosen": "a", "rejected": "a"}, "pair_equal"),
        ({"chosen": [{"role": "user", "content": "a"}], "rejected": [{"role": "user", "content": "a"}]}, "no_reply"),
    ],
)
def test_reasons(row: Any, reason: str) -> None:
    with pytest.raises(Unusable) as raised:
        record_of(row)
    assert raised.value.reason == reason
    assert reason in REASONS


words = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
json_values = st.recursive(
    words, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)
keys = st.sampled_from(
    [
        *("messages", "prompt", "completion", "user", "assistant", "instruction", "input", "output", "tools", "x"),
        *("conversations", "request", "response", "timestamp", "chosen", "rejected", "label"),
    ]
)
message = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "tool", "?"]), "content": words | st.lists(json_values, max_size=2)},
    optional={"tool_calls": json_values, "weight": st.integers(0, 1)},
)
rows = json_values | st.dictionaries(keys, json_values | st.lists(message, max_size=4), max_size=4)


@given(st.lists(rows, max_size=12), st.randoms(use_true_random=False))
def test_any_row_is_taken_or_named_whatever_the_order(given_rows: list[Any], draw: Any) -> None:
    def tables(of: list[Any]) -> imports.Converted:
        return imports.tables_of(((f"f:{n}", row) for n, row in enumerate(of)), ORIGIN)

    made = tables(given_rows)
    assert made.read == made.rows + len(made.problems)
    assert {problem.reason for problem in made.problems} <= set(REASONS)
    again = tables(draw.sample(given_rows, len(given_rows)))
    ids = [set(one.tables["conversations"]["conversation_id"]) for one in (made, again)]
    assert ids[0] == ids[1]


def write_rows(folder: Path, suffix: str, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"rows{suffix}"
    if suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif suffix == ".parquet":
        pl.DataFrame(rows).write_parquet(path)
    else:
        text = json.dumps(rows) if suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows)
        path.write_text(text, encoding="utf-8")
    return path


def stored(tmp_path: Path, source: Path) -> tuple[pl.DataFrame, dict[str, Any]]:
    """Examples of a source, and the numbers of its conversations' week."""
    store, tables = Store(tmp_path), read_source([str(source)])
    weeks = stale_weeks(store, tables).stale
    counts = ingest_conversations(store, tables, weeks, KEY)
    build_examples(store, weeks)
    assert weeks == ["2026-10-19"]
    return pl.read_parquet(store.corpus("examples", weeks[0]) / "part.parquet"), counts[weeks[0]]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_of_any_kind_is_a_source(tmp_path: Path, suffix: str) -> None:
    rows = [{"user": f"Pregunta {n}\nde dos líneas", "assistant": f"Respuesta {n}"} for n in range(5)]
    rows.append({"user": "Mi correo es ana@example.org", "assistant": "Gracias, Ana."})
    rows.append({"user": "sin respuesta", "assistant": ""})
    folder = write_rows(tmp_path / "own", suffix, rows).parent
    (folder / "source.yaml").write_text("tenant: clinic_a\nvertical: dental\ndate: 2026-10-21\n", encoding="utf-8")
    imports.import_files([folder / f"rows{suffix}"], tmp_path / "imported", ORIGIN)
    own, counts = stored(tmp_path / "one", folder)
    assert own.equals(stored(tmp_path / "two", tmp_path / "imported")[0])
    assert set(own["kind"]) == {"imported"}
    assert own["user_text"].to_list().count("Mi correo es [EMAIL]") == 1
    assert counts["kept"]["conversations"] == 6
    assert counts["rejected_by_reason"]["messages"] == {"content_missing": 1}


@pytest.mark.parametrize(
    "value",
    [
        1760000000,
        1760000000.0,
        "1760000000",
        1760000000000,
        "2025-10-09T08:53:20Z",
        "2025-10-09 10:53:20+02:00",
        datetime(2025, 10, 9, 8, 53, 20, tzinfo=UTC),
    ],
)
def test_a_timestamp_is_read_in_every_writing(value: Any) -> None:
    record = record_of({**FORMS["pair"], "timestamp": value})
    assert (record.seconds, record.left_aside) == (1760000000, ())


@pytest.mark.parametrize("value", [True, "2025-10-09T08:53:20", "ayer", 5, -1, 10**18, 10**400, float("nan"), [1], "20251009"])
def test_a_timestamp_that_is_no_time_is_left_aside_and_counted(value: Any) -> None:
    record = record_of({**FORMS["pair"], "timestamp": value})
    assert (record.seconds, record.left_aside) == (None, ("timestamp",))


def test_a_label_that_is_no_thumb_is_left_aside_and_counted(tmp_path: Path) -> None:
    rows = [{**FORMS["pair"], "label": "maybe", "timestamp": "ayer"}, {"user": "Hola", "assistant": "Buenas", "label": "true"}]
    made = imports.import_files([write_rows(tmp_path, ".jsonl", rows)], tmp_path / "to", ORIGIN)
    assert made.converted.left_aside == {"label": 1, "timestamp": 1}
    command = ["import", str(tmp_path / "rows.jsonl"), "--to", str(tmp_path / "to"), "--tenant", "clinic_a"]
    done = CliRunner().invoke(main, [*command, "--vertical", "dental", "--date", "2026-10-21"])
    assert "1 rows had a label that is neither true nor false, left aside." in done.stdout


@pytest.mark.parametrize("separator", [";", "\t", "|"])
def test_a_csv_of_another_separator_names_it(tmp_path: Path, separator: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(f"user{separator}assistant\nHola, buenas{separator}Sí, dígame\n", encoding="utf-8")
    with pytest.raises(SourceError, match=f"separates its fields by {re.escape(repr(separator))}"):
        imports.convert([("rows.csv", path)], ORIGIN)
    folder = write(tmp_path / "export", export(), ".csv")
    csv_text = (folder / "messages.csv").read_text(encoding="utf-8")
    (folder / "messages.csv").write_text(csv_text.replace(",", separator), encoding="utf-8")
    with pytest.raises(SourceError, match=f"messages.csv separates its fields by {re.escape(repr(separator))}"):
        read_source([str(folder)])


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_a_file_that_is_not_utf8_is_named_by_line(tmp_path: Path, suffix: str) -> None:
    rows = [{"user": "¿Qué año?", "assistant": "2026"}, {"user": "Hola", "assistant": "Buenas"}]
    path = tmp_path / f"chats{suffix}"
    if suffix == ".csv":
        text = "user,assistant\n" + "".join(f"{row['user']},{row['assistant']}\n" for row in rows)
    else:
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        text = f"[{','.join(lines)}]" if suffix == ".json" else "\n".join(lines)
    path.write_bytes(text.encode("latin-1"))
    made = imports.convert([(path.name, path)], ORIGIN)
    line = 2 if suffix == ".csv" else 1
    assert [(problem.place, problem.reason) for problem in made.problems] == [(f"chats{suffix}:{line}", "text_broken")]
    assert "byte 0xBF is not UTF-8" in made.problems[0].detail
    assert "save the file as UTF-8" in made.problems[0].detail
    assert made.rows == 1
    path.write_bytes(text.encode("utf-16"))
    with pytest.raises(SourceError, match="UTF-16; save it as UTF-8"):
        imports.convert([(path.name, path)], ORIGIN)


def test_what_the_run_rejects_as_broken_text_is_unusable(tmp_path: Path) -> None:
    rows = [
        {"user": "NUL\0 aquí", "assistant": "Sí"},
        {"user": "Medio emoji \ud83d", "assistant": "Sí"},
        {"user": "Ya perdida: a\ufffdo", "assistant": "Sí"},
        {"user": "De alguien", "assistant": "Sí", "user_id": "ana\0"},
        {"prompt": "Corregida", "chosen": "S\ufffd", "rejected": "No"},
        {"user": "Entera 💀", "assistant": "Sí"},
    ]
    folder = write_rows(tmp_path / "own", ".jsonl", rows).parent
    made = imports.import_files([folder / "rows.jsonl"], tmp_path / "to", ORIGIN)
    assert [(problem.place, problem.reason) for problem in made.converted.problems] == [
        (f"rows.jsonl:{line}", "text_broken") for line in range(1, 6)
    ]
    valid = validate(read_source([str(tmp_path / "to")]))
    assert (valid.conversations.height, valid.messages.height, valid.rejected.height) == (1, 2, 5)


def test_again_adds_nothing_and_a_kill_between_two_writes_is_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_rows(tmp_path, ".jsonl", [{"user": f"Pregunta {n}", "assistant": "Sí"} for n in range(4)])
    real, written = imports.write_parquet, list[Path]()

    def dies(target: Path, frame: pl.DataFrame) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(target)
        real(target, frame)

    monkeypatch.setattr(imports, "write_parquet", dies)
    with pytest.raises(KeyboardInterrupt):
        imports.import_files([path], tmp_path / "to", ORIGIN)
    monkeypatch.undo()
    done = imports.import_files([path], tmp_path / "to", ORIGIN)
    files = {file.name: file.read_bytes() for file in (tmp_path / "to").glob("*.parquet")}
    again = imports.import_files([path, path], tmp_path / "to", ORIGIN)
    assert (done.added, again.added, again.already_there) == (4, 0, 4)
    assert pl.read_parquet(tmp_path / "to" / "messages.parquet").filter(pl.col("problem").is_null()).height == 8
    assert {name: (tmp_path / "to" / name).read_bytes() for name in files if name != "messages.parquet"} == {
        name: content for name, content in files.items() if name != "messages.parquet"
    }


def test_a_folder_of_real_exports_is_left_alone(tmp_path: Path) -> None:
    folder = write(tmp_path / "real", export())
    path = write_rows(tmp_path, ".jsonl", [FORMS["pair"]])
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(SourceError, match="no import wrote"):
        imports.import_files([path], folder, ORIGIN)
    assert {file.name: file.read_bytes() for file in folder.iterdir() if file.name[0] != "."} == before


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("tenant: a\nvertical: b\n", "date: Field required"),
        ("tenant: a\nvertical: b\ndate: 2026-10-21\nform: chat\n", "'chat' is unknown"),
        ("tenant: a\nvertical: b\ndate: 2026-10-21\nfile: x\n", "file: Extra inputs"),
        ("[", "cannot be read as YAML"),
        ("tenant: a\nvertical: b\ndate: 2026-10-21\n", "is empty"),
    ],
)
def test_what_a_source_yaml_gets_wrong(tmp_path: Path, settings: str, said: str) -> None:
    (tmp_path / "source.yaml").write_text(settings, encoding="utf-8")
    with pytest.raises(SourceError, match=said):
        read_source([str(tmp_path)])


def test_command(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text(f"{json.dumps(FORMS['pair'])}\nbroken\n[]\n", encoding="utf-8")
    given_arguments = [
        "import",
        str(path),
        "--to",
        str(tmp_path / "to"),
        "--tenant",
        "a",
        "--vertical",
        "b",
        "--date",
        "2026-10-21",
    ]
    run = CliRunner().invoke
    strict = run(main, [*given_arguments, "--strict"])
    assert strict.exit_code == 1
    assert not (tmp_path / "to").exists()
    done = run(main, [*given_arguments, "--json"])
    assert done.exit_code == 0
    assert json.loads(done.stdout)["added"] == 1
    assert "chats.jsonl:2: json_invalid" in done.stderr
    assert "chats.jsonl:3: not_an_object" in done.stderr
    path.write_text("broken\n", encoding="utf-8")
    none = run(main, given_arguments)
    assert none.exit_code == 1
    assert "None of 1 rows can be imported" in none.stderr
    assert run(main, [*given_arguments, "--form", "chat"]).exit_code == 2
    missing = run(main, ["import", str(tmp_path / "no.jsonl"), *given_arguments[2:]])
    assert missing.exit_code == 1
    assert "cannot be read" in missing.stderr
