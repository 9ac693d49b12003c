"""Synthetic rows: for few-asked intents, capped, in train only, slots untouched, and from a real HTTP endpoint where set."""

from __future__ import annotations

import datetime
import json
import random
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from finetune_assets.assets.dataset import training_examples
from finetune_assets.assistants import Assistant
from finetune_assets.assistants.settings.training import Remote
from finetune_assets.corpus.erasure import Traces
from finetune_assets.dataset import check_leaks, choose, freeze
from finetune_assets.dataset.augment import wanted
from finetune_assets.dataset.erasure import drop_staged
from finetune_assets.dataset.variations import keeps_slots, slots, vary
from finetune_assets.dataset.wording import FILE, parse
from finetune_assets.errors import SettingsError, SourceError
from finetune_assets.resources import AssistantsResource, LauncherResource, LedgerResource, StoreResource
from finetune_assets.storage import Store
from finetune_assets_tests.dataset.small_corpus import START, TEXT, Corpus, dental, sentence

ASKS = "¿Puedes darme hora el martes a las 10:30 para limpieza? Soy [NAME_2], tengo 2 hijos y pago 45€"
REPLY = "Claro, la limpieza del martes queda anotada."
PLAIN = TEXT.split()
WORDS = st.sampled_from(
    ["quiero", "una", "cita", "martes", "10:30", "[PHONE]", "¿puedes", "también?", "que", "Ana", "50 €", "urgencia"]
)


@settings(max_examples=200, deadline=None)
@given(st.lists(WORDS, min_size=1, max_size=12), st.sampled_from(("es", "en", "pt")), st.integers(0, 10_000), st.booleans())
def test_slots_stay_in_order_and_the_words_change(said: list[str], language: str, seed: int, opens: bool) -> None:
    text = " ".join(said)
    varied = vary(text, REPLY, language, random.Random(seed), opens=opens)
    assert varied == vary(text, REPLY, language, random.Random(seed), opens=opens)
    if varied is None:
        return
    assert varied.casefold() != text.casefold()
    at = 0
    for slot in slots(text, REPLY, language):
        found = varied.find(slot, at)
        assert found >= 0, (slot, varied)
        at = found + len(slot)
    assert keeps_slots(text, varied, REPLY, language)


def test_slots_are_values_and_what_the_reply_repeats() -> None:
    assert slots(ASKS, REPLY, "es") == ["martes", "10:30", "limpieza", "Soy", "[NAME_2]", "2", "45€"]


@given(st.dictionaries(st.sampled_from("abcdefg"), st.integers(1, 500), min_size=1), st.floats(0, 0.5), st.floats(0.05, 1))
def test_the_cap_holds_and_no_intent_is_filled_above_its_goal(sizes: dict[str, int], share: float, below: float) -> None:
    plan = wanted(sizes, share, below)
    made = sum(plan.values())
    assert made <= share * (sum(sizes.values()) + made) + 1e-6
    assert all(sizes[intent] + n <= below * sum(sizes.values()) / len(sizes) + 1 for intent, n in plan.items())


def uneven(corpus: Corpus) -> Store:
    """Many scheduling requests, a dozen emergencies in train and three that are held out."""
    corpus.fill(200, intent="scheduling")
    for number in range(15):
        held = number < 3
        said = f"¿{' '.join(random.Random(number).choices(PLAIN, k=9))}?"
        user = f"u_{'held' if held else 'train'}_{number}"
        context = [{"role": "user", "content": said}]
        reply = f"Avisamos ya: {sentence(number, 'help')}."
        corpus.example(
            number, intent="emergency", user=user, bucket=number if held else 9000, user_text=said, context=context, reply=reply
        )
    return corpus.write()


def test_few_asked_intents_get_variations_in_train_alone(corpus: Corpus, assistant: Assistant) -> None:
    store = uneven(corpus)
    choice = choose(store, assistant)
    made = choice.kept.filter(pl.col("source") == "synthetic")
    parents = {row["message_id"]: row for row in choice.kept.filter(pl.col("source") != "synthetic").iter_rows(named=True)}
    assert made.height > 10
    assert set(made["intent"]) == {"emergency"}
    assert set(made["split"]) == {"train"}
    for row in pl.concat(choice.contexts(made)).iter_rows(named=True):
        parent = parents[row["message_id"]]
        assert row["user_text"] != parent["user_text"]
        assert row["context"][-1] == {"role": "user", "content": row["user_text"]}
        for same in ("reply", "conversation_id", "user", "tenant_id", "split", "intent"):
            assert row[same] == parent[same]
    train = choice.kept.filter(pl.col("split") == "train")
    assert made.height <= 0.15 * train.height
    assert choice.notes["augmented"]["rows"] == made.height == choice.notes["counts"]["source"]["synthetic"]
    assert choice.kept.height - made.height + choice.dropped.height == choice.notes["read"]
    first = freeze(store, assistant, choice)["fingerprint"]
    assert check_leaks(store.dataset("dental", first)) == []
    random.Random(2).shuffle(corpus.examples)
    assert freeze(corpus.write(), assistant, choose(store, assistant))["fingerprint"] == first
    lineage = pl.read_parquet(store.dataset("dental", first) / "lineage.parquet")
    assert set(lineage.filter(pl.col("source") == "synthetic")["message_id"]) <= set(parents)
    off = choose(store, dental(augment={"share": 0}))
    assert "synthetic" not in set(off.kept["source"])
    other = choose(store, dental(augment={"seed": 1})).kept.filter(pl.col("source") == "synthetic")
    assert set(other["user_text"]) != set(made["user_text"])


class Endpoint:
    """An OpenAI-compatible server on loopback that answers with what `say` makes of a request."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.status = 200
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                endpoint.requests.append(body)
                endpoint.keys.add(self.headers["Authorization"])
                text = body["messages"][-1]["content"]
                said = [f"Oigan, {text}", re.sub(r"\d+", "99", text), f"{text} es urgente"]
                message = {"role": "assistant", "content": f"Claro: {json.dumps(said, ensure_ascii=False)}"}
                answer = {
                    **{"id": "x", "object": "chat.completion", "created": 1, "model": body["model"]},
                    "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
                    "usage": {"prompt_tokens": 900, "completion_tokens": 100, "total_tokens": 1000},
                }
                payload = json.dumps(answer if endpoint.status == 200 else {"error": {"message": "no"}}).encode()
                self.send_response(endpoint.status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(payload)))
                self.end_headers()
                self.wfile.write(payload)

            def log_message(self, *_: object) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    monkeypatch.setenv("WORDING_KEY", "sk-not-a-real-one")
    server = Endpoint()
    yield server
    server.close()


def asking(endpoint: Endpoint, **limits: Any) -> Assistant:
    llm = {"base_url": endpoint.url, "model": "tiny", "api_key_env": "WORDING_KEY"} | limits
    return dental(augment={"llm": llm})


def test_a_language_model_rewords_once_and_slots_are_checked(corpus: Corpus, endpoint: Endpoint) -> None:
    store = uneven(corpus)
    assistant = asking(endpoint)
    choice = choose(store, assistant)
    made = choice.kept.filter(pl.col("source") == "synthetic")
    assert made.height
    assert all(text.startswith("Oigan") or text.endswith("urgente") for text in made["user_text"])  # `99` changed a number
    asked = len(endpoint.requests)
    assert 0 < asked <= 15
    assert endpoint.keys == {"Bearer sk-not-a-real-one"}
    first = freeze(store, assistant, choice)["fingerprint"]
    again = choose(store, assistant)
    assert len(endpoint.requests) == asked
    assert freeze(store, assistant, again)["fingerprint"] == first
    moved = asking(endpoint, base_url="http://127.0.0.1:9/v1", max_requests=5)
    assert freeze(store, moved, choose(store, moved))["fingerprint"] == first  # the address and the limits are no content
    kept = pl.read_parquet(store.datasets("dental") / FILE)
    assert kept.height == asked
    gone = str(kept["message_id"][0])
    corpus.examples = [row for row in corpus.examples if row["message_id"] != gone]
    choose(corpus.write(), assistant)
    assert gone not in set(pl.read_parquet(store.datasets("dental") / FILE)["message_id"])


@pytest.mark.parametrize("limits", [{"max_requests": 3}, {"max_usd": 0.005, "usd_per_million_tokens": 2.0}])
def test_limits_are_kept_and_what_is_missing_is_said(corpus: Corpus, endpoint: Endpoint, limits: dict[str, Any]) -> None:
    choice = choose(uneven(corpus), asking(endpoint, **limits))
    assert len(endpoint.requests) == 3
    assert any("wordings are missing" in warning for warning in choice.notes["warnings"])


def test_a_failing_endpoint_and_a_missing_key_are_named(
    corpus: Corpus, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = uneven(corpus)
    endpoint.status = 401
    with pytest.raises(SourceError, match=r"127\.0\.0\.1:\d+/v1 \(model tiny\).*AuthenticationError 401") as failure:
        choose(store, asking(endpoint))
    assert "not-a-real-one" not in str(failure.value)
    asked = len(endpoint.requests)
    endpoint.status = 500  # it may have answered, and bill it: not asked again
    with pytest.raises(SourceError, match="InternalServerError 500"):
        choose(store, asking(endpoint))
    assert len(endpoint.requests) == asked + 1
    monkeypatch.delenv("WORDING_KEY")
    with pytest.raises(SettingsError, match="WORDING_KEY"):
        choose(store, asking(endpoint))
    with pytest.raises(ValidationError, match="usd_per_million_tokens"):
        asking(endpoint, max_usd=1)


def test_no_text_leaves_where_the_assistant_or_a_tenant_in_its_data_forbids_it(corpus: Corpus, endpoint: Endpoint) -> None:
    store, elsewhere = uneven(corpus), endpoint.url.replace("127.0.0.1", "0.0.0.0")
    closed = asking(endpoint, base_url=elsewhere).model_copy(update={"remote": Remote(allowed=False)})
    with pytest.raises(SettingsError, match=r"settings of dental say `remote\.allowed: false`.*augment\.llm \(http://0\.0\.0\.0"):
        choose(store, closed)
    pooled = asking(endpoint, base_url=elsewhere)
    with pytest.raises(SettingsError, match=r"settings of clinic_a in its data say.*Add it to filters\.exclude_tenants"):
        choose(store, pooled, forbidding=["clinic_a", "clinic_z"])
    assert endpoint.requests == []
    choose(store, closed.model_copy(update={"augment": asking(endpoint).augment}), forbidding=["clinic_a"])  # on this machine
    here = len(endpoint.requests)
    assert here > 0
    choose(store, pooled, forbidding=["clinic_z"])  # has no rows in it
    assert len(endpoint.requests) == here  # each wording was paid for before


def test_the_asset_asks_the_tenants_own_files(corpus: Corpus, endpoint: Endpoint, tmp_path: Path) -> None:
    store, folder = uneven(corpus), tmp_path / "assistants"
    folder.mkdir()
    llm = f"{{base_url: '{endpoint.url.replace('127.0.0.1', '0.0.0.0')}', model: tiny, api_key_env: WORDING_KEY}}"
    (folder / "dental.yaml").write_text(f"select: {{vertical: dental}}\naugment: {{llm: {llm}}}\n")
    (folder / "north.yaml").write_text("select: {tenant: clinic_a}\nremote: {allowed: false}\n")
    resources = {
        "store": StoreResource(home=str(store.home)),
        "assistants": AssistantsResource(folder=str(folder)),
        "launcher": LauncherResource(),
        "ledger": LedgerResource(url=f"sqlite:///{tmp_path / 'ledger.db'}"),
    }
    with dg.DagsterInstance.local_temp(str(tmp_path), overrides={"telemetry": {"enabled": False}}) as instance:
        instance.add_dynamic_partitions("assistant", ["dental"])
        with pytest.raises(SettingsError, match=r"settings of clinic_a in its data"):
            dg.materialize([training_examples], partition_key="dental", instance=instance, resources=resources)
    assert endpoint.requests == []


def test_answers_without_an_array_say_nothing() -> None:
    assert parse('Claro:\n```json\n["uno", " ", 3, "dos "]\n```') == ["uno", "dos"]
    assert parse("no") == parse("[oops]") == parse("") == []


def test_a_variation_that_nears_a_held_out_row_is_left_out(corpus: Corpus, endpoint: Endpoint) -> None:
    """The parent is farther from the held-out row than the threshold, one of its wordings is not."""
    corpus.fill(200, intent="scheduling")
    said, reply = "¿Me pueden atender hoy?", "Sí, avisamos al doctor ahora."
    for place, text in ((9000, said), (5, f"Oigan, {said} Ahorita ya")):
        context = [{"role": "user", "content": text}]
        corpus.example(place, intent="emergency", user=f"u_{place}", bucket=place, user_text=text, context=context, reply=reply)
    choice = choose(corpus.write(), asking(endpoint))
    emergencies = choice.kept.filter(pl.col("intent") == "emergency").select("split", "source", "user_text").sort("user_text")
    assert emergencies.rows() == [
        ("test", "satisfied", f"Oigan, {said} Ahorita ya"),
        ("train", "satisfied", said),
        ("train", "synthetic", f"{said} es urgente"),
    ]
    assert choice.notes["augmented"]["left_out"] == {"twin_held_out": 1}


def test_a_variation_that_nears_a_held_out_pair_is_left_out(corpus: Corpus, endpoint: Endpoint) -> None:
    """The other person's early correction is no example, since that person stands in the test set, but a held-out pair."""
    corpus.fill(200, intent="scheduling")
    late = START + datetime.timedelta(days=90)
    said, reply = "¿Me pueden atender hoy?", "Sí, avisamos al doctor ahora."
    for number, text in ((1, said), (2, f"Oigan, {said} Ahorita ya")):
        context = [{"role": "user", "content": text}]
        corpus.example(number, intent="emergency", user=f"u_{number}", bucket=9000, user_text=text, context=context, reply=reply)
    corpus.examples[-1]["reply"] = "No entiendo nada."
    corpus.rate("msg_00002", "negative", reply)
    corpus.example(3, user="u_2", bucket=9000, started_at=late)
    llm = {"base_url": endpoint.url, "model": "tiny", "api_key_env": "WORDING_KEY"}
    assistant = dental(augment={"llm": llm}, split={"mode": "time", "date": late.date()})
    choice = choose(corpus.write(), assistant)
    assert choice.preferences.select("message_id", "split").rows() == [("msg_00002", "test")]
    assert choice.notes["augmented"]["left_out"] == {"twin_held_out": 1}
    assert choice.notes["augmented"]["rows"] == 1
    freeze(corpus.store, assistant, choice)


def test_an_erased_person_leaves_the_paid_answers_too(corpus: Corpus, endpoint: Endpoint) -> None:
    store = uneven(corpus)
    choose(store, asking(endpoint))
    path = store.datasets("dental") / FILE
    before = pl.read_parquet(path)
    person = str(before["user"][0])
    drop_staged(store, Traces(person))
    after = pl.read_parquet(path)
    assert after.height == before.height - 1
    assert person not in set(after["user"])
