"""A version that Bedrock answers, through the router: processes on sockets, with the stand-in for AWS behind them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import sqlalchemy as sa

pytest.importorskip("boto3", reason="the aws extra is not installed")
pytest.importorskip("moto", reason="the stand-in for AWS is not installed")

from finetune_assets.registry.traffic import requests
from finetune_assets.training.remote import RemoteModel
from finetune_assets_tests.serving.servers import Upstream
from finetune_assets_tests.serving.shop import Served, Shop, wait_for
from finetune_assets_tests.training import fake_aws
from finetune_assets_tests.training.fake_aws import DEFAULT_ANSWER, FakeAws

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]
MODEL = f"{fake_aws.ARN}:custom-model-deployment/aurora"


@pytest.fixture(scope="module")
def cloud() -> Iterator[FakeAws]:
    with fake_aws.start() as started:
        yield started


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory, cloud: FakeAws) -> Iterator[Shop]:
    """The base model of an OpenAI-compatible upstream is the champion, Bedrock's the candidate at 50 %."""
    folder, other = tmp_path_factory.mktemp("bedrock"), Upstream()
    RemoteModel("bedrock", MODEL, "bedrock://us-east-1", None, None, 1.0, 4.0).write(folder / "model")
    made = Shop(folder / "shop", upstream=other.url)
    made.environment |= cloud.environment
    made.roll_out(made.version("a", folder / "model"), "50")
    yield made
    other.close()


@pytest.fixture(scope="module")
def served(shop: Shop) -> Iterator[Served]:
    with shop.served("--no-judge") as running:
        yield running


def test_whole_and_streamed_by_the_openai_client(served: Served, shop: Shop) -> None:
    user = shop.user_of("candidate")
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
    with client:
        asked: Any = {"model": "aurora", "user": user, "messages": [{"role": "user", "content": "¿Abren hoy?"}]}
        whole = client.chat.completions.create(**asked)
        assert whole.choices[0].message.content == DEFAULT_ANSWER
        chunks = list(client.chat.completions.create(**asked, stream=True))
    assert "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices) == DEFAULT_ANSWER
    assert [choice.finish_reason for chunk in chunks for choice in chunk.choices][-1] == "stop"
    for made in (whole, chunks[0]):
        row = shop.logged(made.id)
        assert (row["outcome"], row["served_arm"], row["version"]) == ("ok", "candidate", "v1-" + row["version"][3:])
        usage = whole.usage
        assert usage is not None
        assert row["usd"] == pytest.approx((row["prompt_tokens"] * 1.0 + row["completion_tokens"] * 4.0) / 1e6)
        assert row["completion_tokens"] == usage.completion_tokens


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("status", "code"), [(429, "ThrottlingException"), (404, "ResourceNotFoundException"), (403, "AccessDeniedException")]
)
def test_where_bedrock_fails_the_champion_answers(
    served: Served, shop: Shop, cloud: FakeAws, status: int, code: str, *, stream: bool
) -> None:
    """Throttled, deleted, forbidden; asked once."""
    asked = "ConverseStream" if stream else "Converse"
    cloud.fault(asked, "refuse", status=status, code=code, message="said so")
    answer = served.ask(user=shop.user_of("candidate"), stream=stream)
    assert answer.status_code == 200
    assert "aurora--base" in answer.text
    row = shop.logged(answer.headers["x-request-id"])
    assert (row["assigned_arm"], row["served_arm"], row["outcome"]) == ("candidate", "champion", "error")
    assert code in row["error"]
    again = served.ask(user=shop.user_of("candidate"))
    assert again.json()["choices"][0]["message"]["content"] == DEFAULT_ANSWER


@pytest.mark.parametrize("stream", [False, True])
def test_a_bedrock_that_hangs_is_given_up_in_time(served: Served, shop: Shop, cloud: FakeAws, *, stream: bool) -> None:
    """And not asked again: a chat that timed out may be under way, and is paid."""
    asked = "ConverseStream" if stream else "Converse"
    before = cloud.state()["seen"].count(asked)
    cloud.fault(asked, "hang_before")
    answer = served.ask(user=shop.user_of("candidate"), stream=stream)
    assert (answer.status_code, answer.headers["x-model-version"]) == (200, "aurora--base")
    assert shop.logged(answer.headers["x-request-id"])["outcome"] == "timeout"
    time.sleep(4)  # longer than boto3 reads, and waits before another try
    assert cloud.state()["seen"].count(asked) == before + 1


def test_bedrocks_words_come_as_they_are_made(served: Served, shop: Shop, cloud: FakeAws) -> None:
    cloud.fault("ConverseStream", "slow")
    body = {"model": "aurora", "user": shop.user_of("candidate"), "messages": [{"role": "user", "content": "Hola"}]}
    with served.client.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as answer:
        said = [(time.monotonic(), line) for line in answer.iter_lines() if '"content":"' in line and '"content":""' not in line]
    words = len(DEFAULT_ANSWER.split())
    assert len(said) == words
    assert said[-1][0] - said[0][0] > 0.05 * (words - 1)
    row = shop.logged(answer.headers["x-request-id"])
    assert (row["outcome"], row["served_arm"]) == ("ok", "candidate")
    assert row["first_token_seconds"] < row["seconds"] / 2


def test_a_stream_that_bedrock_breaks_off(served: Served, shop: Shop, cloud: FakeAws) -> None:
    """Behind its first words the user is told; before them, an error inside the stream, the champion answers."""
    user = shop.user_of("candidate")
    cloud.fault("ConverseStream", "cut")
    cut = served.ask(user=user, stream=True)
    assert "the reply was cut off" in cut.text
    assert "aurora--base" not in cut.text
    cloud.fault("ConverseStream", "spoil")
    spoilt = served.ask(user=user, stream=True)
    assert spoilt.headers["x-model-version"] == "aurora--base"
    assert "[DONE]" in spoilt.text
    found = [shop.logged(answer.headers["x-request-id"]) for answer in (cut, spoilt)]
    assert [(row["outcome"], row["served_arm"]) for row in found] == [("error", "candidate"), ("error", "champion")]
    assert "ThrottlingException" in found[1]["error"]


def test_a_prompt_that_is_too_long_for_bedrock_and_its_champion_is_the_clients(
    shop: Shop, cloud: FakeAws, tmp_path: Path
) -> None:
    """With Bedrock as champion, nobody else is asked: throttled is told to come back, too long is told so, gone is an error."""
    RemoteModel("bedrock", MODEL, "bedrock://us-east-1", None, None, 1.0, 4.0).write(tmp_path / "model")
    alone = Shop(tmp_path / "shop", upstream=shop.upstream)
    alone.environment |= cloud.environment
    alone.roll_out(alone.version("a", tmp_path / "model"), "done")
    with alone.served("--no-judge") as running:
        cloud.fault("Converse", "refuse", status=429, code="ThrottlingException", message="Too many tokens")
        busy = running.ask()
        assert (busy.status_code, busy.headers["retry-after"]) == (429, "1")
        message = "Input is too long for requested model."
        cloud.fault("Converse", "refuse", status=400, code="ValidationException", message=message)
        long = running.ask()
        assert (long.status_code, long.json()["error"]["code"]) == (400, "context_length_exceeded")
        assert message in long.json()["error"]["message"]
        cloud.fault("ConverseStream", "refuse", status=404, code="ResourceNotFoundException", message="no such model")
        gone = running.ask(stream=True)
        assert gone.status_code == 502

        def outcomes() -> list[str]:
            with alone.ledger() as book, book.engine.connect() as connection:
                return list(connection.execute(sa.select(requests.c.outcome).order_by(requests.c.created_at)).scalars())

        assert wait_for(lambda: outcomes() == ["gone", "refused", "error"]), outcomes()
