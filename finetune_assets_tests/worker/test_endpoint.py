"""Endpoints as they are: slow, busy, broken; on a real HTTP server. And the candidates that need more than a prompt."""

from __future__ import annotations

import json
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

import polars as pl
import pytest

from finetune_assets import once
from finetune_assets.assistants.settings import Assistant
from finetune_assets.assistants.settings.evaluation import Gates
from finetune_assets.environment import ROOT
from finetune_assets.errors import SettingsError
from finetune_assets.evaluation import benchmark, candidates, card, report, verdicts
from finetune_assets.evaluation.language import language_of
from finetune_assets.evaluation.measured import measure
from finetune_assets.evaluation.suite import Case
from finetune_assets.evaluation.texts import Texts
from finetune_assets.storage import read_json, write_json
from finetune_assets.worker import benchmark as worker
from finetune_assets.worker import endpoint, guards, measuring
from finetune_assets.worker.generate import Generator
from finetune_assets.worker.progress import Progress
from finetune_assets_tests.evaluation.frozen import benchmarked, make_dataset
from finetune_assets_tests.loopback import Handler, served
from finetune_assets_tests.tiny_model import dialogues, make_tiny_model

SEEN: Counter[str] = Counter()


class Provider(Handler):
    """Does what the user's text asks for; otherwise it answers."""

    def answer(self, body: dict[str, Any]) -> None:  # noqa: PLR0911 - one return a request
        text = body["messages"][-1]["content"]
        SEEN[text] += 1
        SEEN["key"] += self.headers.get("Authorization") == "Bearer secret"
        if "slow" in text:
            threading.Event().wait(1.0)
        if "busy" in text and SEEN[text] < 3:
            return self.say(429, b"", {"Retry-After": "0.05"})
        if "always busy" in text:
            return self.say(429, b"", {"Retry-After": "0.01"})
        if "soon" in text and SEEN[text] < 2:
            return self.say(503, b"", {"Retry-After": "0.01"})
        if "broken" in text:
            return self.say(500, b"")
        if "refused" in text:
            return self.say(400, b"{}")
        if "gone" in text:
            return self.say(404, b"{}")
        if "garbage" in text:
            return self.say(200, b"<html>oops</html>")
        if "null" in text:
            return self.say(200, json.dumps({"choices": [{"message": {"content": None}}]}).encode())
        said = "la cita " * 1_250 if "largo" in text else f" Con gusto. {text} "
        if "Better reply (A, B or T):" in text:
            said = "A"  # one that likes the first place
        if "Does the reply do so (Y or N)?" in text:
            said = "I cannot say" if "brinda" in text else "N." if "canta" in text else "Y"
        answer = {
            "choices": [{"message": {"content": said}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 100, "completion_tokens": 10},
        }
        if body["model"] == "uncounted":
            del answer["usage"], answer["choices"][0]["finish_reason"]
        return self.say(200, json.dumps(answer).encode())


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with served(Provider) as address:
        yield address


def ask(where: endpoint.Endpoint, *texts: str) -> list[dict]:
    return endpoint.answers(where, [[{"role": "user", "content": text}] for text in texts], 16)


def test_what_cannot_be_had_is_missing_never_empty(url: str):
    texts = ["hola", "slow", "busy", "always busy", "soon", "broken", "refused", "garbage", "null"]
    found = dict(zip(texts, ask(endpoint.Endpoint(url, "m", timeout=0.5), *texts), strict=True))
    assert found["hola"]["reply"] == "Con gusto. hola"
    assert found["hola"]["prompt_tokens"] == 100
    assert None not in (found["busy"]["reply"], found["soon"]["reply"])
    missing = {name: one["missing"] for name, one in found.items() if one["reply"] is None}
    assert missing == {
        "slow": "no answer within 0.5 s",
        "always busy": "status 429",
        "broken": "status 500",
        "refused": "status 400",
        "garbage": "not an answer: JSONDecodeError",
        "null": "not an answer: TypeError",
    }
    assert [SEEN[text] for text in ("slow", "broken", "refused", "garbage", "null")] == [1] * 5
    assert SEEN["always busy"] == once.TRIES
    [gone] = ask(endpoint.Endpoint(url, "ft:m:1"), "gone")
    assert f"status 404: {url} has no model ft:m:1. Look there" in gone["missing"]
    perhaps = [text for text, one in found.items() if "perhaps" in one]  # paid for as far as anybody knows
    assert perhaps == ["slow", "broken", "garbage", "null"]
    used = endpoint.bought([found[text] for text in ("hola", "slow", "always busy", "refused")])
    assert (used["prompt_tokens"] > 100, used["reply_tokens"]) == (True, 10 + 16)


class Counting(Handler):
    """Answers when four wait, or in half a second; remembers how many waited together."""

    together = threading.Barrier(4)
    waiting = most = 0
    lock = threading.Lock()

    def answer(self, body: dict[str, Any]) -> None:
        with Counting.lock:
            Counting.waiting += 1
            Counting.most = max(Counting.most, Counting.waiting)
        with suppress(threading.BrokenBarrierError):
            Counting.together.wait(0.5)
        with Counting.lock:
            Counting.waiting -= 1
        self.say(200, json.dumps({"choices": [{"message": {"content": "hola"}}]}).encode())


def test_four_are_asked_at_once_and_the_reader_is_told():
    with served(Counting) as address:
        ask(endpoint.Endpoint(address, "m"), *"abcdefgh")
    assert Counting.most == 4
    row = next(line for line in (ROOT / "docs" / "evaluation.md").read_text().splitlines() if line.startswith("| wait, "))
    for told in (row, Texts("en")("help.seconds_p50"), Texts("en")("limit.machine")):
        assert "four requests at once" in told
    for told in ("help.seconds_p95", "limit.machine"):
        assert "cuatro a la vez" in Texts("es")(told)


@pytest.mark.parametrize(("language", "spoken"), [("es", "es"), ("en", "en"), ("pt", "es")])
def test_everyday_talk_of_a_language_is_what_the_page_says(
    language: str, spoken: str, made: tuple[Path, Path, Assistant], tmp_path: Path
):
    assistant = Assistant(name="dental", select={"vertical": "dental"}, language=language)
    benchmark.prepare(assistant, made[1], [candidates.Plain("base", "m")], tmp_path)
    chats = [json.loads(line)["messages"] for line in (tmp_path / "general.jsonl").read_text().splitlines()]
    told = [language_of(turn["content"]) for chat in chats for turn in chat]
    assert max(("es", "en", "pt"), key=told.count) == spoken
    page = (ROOT / "docs" / "evaluation.md").read_text()
    assert "English ones for `language: en`, else Spanish ones" in page


def test_an_endpoint_that_counts_no_tokens_has_none(url: str):
    found = ask(endpoint.Endpoint(url, "uncounted"), "hola")[0]
    assert (found["reply"], found["prompt_tokens"], found["reply_tokens"]) == ("Con gusto. hola", None, None)
    assert found["stopped"] is None  # nor does it tell how the reply ended
    assert ask(endpoint.Endpoint(url, "m"), "hola")[0]["stopped"] is True


def test_nobody_listens(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(endpoint.time, "sleep", lambda _seconds: None)
    assert ask(endpoint.Endpoint("http://127.0.0.1:9/v1", "m"), "hola")[0]["missing"] == "ConnectError"


def test_the_key_comes_from_its_variable(url: str, monkeypatch: pytest.MonkeyPatch):
    where = endpoint.Endpoint(url, "m", "A_PROVIDERS_KEY")
    with pytest.raises(SettingsError, match="A_PROVIDERS_KEY is not set"):
        ask(where, "hola")
    monkeypatch.setenv("A_PROVIDERS_KEY", "secret")
    before = SEEN["key"]
    ask(where, "hola")
    assert SEEN["key"] == before + 1


@pytest.fixture(scope="module")
def made(url: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Assistant]:
    """A benchmark with every kind of candidate; some of the endpoint's rows are missing."""
    folder = tmp_path_factory.mktemp("every")
    chats = dialogues(10, seed=8)
    chats[0][-2]["content"] = "garbage"
    chats[1][-2]["content"] = "refused, una cita"
    chats[2][-2]["content"] = "largo, una cita"
    chats[3][-1]["content"] = ""  # a reference that says nothing
    dataset = make_dataset(folder / "data", rows={"test": chats})
    documents = folder / "documents"
    (documents / "clinic_a").mkdir(parents=True)
    (documents / "clinic_a" / "precios.md").write_text("Una limpieza cuesta 55 €.\n\nAbrimos los lunes.")
    suite = folder / "suite"
    suite.mkdir()
    (suite / "cases.yaml").write_text(
        "- {name: habla, prompt: hola, regex: '.', tenant: clinic_a}\n- {name: clave, prompt: hola, not_contains: QX-1}\n"
        "- {name: saluda, prompt: hola, judge: saluda}\n- {name: canta, prompt: hola, judge: canta}\n"
        "- {name: brinda, prompt: hola, judge: brinda}\n"
    )
    prices = {"usd_per_million_input": 1.0, "usd_per_million_output": 2.0, "priced_on": "2026-11-01"}
    assistant = Assistant(
        name="dental",
        select={"vertical": "dental"},
        budget={"usd_per_hour": 0.5},
        rules=[{"name": "says something", "min_chars": 1}],
        benchmark={
            "max_rows": 10,
            "max_new_tokens": 12,
            "documents": str(documents),
            "checks": str(suite),
            "endpoints": [
                {"name": "gpt", "url": url, "model": "m", "timeout": 1, **prices},
                {"name": "free", "url": url, "model": "n"},
                {"name": "uncounted", "url": url, "model": "uncounted", **prices},
            ],
            "canaries": [{"user": "clave", "secret": "QX-48213"}],
            "judge": {"url": url, "model": "judge", "rows": 4, "against": "gpt"},
        },
    )
    base, champion = (
        str(make_tiny_model(folder / name, context=256, seed=seed)) for name, seed in (("base", 0), ("champion", 2))
    )
    tuned = str(ROOT / "data" / "base_model")  # it has been trained: its replies hold words
    benchmarked(assistant, dataset, candidates.standard(dataset, base, tuned, assistant.benchmark, champion), folder / "out")
    return folder, dataset, assistant


def test_every_candidate_is_measured_and_shown(made: tuple[Path, Path, Assistant]):
    folder, dataset, assistant = made
    about = benchmark.Made("v2", dataset, {"seconds": 90.0}, champion="v1", requests_per_month=30_000)
    found = benchmark.summarise(assistant, folder / "out", about)
    assert list(found["candidates"]) == ["base", "few_shot", "rag", "champion", "tuned", "tuned_rag", "free", "gpt", "uncounted"]
    assert found["models"]["gpt"]["missing"] == {"not an answer: JSONDecodeError": 1, "status 400": 1}
    gpt = found["candidates"]["gpt"]
    assert gpt["bits_per_byte"]["value"] is None
    assert gpt["empty"]["value"] == 0
    assert gpt["repeated"]["value"] == pytest.approx(1 / 8)  # a reply of 10,000 characters, of eight that came
    assert gpt["usd_per_1000"]["value"] == pytest.approx(0.12)
    assert found["candidates"]["free"]["usd_per_1000"]["value"] is None  # no price, no zero
    for unknown in ("usd_per_1000", "tokens_per_second"):
        assert found["candidates"]["uncounted"][unknown]["value"] is None
    assert found["decision"]["monthly"]["uncounted"] is None
    assert found["decision"]["break_even"]["uncounted"] is None
    assert found["decision"]["monthly"]["gpt"] == pytest.approx(3.6)
    assert found["differences"]["tuned_vs_gpt"]["chrf"]["value"] is not None
    assert found["champion"] == "v1"
    (rule,) = found["rules"]
    assert rule["candidates"]["gpt"] == 1.0  # what did not come breaks none
    assert all(one["candidates"]["gpt"] in (1.0, None) for one in found["rules_by_intent"])
    assert rule["applies"] == 9  # of ten references one is empty
    json.dumps(found, allow_nan=False)
    scores = [one["chrf"] for one in found["samples"]["best"] + found["samples"]["worst"]]
    assert scores[:3] == sorted(scores[:3], reverse=True)
    assert found["facts"]["rows"] == 10
    gates = {gate["name"]: gate["outcome"] for gate in found["gates"]}
    assert gates["parity"] == "passed"
    assert gates["canaries"] == "passed"
    assert "not_worse_than_champion" in gates
    assert {one["case"]: one["passed"] for one in found["checks"]} == {
        "habla": True,
        "clave": True,
        "saluda": True,
        "canta": False,
        "brinda": None,  # the judge says neither: not judged, no failure
    }
    for name in ("gpt", "free", "tuned"):
        assert found["candidates"][name]["checks"]["value"] == 1
        assert found["checks_judged"][name] == {"held": 1, "told": 2}
    assert gates["checks"] == "passed"  # what the judge denies is shown, and fails nothing
    assert found["judge"]["asked"] == 4
    assert found["judge"]["first_place"]["value"] == 1.0  # its bias is told,
    assert found["judge"]["win_rate"]["value"] == 0.5  # and decides nothing
    assert found["judge"]["agreement"] is None
    bought = read_json(folder / "out" / "result.json")["judge_bought"]
    assert bought["prompt_tokens"] > bought["reply_tokens"] > 0  # what the month is held against
    page = report.html(found)
    assert "Costo" in page or "cuestan" in page
    assert "2 de 10 filas sin respuesta" in page


def test_the_page_tells_the_champion_the_month_and_the_judge(made: tuple[Path, Path, Assistant]):
    folder, dataset, assistant = made
    about = benchmark.Made("v2", dataset, {"seconds": 90.0}, champion="v1", requests_per_month=30_000)
    found = benchmark.summarise(assistant, folder / "out", about)
    page = report.html(found)
    assert page.count("365,25") == 2  # an always-on machine at half a dollar an hour
    assert "Qué cambió frente al campeón" in page
    assert "Diferencia con el campeón" in report.markdown(found)
    told = card.model_card(read_json(dataset / "manifest.json"), {}, found)
    assert "Tuned less champion" in told
    assert "()" not in told  # a number without an interval has no brackets
    assert found["candidates"]["tuned"]["seconds_p95"]["low"] is None  # of ten replies
    assert page.count("según el modelo juez") == 2
    assert "1 de 2</td>" in page
    found["judge"]["missing"] = 1
    assert "de 3 pares" in report.html(found)  # those that have a verdict


def test_each_option_is_judged_by_what_can_be_measured_on_it(made: tuple[Path, Path, Assistant]):
    folder, dataset, assistant = made
    about, result = benchmark.Made("v2", dataset, {"train_loss": 9.0}), read_json(folder / "out" / "result.json")
    rows = [candidates.TestRow(**row) for row in read_json(folder / "out" / "rows.json")["rows"]]
    found = measure(assistant, folder / "out", rows, result, about, benchmark.suite_of(assistant))
    loose = {name: None for name, field in Gates.model_fields.items() if type(None) in get_args(field.annotation)}
    gates = Gates(**loose | {"above_similarity_floor": False, "canaries": False, "keeps_details": False})

    def judged(option: str, **wanted: float | None) -> str | None:
        settings = assistant.model_copy(update={"gates": gates.model_copy(update=wanted)})
        told = verdicts.of_option(settings, about, found, {"verdict": "serve", "reasons": []}, option)
        return told["verdict"] if told else None

    assert judged("rag") is None  # nothing is asked
    assert judged("rag", max_training_loss=2.0) is None  # it was not trained
    assert judged("tuned_rag", max_training_loss=2.0) == "do_not_serve"
    assert judged("rag", max_reply_seconds=1e-9) == "do_not_serve"
    assert judged("rag", max_reply_seconds=1e9) == "serve"
    assert judged("tuned", max_reply_seconds=1e-9) == "serve"  # the report's own


def test_a_rented_model_is_judged_by_what_came_and_what_cannot_be_measured_is_told(
    made: tuple[Path, Path, Assistant], tmp_path: Path
):
    """The tuned model behind an address: two of ten rows missing, no likelihoods."""
    folder, dataset, assistant = made
    shutil.copytree(folder / "out", tmp_path / "out")
    result = read_json(tmp_path / "out" / "result.json")
    result["candidates"]["tuned"] = result["candidates"]["gpt"]
    write_json(tmp_path / "out" / "result.json", result)
    found = benchmark.summarise(assistant, tmp_path / "out", benchmark.Made("v2", dataset))
    gates = {gate["name"]: gate for gate in found["gates"]}
    unmeasured = {"perplexity", "training_loss", "forgetting", "overfitting", "parity"}
    assert unmeasured <= {name for name, gate in gates.items() if gate["outcome"] == "not_applicable"}
    assert gates["canaries"]["outcome"] == "passed"  # asked, and not said
    assert "probabilidades" in gates["canaries"]["reason"]
    assert {gates[name]["outcome"] for name in ("empty", "personal_data", "rules")} == {"cannot_tell"}
    assert found["verdict"] == "cannot_tell"
    assert any("8 de 10 filas" in reason for reason in found["reasons"])
    shown = [one["replies"]["tuned"] for group in ("best", "worst") for one in found["samples"][group]]
    assert shown
    assert all(reply["reply"] is not None for reply in shown)
    random = [one["replies"]["tuned"] for one in found["samples"]["random"]]
    assert [reply["broken"] for reply in random if reply["reply"] is None] == [[]]  # of one conversation: one is shown
    assert "no se puede medir en un modelo remoto" in report.html(found)
    frame = pl.read_parquet(tmp_path / "out" / "gpt.parquet")
    none = {"reply": None, "seconds": None, "prompt_tokens": None, "reply_tokens": None, "missing": "status 429"}
    result["candidates"]["tuned"] |= {"checks": [None] * 5, "canaries": [{"rank": None, "of": None, "said": None}]}
    frame.with_columns(pl.lit(value, frame.schema[name]).alias(name) for name, value in none.items()).write_parquet(
        tmp_path / "out" / "gpt.parquet"
    )
    write_json(tmp_path / "out" / "result.json", result)
    found = benchmark.summarise(assistant, tmp_path / "out", benchmark.Made("v2", dataset))  # nothing came at all
    assert found["verdict"] == "cannot_tell"
    assert not [gate["name"] for gate in found["gates"] if gate["outcome"] in ("passed", "failed")]
    assert found["samples"]["best"] == found["samples"]["worst"] == []
    json.dumps(found, allow_nan=False)
    report.html(found)
    assert result["candidates"]["gpt"]["bought"]["prompt_tokens"] > 0


def test_a_secret_that_does_not_fit_has_no_rank(made: tuple[Path, Path, Assistant]):
    folder, _, _ = made
    generator = Generator(str(folder / "base"), 8)
    long, short = ({"user": "clave", "reply": "ya " * n + "{secret}", "secret": "QX-48213"} for n in (400, 1))
    assert [one["rank"] is None for one in guards.canaries(generator, [long, short])] == [True, False]


def test_retrieved_replies_cite_their_sources(made: tuple[Path, Path, Assistant]):
    folder, _, _ = made
    frame = pl.read_parquet(folder / "out" / "rag.parquet")
    assert frame["sources"].list.len().min() >= 1
    cited = {source for row in frame["sources"] for source in row}
    assert all(source.startswith(("example:train_m", "document:")) for source in cited)
    passages = {
        p["source"]: p["tenant_id"] for p in map(json.loads, (folder / "out" / "passages.jsonl").read_text().splitlines())
    }
    tenants = [json.loads(line)["tenant_id"] for line in (folder / "out" / "prompts" / "rag.jsonl").read_text().splitlines()]
    for tenant, sources in zip(tenants, frame["sources"], strict=True):
        assert {passages[source] for source in sources} <= {tenant, None}
    facts = read_json(folder / "out" / "result.json")["candidates"]["rag"]["retrieval"]
    assert facts["chosen_on"]["rows"] == 5
    assert len(facts["chosen_on"]["bits_per_byte"]) == 4


def test_the_standing_suite_is_asked_as_the_test_rows_are(made: tuple[Path, Path, Assistant], monkeypatch: pytest.MonkeyPatch):
    folder, dataset, assistant = made
    output, asked, say = folder / "suite_asked", [], measuring._say

    def listening(generator: Any, cases: list[dict[str, Any]]) -> list[str]:
        asked.append(cases)
        return say(generator, cases)

    monkeypatch.setattr(measuring, "_say", listening)
    spec = read_json(folder / "out" / "spec.json") | {"output": str(output), "cache": str(output / "cache"), "judge": None}
    spec["candidates"] = [one for one in spec["candidates"] if one["name"] in ("base", "few_shot", "rag", "tuned_rag")]
    facts = worker.run(spec, Progress.open(output))["candidates"]
    assert {len(one["checks"]) for one in facts.values()} == {5}  # each case, by every candidate
    base, few_shot, rag, tuned_rag = ([case["messages"] for case in cases] for cases in asked)
    shown = facts["few_shot"]["shots"]["k"]
    assert [len(case) for case in few_shot] == [len(case) + 2 * shown for case in base]
    assert [case[-1] for case in few_shot] == [case[-1] for case in base]
    passages = [json.loads(line) for line in (folder / "out" / "passages.jsonl").read_text().splitlines()]
    for cases in (rag, tuned_rag):
        text = json.dumps(cases[0], ensure_ascii=False)
        found = [one for one in passages if one["text"] in text]
        assert {one["tenant_id"] for one in found} == {"clinic_a"}  # its own, nobody else's
        assert cases[1] == base[1]  # of no tenant, and no document is everybody's
    page = report.html(benchmark.summarise(assistant, folder / "out", benchmark.Made("v2", dataset)))
    shares = page.split('<table class="shares">')[1].split("</table>")[0]
    assert shares.count("<tr>") == 1 + 9


def test_a_rented_base_is_asked_the_suite_with_its_examples(made: tuple[Path, Path, Assistant], tmp_path: Path):
    _, dataset, assistant = made
    rented = assistant.benchmark.endpoints[0]
    benchmark.prepare(assistant, dataset, [candidates.FewShot("few_shot", "m", (("hi", "hello"),), rented)], tmp_path)
    first = json.loads((tmp_path / "checks" / "few_shot.jsonl").read_text().splitlines()[0])
    assert [turn["content"] for turn in first["messages"]] == ["hi", "hello", "hola"]


def test_a_case_is_of_the_only_tenant_where_it_names_none():
    assistant = Assistant(name="dental", select={"vertical": "dental"})
    cases = [Case(name="a", prompt="hola", contains="x"), Case(name="b", prompt="hola", contains="x", tenant="clinic_b")]
    for tenants, found in (({"clinic_a"}, ["clinic_a", "clinic_b"]), ({"clinic_a", "clinic_b"}, [None, "clinic_b"])):
        assert [one["tenant_id"] for one in benchmark.checks(assistant, tenants, cases)] == found


def test_only_missing_rows_are_asked_for_again(made: tuple[Path, Path, Assistant]):
    folder, _, _ = made
    spec = read_json(folder / "out" / "spec.json") | {"output": str(folder / "again")}
    write_json(folder / "again" / "rows.json", read_json(folder / "out" / "rows.json"))
    before = sum(SEEN.values())
    result = worker.run(spec, Progress.open(folder / "again"))
    assert sum(SEEN.values()) - before == 2 * 3  # garbage and refused, of three endpoints
    assert result["computed_batches"] == 2 * 3
