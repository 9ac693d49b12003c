"""The router as real processes on real sockets, in front of an upstream whose faults a test chooses."""

from __future__ import annotations

import datetime
import json
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest

from finetune_assets.registry.tables import now
from finetune_assets.registry.traffic import requests, shadow_replies
from finetune_assets.serving.observed import BAD, observe, totals
from finetune_assets_tests.serving.servers import Upstream
from finetune_assets_tests.serving.shop import Served, Shop, wait_for

pytestmark = pytest.mark.timeout(120)


def test_the_openai_client_and_curl_work_unchanged(served: Served) -> None:
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
    whole = client.chat.completions.create(model="aurora", messages=[{"role": "user", "content": "Hola"}], user="ana")
    assert whole.choices[0].message.content == f"{whole.model} oye: Hola"
    assert whole.usage
    assert whole.usage.total_tokens == 12
    parts = client.chat.completions.create(
        model="aurora", messages=[{"role": "user", "content": "Hola"}], user="ana", stream=True
    )
    text = "".join(part.choices[0].delta.content or "" for part in parts)
    assert text == whole.choices[0].message.content
    assert [model.id for model in client.models.list()] == ["aurora"]
    client.close()
    body = json.dumps({"model": "aurora", "messages": [{"role": "user", "content": "Hola"}]})
    curl = [
        "curl",
        "-s",
        "--noproxy",
        "*",
        f"{served.url}/v1/chat/completions",
        "-H",
        "Content-Type: application/json",
        "-d",
        body,
    ]
    answer = json.loads(subprocess.run(curl, capture_output=True, check=True).stdout)
    assert answer["choices"][0]["message"]["content"].endswith("oye: Hola")


def test_a_user_keeps_the_arm_and_both_workers_agree(served: Served, shop: Shop) -> None:
    for arm, version in (("candidate", "v2"), ("champion", "v1")):
        user = shop.user_of(arm)
        with ThreadPoolExecutor(8) as pool:
            models = set(
                pool.map(
                    lambda _, user=user: httpx.post(
                        f"{served.url}/v1/chat/completions",
                        json={"model": "aurora", "user": user, "messages": [{"role": "user", "content": "Hola"}]},
                        trust_env=False,
                    ).json()["model"],
                    range(24),
                )
            )
        assert len(models) == 1
        assert version in models.pop()


@pytest.mark.parametrize("fault", ["error", "half", "hang", "shapeless"])
@pytest.mark.parametrize("stream", [False, True])
def test_the_champion_answers_where_the_candidate_fails(
    served: Served, shop: Shop, upstream: Upstream, fault: str, stream: bool
) -> None:
    if fault == "half" and not stream:
        pytest.skip("half a stream is a stream")
    upstream.faults["v2-"] = fault
    answer = served.ask(user=shop.user_of("candidate"), stream=stream)
    if fault == "half":  # the user has seen its beginning: it is told, not glued to another reply
        assert "the reply was cut off" in answer.text
        row = shop.logged(answer.headers["x-request-id"])
        assert (row["assigned_arm"], row["served_arm"], row["outcome"]) == ("candidate", "candidate", "error")
        return
    assert answer.status_code == 200
    assert "v1-aaaaaaaa" in answer.text
    row = shop.logged(answer.headers["x-request-id"])
    outcome = "timeout" if fault == "hang" else "error"
    assert (row["assigned_arm"], row["served_arm"], row["outcome"], row["version"]) == (
        "candidate",
        "champion",
        outcome,
        "v1-aaaaaaaa",
    )


@pytest.mark.parametrize("fault", ["half", "hang", "error"])
@pytest.mark.parametrize("failing", ["v2-", "aurora"])
def test_a_stream_that_breaks_behind_its_role_has_not_begun(
    served: Served, shop: Shop, upstream: Upstream, fault: str, failing: str
) -> None:
    """Headers and events are the champion's alone; where it fails too, or is the only arm, the client gets a status."""
    upstream.faults[failing] = f"begun:{fault}"
    if failing == "v2-":
        answer = served.ask(user=shop.user_of("candidate"), stream=True)
        assert answer.status_code == 200
        assert answer.headers["x-model-version"] == "aurora--v1-aaaaaaaa"
        assert answer.text.count('"role"') == 1
        assert "v2-" not in answer.text
        assert "[DONE]" in answer.text
        row = shop.logged(answer.headers["x-request-id"])
        outcome = "timeout" if fault == "hang" else "error"
        assert (row["served_arm"], row["outcome"]) == ("champion", outcome)
        return
    for user in (shop.user_of("candidate"), shop.user_of("champion")):
        answer = served.ask(user=user, stream=True)
        assert answer.status_code == (504 if fault == "hang" else 502)
        assert "could not answer" in answer.json()["error"]["message"]
    assert not any("Traceback" in line for line in served.lines)


TAKEN = [
    '{"choices": [{"message": {"content": "v2 says"}}], "usage": [5]}',
    '{"choices": [{"message": {"content": "v2 says"}}], "usage": {"prompt_tokens": null, "completion_tokens": "many"}}',
    '{"choices": [{"message": {"content": "v2 says"}}], "usage": {"prompt_tokens": 1.5, "completion_tokens": -1}}',
    '{"choices": [{"message": {"content": "v2 says", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]}}]}',
]


NO_REPLY = [
    '{"choices": [{"message": {"content": ' + "[" * 100_000 + "]" * 100_000 + "}}]}",
    '{"choices": [{"message": {"content": "v2 says", "tool_calls": ["f"]}}]}',
    '{"choices": [{"message": {"content": "v2 says", "tool_calls": [{"function": "f"}]}}]}',
    '{"choices": [{"message": {"content": "v2 says", "tool_calls": {"f": 1}}}]}',
]


@pytest.mark.parametrize("way", ["whole", "stream", "chat"])
@pytest.mark.parametrize("number", range(len(TAKEN) + len(NO_REPLY)))
def test_a_reply_of_an_odd_shape_is_mended_or_is_none(
    served: Served, shop: Shop, upstream: Upstream, number: int, way: str
) -> None:
    upstream.shapes["v2-"] = [*TAKEN, *NO_REPLY][number]
    user = shop.user_of("candidate")
    if way == "chat":
        answer = served.client.post("/chat", json={"user_id": user, "message": "Hola"})
    else:
        answer = served.ask(user=user, stream=way == "stream")
    assert answer.status_code == 200
    taken = number < len(TAKEN)
    assert ("v2 says" in answer.text) is taken
    row = shop.logged(answer.headers["x-request-id"])
    assert (row["served_arm"], row["outcome"]) == (("candidate", "ok") if taken else ("champion", "error"))
    assert not taken or (row["prompt_tokens"], row["completion_tokens"]) == (None, None)
    if way == "chat" and "arguments" in upstream.shapes["v2-"]:
        assert (answer.json()["action"], answer.json()["params"]) == ("f", {"a": 1})


def test_an_empty_stream_is_passed_on_whole(served: Served, shop: Shop, upstream: Upstream) -> None:
    upstream.faults["v1-"] = "empty"
    answer = served.ask(user=shop.user_of("champion"), stream=True)
    assert answer.text.count('"role"') == 1
    assert '"finish_reason":"stop"' in answer.text
    assert shop.logged(answer.headers["x-request-id"])["outcome"] == "policy"


def test_a_client_that_leaves_a_stream_ends_it(fresh: Shop, upstream: Upstream) -> None:
    upstream.faults["base"] = "slow"
    body = {"model": "aurora", "stream": True, "messages": [{"role": "user", "content": " ".join(["hola"] * 15)}]}
    with fresh.served("--no-judge") as served:
        with served.client.stream("POST", "/v1/chat/completions", json=body) as answer:
            assert next(answer.iter_lines()).startswith("data:")
        assert wait_for(lambda: fresh.values(requests, "outcome") == {"gone"}, 5)


def test_a_client_that_leaves_the_champion_does_not_excuse_the_candidate(served: Served, shop: Shop, upstream: Upstream) -> None:
    upstream.faults |= {"v2-": "error", "v1-": "slow"}
    body = {"model": "aurora", "stream": True, "user": shop.user_of("candidate")}
    body["messages"] = [{"role": "user", "content": " ".join(["hola"] * 15)}]
    with served.client.stream("POST", "/v1/chat/completions", json=body) as answer:
        assert next(answer.iter_lines()).startswith("data:")
    row = shop.logged(answer.headers["x-request-id"])
    assert (row["served_arm"], row["outcome"]) == ("champion", "error")


def test_what_no_arm_can_answer_is_said_in_openais_shape(served: Served, shop: Shop, upstream: Upstream) -> None:
    upstream.faults["aurora"] = "error"
    answer = served.ask(user=shop.user_of("candidate"))
    assert answer.status_code == 502
    assert "could not answer" in answer.json()["error"]["message"]
    upstream.faults["aurora"] = "busy"
    answer = served.ask(user=shop.user_of("champion"))
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")


def test_a_streamed_tool_call_is_a_reply(served: Served, shop: Shop, upstream: Upstream) -> None:
    """Not an empty one; and once a piece of it has been sent, nobody else answers behind it."""
    user = shop.user_of("candidate")
    upstream.faults["v2-"] = "tool"
    called = served.ask(user=user, stream=True)
    assert called.text.count('"tool_calls"') == 2
    row = shop.logged(called.headers["x-request-id"])
    assert (row["outcome"], row["served_arm"]) == ("ok", "candidate")
    assert row["first_token_seconds"] is not None
    upstream.faults["v2-"] = "toolcut"
    cut = served.ask(user=user, stream=True)
    assert "the reply was cut off" in cut.text
    assert "v1-" not in cut.text
    row = shop.logged(cut.headers["x-request-id"])
    assert (row["outcome"], row["served_arm"]) == ("error", "candidate")


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_no_model_takes_is_the_clients_and_counts_against_no_arm(
    served: Served, shop: Shop, upstream: Upstream, stream: bool
) -> None:
    """Asked of both arms: the candidate's no is believed where the champion says it too."""
    user = shop.user_of("candidate")
    upstream.faults["aurora"] = "status:400:This model's maximum context length is 4096 tokens."
    answer = served.ask(user=user, stream=stream)
    assert answer.status_code == 400
    assert answer.json()["error"] == {
        "message": "This model's maximum context length is 4096 tokens.",
        "type": "invalid_request_error",
        "param": "messages",
        "code": "context_length_exceeded",
    }
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
    with client, pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="aurora", messages=[{"role": "user", "content": "Hola"}], user=user)
    assert refused.value.code == "context_length_exceeded"
    found = wait_for(lambda: shop.rows(requests, outcome="refused"))
    assert {(row["status"], row["assigned_arm"]) for row in found} == {(400, "candidate")}
    with shop.ledger() as book:
        counted = observe(book, book.rollout("aurora")).candidate.requests
    with shop.ledger() as book:
        week = totals(book, "aurora", now() - datetime.timedelta(hours=1), now() + datetime.timedelta(hours=1))
    taken = [row for row in shop.rows(requests, kind="live") if row["assigned_arm"] != row["served_arm"] and row["status"] == 200]
    assert week["fallbacks"] == len(taken)  # what both refused, nobody took over
    assert week["failed"] == sum(row["outcome"] in BAD for row in shop.rows(requests, kind="live"))
    logged_all = shop.rows(requests, assigned_arm="candidate", step="50", kept=False)
    assert counted == sum(row["outcome"] != "refused" for row in logged_all) < len(logged_all)


def test_what_the_candidate_refuses_and_the_champion_takes_is_the_candidates_fault(
    served: Served, shop: Shop, upstream: Upstream
) -> None:
    upstream.faults["v2-"] = "status:422:too long; the user said 70012345"
    answer = served.ask(user=shop.user_of("candidate"))
    assert answer.status_code == 200
    row = shop.logged(answer.headers["x-request-id"])
    assert (row["outcome"], row["served_arm"]) == ("error", "champion")
    assert "too long" in row["error"]
    assert "70012345" not in row["error"]


@pytest.mark.parametrize("status", [401, 403, 404, 405, 503])
def test_an_upstreams_own_trouble_is_no_clients(served: Served, shop: Shop, upstream: Upstream, status: int) -> None:
    upstream.faults["aurora"] = f"status:{status}:Incorrect API key provided: sk-abcdefghijklmnopqrstuvwx"
    answer = served.ask(user=shop.user_of("champion"))
    assert answer.status_code == 502
    assert "sk-abc" not in answer.text
    row = wait_for(lambda: [r for r in shop.rows(requests, status=502) if f"HTTP {status}" in (r["error"] or "")])[0]
    assert row["outcome"] == "error"
    assert "sk-abc" not in row["error"]


@pytest.mark.parametrize("stream", [False, True])
def test_what_a_rule_allows_to_no_user_is_a_policy_violation(
    served: Served, shop: Shop, upstream: Upstream, stream: bool
) -> None:
    """Forbidden words, an empty reply, form and language; not what replies mostly hold, rules for an intent, and what the client
    cut short."""
    user, long = shop.user_of("candidate"), "Sí, claro, y hay más que decir de todo esto."
    said = {"say:Toma amoxicilina": "policy", "empty": "policy", f"say:{long}": "ok", "say:What time would you like?": "policy"}
    for fault, outcome in said.items():
        upstream.faults["v2-"] = fault
        assert shop.logged(served.ask(user=user, stream=stream).headers["x-request-id"])["outcome"] == outcome, fault
    cut = {"choices": [{"message": {"content": long}, "finish_reason": "length"}]}
    for shape, more, outcome in (("", {}, "policy"), (json.dumps(cut), {}, "policy"), (json.dumps(cut), {"max_tokens": 9}, "ok")):
        upstream.faults["v2-"] = f"say:{long}"
        upstream.shapes = {"v2-": shape} if shape else {}
        answer = served.ask("Sé breve", user=user, stream=stream, **more)
        assert shop.logged(answer.headers["x-request-id"])["outcome"] == outcome


def test_shadow_answers_unseen_and_never_harms(tmp_path: Path, upstream: Upstream) -> None:
    shop = Shop(tmp_path, upstream=upstream.url)
    version = shop.version("a")
    shop.roll_out(version, "shadow")
    file = shop.assistants / "aurora.yaml"
    file.write_text(file.read_text().replace("rollout: {", "rollout: {shadow_seconds: 1, "))
    with shop.served("--no-judge") as served:
        answer = served.ask("Soy Ana Pérez")
        assert answer.json()["model"] == "aurora--base"
        shadow = wait_for(lambda: shop.rows(requests, kind="shadow"))[0]
        assert (shadow["request_id"], shadow["version"]) == (f"shadow-{answer.headers['x-request-id']}", version)
        made = shop.rows(shadow_replies)[0]
        assert version in made["content"]
        assert "Pérez" not in made["content"]
        upstream.faults[version] = "hang"
        start = time.monotonic()
        assert served.ask().status_code == 200
        assert time.monotonic() - start < 1
        late = wait_for(lambda: shop.rows(requests, kind="shadow", outcome="timeout"), 8)[0]
        assert late["seconds"] < 2  # a live reply has three
        upstream.faults[version] = "status:400:too long"  # for the candidate alone
        assert served.ask().status_code == 200
        assert wait_for(lambda: shop.rows(requests, kind="shadow", outcome="error"))


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/nowhere", 404), ("GET", "/chat", 405), ("POST", "/v1/models", 405)]
)
def test_what_there_is_not_is_said_in_openais_shape(served: Served, method: str, path: str, status: int) -> None:
    answer = served.client.request(method, path)
    assert answer.status_code == status
    assert f"{method} {path}" in answer.json()["error"]["message"]


@pytest.mark.slow
def test_it_stops_after_the_longest_reply_that_the_settings_allow(fresh: Shop, upstream: Upstream) -> None:
    """A good reply after 17 s; the end was asked for at its beginning."""
    patient = (fresh.assistants / "aurora.yaml").read_text().replace("timeout_seconds: 3", "timeout_seconds: 20")
    (fresh.assistants / "aurora.yaml").write_text(patient)
    upstream.faults["base"] = "wait:17"
    with fresh.served("--no-judge") as served, ThreadPoolExecutor(1) as pool:
        slow = pool.submit(lambda: served.ask("¿Me esperan?"))
        assert wait_for(lambda: upstream.seen and upstream.seen[-1]["messages"][-1]["content"] == "¿Me esperan?")
        served.process.send_signal(signal.SIGTERM)
        assert slow.result().status_code == 200
        assert served.process.wait(20) == 0


@pytest.mark.slow
def test_it_stops_in_order(fresh: Shop, upstream: Upstream) -> None:
    upstream.faults["base"] = "late"
    with fresh.served("--no-judge") as served, ThreadPoolExecutor(1) as pool:
        slow = pool.submit(lambda: served.ask("¿Cierran ya?"))
        assert wait_for(lambda: upstream.seen and upstream.seen[-1]["messages"][-1]["content"] == "¿Cierran ya?")
        served.process.send_signal(signal.SIGTERM)
        assert slow.result().status_code == 200
        assert served.process.wait(20) == 0
    assert not list((fresh.home / "serving" / "journal").glob("*.jsonl"))
