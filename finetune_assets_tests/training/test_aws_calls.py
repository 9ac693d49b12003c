"""Models at Bedrock and SageMaker asked as the benchmark and the router ask: boto3 over a socket to a small stand-in."""

from __future__ import annotations

import asyncio
import datetime
import json
import threading
from collections.abc import Iterator
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

pytest.importorskip("boto3", reason="the aws extra is not installed")

from boto3.exceptions import S3UploadFailedError
from botocore.exceptions import ClientError

from finetune_assets import once
from finetune_assets.errors import ProviderError, ProviderUnsettled
from finetune_assets.serving.upstream import Target, Upstream, UpstreamFailed
from finetune_assets.training import aws_calls
from finetune_assets.worker import endpoint
from finetune_assets_tests.training.fake_aws import frame

ASKED = [{"role": "system", "content": "Eres breve."}, {"role": "user", "content": "¿Abren hoy?"}]


class Handler(BaseHTTPRequestHandler):
    asked: list[tuple[str, dict[str, Any]]]
    status: int

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).asked.append((self.path, body))
        made: dict[str, Any] = {"message": "Too many tokens"}
        if self.status == 200 and self.path.endswith("/converse"):
            said = {"message": {"role": "assistant", "content": [{"text": "Sí, hasta las ocho."}]}}
            usage = {"inputTokens": 11, "outputTokens": 7, "totalTokens": 18}
            made = {"output": said, "stopReason": "max_tokens", "usage": usage, "metrics": {"latencyMs": 5}}
        elif self.status == 200:
            usage = {"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18}
            made = aws_calls.completion("m", "Sí, hasta las ocho.", "stop", usage)
        data = json.dumps(made).encode()
        if self.status == 200 and self.path.endswith("/converse-stream"):
            said = [
                ("contentBlockDelta", {"contentBlockIndex": 0, "delta": {"text": text}}) for text in ("Sí, hasta ", "las ocho.")
            ]
            usage = {"inputTokens": 11, "outputTokens": 7, "totalTokens": 18}
            end = [("messageStop", {"stopReason": "max_tokens"}), ("metadata", {"usage": usage, "metrics": {"latencyMs": 5}})]
            data = b"".join(frame(*one) for one in [("messageStart", {"role": "assistant"}), *said, *end])
        self.send_response(self.status)
        self.send_header("Content-Type", "application/json")
        if self.status != 200:
            codes = {429: "ThrottlingException", 500: "InternalServerException"}
            self.send_header("x-amzn-ErrorType", codes.get(self.status, "AccessDeniedException"))
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Handler]]:
    Handler.asked, Handler.status = [], 200
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name, value in (
        ("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_address[1]}"),
        ("AWS_ACCESS_KEY_ID", "testing"),
        ("AWS_SECRET_ACCESS_KEY", "testing"),
        ("AWS_EC2_METADATA_DISABLED", "true"),
    ):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(once, "TRIES", 1)
    aws_calls.client.cache_clear()
    yield Handler
    aws_calls.client.cache_clear()
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(("url", "end"), [("bedrock://us-east-1", "length"), ("sagemaker://us-east-1", "stop")])
def test_a_candidate_of_the_benchmark(runtime: type[Handler], url: str, end: str) -> None:
    [answer] = endpoint.answers(endpoint.Endpoint(url, "our-model"), [ASKED], 30)
    assert (answer["reply"], answer["prompt_tokens"], answer["reply_tokens"]) == ("Sí, hasta las ocho.", 11, 7)
    assert answer["stopped"] is (end == "stop")
    path, body = runtime.asked[0]
    if url.startswith("bedrock"):
        assert path == "/model/our-model/converse"
        assert body["system"] == [{"text": "Eres breve."}]
        assert body["messages"] == [{"role": "user", "content": [{"text": "¿Abren hoy?"}]}]
        assert body["inferenceConfig"] == {"maxTokens": 30, "temperature": 0}
    else:
        assert path == "/endpoints/our-model/invocations"
        assert (body["messages"], body["max_tokens"], body["stream"]) == (ASKED, 30, False)


@pytest.mark.parametrize("url", ["bedrock://us-east-1", "sagemaker://us-east-1"])
def test_an_upstream_of_the_router(runtime: type[Handler], url: str) -> None:
    target = Target(url, "our-model", None, 10, 10)
    body = {"messages": ASKED, "max_tokens": 30, "temperature": 0, "stream_options": {"include_usage": True}}

    async def both() -> tuple[Any, list[dict[str, Any]]]:
        upstream = Upstream()
        try:
            return await upstream.whole(target, body), [event async for event in upstream.chunks(target, body)]
        finally:
            await upstream.close()

    whole, events = asyncio.run(both())
    assert (whole.text, whole.usage["completion_tokens"]) == ("Sí, hasta las ocho.", 7)
    said = [choice["delta"]["content"] for event in events for choice in event["choices"] if choice["delta"].get("content")]
    assert said == (["Sí, hasta ", "las ocho."] if url.startswith("bedrock") else ["Sí, hasta las ocho."])
    assert [choice["finish_reason"] for event in events for choice in event["choices"]][-1] == whole.finish_reason
    assert events[-1]["usage"] == whole.usage
    assert runtime.asked[0][1] == runtime.asked[1][1]


def test_busy_and_forbidden_are_told_apart(runtime: type[Handler]) -> None:
    runtime.status = 429
    with pytest.raises(ProviderUnsettled, match="429 ThrottlingException: Too many tokens"):
        aws_calls.chat("bedrock://us-east-1", "our-model", {"messages": ASKED})
    [answer] = endpoint.answers(endpoint.Endpoint("bedrock://us-east-1", "our-model"), [ASKED], 30)
    assert (answer["reply"], "ThrottlingException" in answer["missing"]) == (None, True)

    async def ask() -> None:
        upstream = Upstream()
        try:
            await upstream.whole(Target("bedrock://us-east-1", "our-model", None, 10, 10), {"messages": ASKED})
        finally:
            await upstream.close()

    with pytest.raises(UpstreamFailed) as busy:
        asyncio.run(ask())
    assert busy.value.outcome == "busy"
    runtime.status = 403
    with pytest.raises(ProviderError, match="AccessDeniedException"):
        aws_calls.chat("bedrock://us-east-1", "our-model", {"messages": ASKED})


@pytest.mark.parametrize("code", ["ResourceNotFoundException", "ValidationException", "AccessDeniedException", "ResourceInUse"])
def test_a_refused_creation_says_what_to_do(code: str) -> None:
    answer: Any = {"Error": {"Code": code, "Message": "no"}, "ResponseMetadata": {"HTTPStatusCode": 400}}
    error = ClientError(answer, "CreateModelCustomizationJob")
    with pytest.raises(ProviderError, match=code) as refused, aws_calls.translated("bedrock", "creating the job"):
        raise error
    assert "No job was created" in str(refused.value)
    assert "finetune migrate" in str(refused.value)


def skewed(code: str, text: str, minutes: float) -> Any:
    """An answer of AWS to a machine whose clock is so far ahead."""
    theirs = datetime.datetime.now(datetime.UTC) - datetime.timedelta(minutes=minutes)
    about = {"HTTPStatusCode": 403, "HTTPHeaders": {"date": format_datetime(theirs, usegmt=True)}}
    return {"Error": {"Code": code, "Message": text}, "ResponseMetadata": about}


@pytest.mark.parametrize(
    ("code", "text", "minutes", "says"),
    [
        (
            "RequestTimeTooSkewed",
            "The difference between the request time and the current time is too large.",
            17,
            "17 minutes ahead",
        ),
        ("InvalidSignatureException", "Signature expired: 1 is now earlier than 2", -20, "20 minutes behind"),
        ("SignatureDoesNotMatch", "The request signature we calculated does not match", 40, "40 minutes ahead"),
        ("SignatureDoesNotMatch", "The request signature we calculated does not match", 0, "may not do this: renew them"),
    ],
)
def test_a_clock_that_is_wrong_is_named_and_not_waited_for(code: str, text: str, minutes: float, says: str) -> None:
    told = ClientError(skewed(code, text, minutes), "PutObject")
    wrapped = S3UploadFailedError("Failed to upload")  # what boto3 makes of an answer to an upload
    wrapped.__context__ = told
    for raised in (told, wrapped):
        with pytest.raises(ProviderError, match=says) as refused, aws_calls.translated("sagemaker", "uploading train.jsonl"):
            raise raised
        assert not isinstance(refused.value, ProviderUnsettled)
        assert ("Set it right" in str(refused.value)) == bool(minutes)


def test_only_who_was_turned_away_is_asked_again(runtime: type[Handler], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(once, "TRIES", 2)
    where = endpoint.Endpoint("bedrock://us-east-1", "our-model")
    for status, times in ((429, once.TRIES), (500, 1)):
        runtime.status, before = status, len(runtime.asked)
        [answer] = endpoint.answers(where, [ASKED], 30)
        assert (answer["reply"], len(runtime.asked) - before, "perhaps" in answer) == (None, times, status == 500)


def test_turns_alternate() -> None:
    messages = [{"role": role, "content": text} for role, text in (("user", "a"), ("user", "b"), ("assistant", "c"))]
    assert [(turn["role"], len(turn["content"])) for turn in aws_calls.turns(messages)] == [("user", 2), ("assistant", 1)]
