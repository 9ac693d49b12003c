"""A version that Bedrock answers, through the router: processes on sockets, with the stand-in for AWS behind them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import sqlalchemy as sa

pytest.importorskip("boto3", reason="the aws extra is not installed")
pytest.importorskip("moto", reason="the stand-in for AWS is not installed")

from finetune_assets.registry.traffic import requests
from finetune_assets.serving.assignment import assign
from finetune_assets.training.remote import RemoteModel
from finetune_assets_tests.serving.shop import Served, Shop, Upstream, wait_for
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


def user_of(shop: Shop, arm: str) -> str:
    with shop.ledger() as book:
        state = book.rollout("aurora")
    return next(f"u{n}" for n in range(1000) if assign(state, "clinica_aurora", f"u{n}").name == arm)


def logged(shop: Shop, request_id: str) -> dict[str, Any]:
    def look() -> list[dict[str, Any]]:
        with shop.ledger() as book, book.engine.connect() as connection:
            found = connection.execute(sa.select(requests).where(requests.c.request_id == request_id))
            return [dict(row) for row in found.mappings()]

    return wait_for(look)[0]


def test_whole_and_streamed_by_the_openai_client(served: Served, shop: Shop) -> None:
    user = user_of(shop, "candidate")
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
    with client:
        asked: Any = {"model": "aurora", "user": user, "messages": [{"role": "user", "content": "¿Abren hoy?"}]}
        whole = client.chat.completions.create(**asked)
        assert whole.choices[0].message.content == DEFAULT_ANSWER
        chunks = list(client.chat.completions.create(**asked, stream=True))
    assert "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices) == DEFAULT_ANSWER
    assert [choice.finish_reason for chunk in chunks for choice in chunk.choices][-1] == "stop"
    for made in (whole, chunks[0]):
        row = logged(shop, made.id)
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
    """Throttled (after the client's own three tries), deleted, forbidden."""
    cloud.fault("Converse", "refuse", status=status, code=code, message="said so", times=3 if status == 429 else 1)
    answer = served.ask(user=user_of(shop, "candidate"), stream=stream)
    assert answer.status_code == 200
    assert "aurora--base" in answer.text
    row = logged(shop, answer.headers["x-request-id"])
    assert (row["assigned_arm"], row["served_arm"], row["outcome"]) == ("candidate", "champion", "error")
    assert code in row["error"]
    again = served.ask(user=user_of(shop, "candidate"))
    assert again.json()["choices"][0]["message"]["content"] == DEFAULT_ANSWER


def test_a_bedrock_that_hangs_is_given_up_in_time(served: Served, shop: Shop, cloud: FakeAws) -> None:
    cloud.fault("Converse", "hang_before")
    answer = served.ask(user=user_of(shop, "candidate"))
    assert (answer.status_code, answer.json()["model"]) == (200, "aurora--base")
    assert logged(shop, answer.json()["id"])["outcome"] == "timeout"


def test_a_prompt_that_is_too_long_for_bedrock_and_its_champion_is_the_clients(
    shop: Shop, cloud: FakeAws, tmp_path: Path
) -> None:
    """With Bedrock as champion, nobody else is asked: throttled is told to come back, too long is told so, gone is an error."""
    RemoteModel("bedrock", MODEL, "bedrock://us-east-1", None, None, 1.0, 4.0).write(tmp_path / "model")
    alone = Shop(tmp_path / "shop", upstream=shop.upstream)
    alone.environment |= cloud.environment
    alone.roll_out(alone.version("a", tmp_path / "model"), "done")
    with alone.served("--no-judge") as running:
        cloud.fault("Converse", "refuse", status=429, code="ThrottlingException", message="Too many tokens", times=3)
        busy = running.ask()
        assert (busy.status_code, busy.headers["retry-after"]) == (429, "1")
        message = "Input is too long for requested model."
        cloud.fault("Converse", "refuse", status=400, code="ValidationException", message=message)
        long = running.ask()
        assert (long.status_code, long.json()["error"]["code"]) == (400, "context_length_exceeded")
        assert message in long.json()["error"]["message"]
        cloud.fault("Converse", "refuse", status=404, code="ResourceNotFoundException", message="no such model")
        gone = running.ask(stream=True)
        assert gone.status_code == 502

        def outcomes() -> list[str]:
            with alone.ledger() as book, book.engine.connect() as connection:
                return list(connection.execute(sa.select(requests.c.outcome).order_by(requests.c.created_at)).scalars())

        assert wait_for(lambda: outcomes() == ["gone", "refused", "error"]), outcomes()
