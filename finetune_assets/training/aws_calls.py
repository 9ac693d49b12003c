"""Calls to AWS: clients, what their errors mean, and one chat with a model that Bedrock or SageMaker serves.

An address of such a model is `bedrock://REGION` or `sagemaker://REGION`, its name a deployment's or model's ARN, or an endpoint's
name. `chat` takes and gives OpenAI's chat completion, so whoever asks a model over HTTP asks these the same way:
Bedrock by Converse, or ConverseStream where the reply is wanted as it is made; SageMaker by `invoke_endpoint` of a container that
speaks OpenAI's chat (LMI, vLLM, TGI), which gives it whole. Plain boto3.
"""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing, contextmanager
from email.utils import parsedate_to_datetime
from functools import lru_cache
from typing import Any

from finetune_assets import once
from finetune_assets.errors import ProviderError, ProviderUnsettled, SettingsError
from finetune_assets.training.remote import without_secrets

SCHEMES = ("bedrock://", "sagemaker://")
THROTTLED = (
    *("Throttl", "RequestThrottled", "EC2Throttled", "TooManyRequests", "RequestLimitExceeded", "BandwidthLimitExceeded"),
    *("ProvisionedThroughputExceeded", "TransactionInProgress", "LimitExceededException", "PriorRequestNotComplete", "SlowDown"),
)
"""Beginnings of botocore's codes of throttling (`retries/standard.py`), whose status is 400 or 429: nothing was done."""
BUSY = (
    *THROTTLED,
    *("ServiceUnavailable", "InternalServer", "InternalFailure", "RequestTimeout", "ModelNotReady", "ModelTimeout"),
)
"""Beginnings of codes that mean: later."""
SIGNATURES = ("InvalidSignature", "SignatureDoesNotMatch")
"""Codes of a wrong key, or of a wrong clock: a signature holds the time, and is good for SKEW."""
SKEWED = ("RequestTimeTooSkewed", "RequestExpired", "RequestInTheFuture")
SIGNED_AT = ("Signature expired", "Signature not yet current")
NONE, SKEW = datetime.timedelta(), datetime.timedelta(minutes=5)
GONE = ("could not be found", "requested resource not found", "could not find", "does not exist")
THERE = ("ResourceInUse", "Conflict")
ELSEWHERE = "finetune migrate ASSISTANT --to local/MODEL (or another TRAINER/MODEL)."
TOO_LONG = ("Input is too long", "input is too long", "maximum context length", "too many input tokens", "Too many input tokens")
"""What a prompt that a model does not hold is told by Bedrock's ValidationException, and by a container at SageMaker."""
MOST_CALLS = 64
"""Connections of one client, and so calls at a time."""
ENDS = {"max_tokens": "length", "content_filtered": "content_filter", "guardrail_intervened": "content_filter"}
"""Bedrock's reasons to stop, as OpenAI names them; the others are `stop`."""


def is_aws(url: str) -> bool:
    """Whether an address is one of `chat`."""
    return url.startswith(SCHEMES)


def streams(url: str) -> bool:
    """Whether who answers at an address gives a reply as it is made; of `events`, SageMaker does not."""
    return not url.startswith("sagemaker://")


@lru_cache(maxsize=32)
def client(provider: str, service: str, region: str | None, timeout: float | None = None) -> Any:
    """A boto3 client, which threads may share; with a `timeout` each request is tried once, since one that timed out may be
    under way, and is paid twice where it is sent again.

    Raises SettingsError where boto3 or a region is missing.
    """
    try:
        from boto3.session import Session
        from botocore.config import Config  # noqa: PLC0415
        from botocore.exceptions import NoRegionError, ProfileNotFound  # noqa: PLC0415
    except ModuleNotFoundError:
        raise SettingsError(f"{provider} needs boto3: pip install 'finetune-assets[aws]'.") from None
    patience: dict[str, Any] = {"read_timeout": timeout, "connect_timeout": timeout} if timeout else {}
    retries: dict[str, Any] = {"mode": "standard", "total_max_attempts": 1}
    config = Config(**patience, max_pool_connections=MOST_CALLS, retries=retries) if timeout else None
    try:
        return Session().client(service, region_name=region, config=config)  # pyright: ignore[reportUnknownMemberType, reportCallIssue, reportArgumentType]
    except NoRegionError:
        raise SettingsError("No AWS region: set remote.aws.region, or AWS_REGION.") from None
    except ProfileNotFound as error:
        raise SettingsError(f"{error}. Correct AWS_PROFILE.") from None


@contextmanager
def translated(provider: str, doing: str) -> Generator[None]:
    """Turns what botocore raises inside the block into ProviderError, or ProviderUnsettled where a later try may succeed."""
    from boto3.exceptions import Boto3Error
    from botocore.eventstream import ParserError  # noqa: PLC0415
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError  # noqa: PLC0415
    from urllib3.exceptions import HTTPError  # noqa: PLC0415 - what botocore lets through while a stream is read

    try:
        yield
    except (NoCredentialsError, PartialCredentialsError):
        raise SettingsError(
            f"{provider}: no AWS credentials. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or a role."
        ) from None
    except ClientError as error:
        raise _refused(provider, doing, error.response) from None  # pyright: ignore[reportArgumentType]
    except (BotoCoreError, Boto3Error, HTTPError, ParserError) as error:
        if isinstance(error.__context__, ClientError):  # an upload that S3 refused
            raise _refused(provider, doing, error.__context__.response) from None  # pyright: ignore[reportArgumentType]
        # no connection, a time-out, a parameter that botocore refuses
        wrong = type(error).__name__ == "ParamValidationError"
        text = without_secrets((str(error).splitlines() or [type(error).__name__])[-1])
        made = (ProviderError if wrong else ProviderUnsettled)(f"{provider}: {doing} failed: {text}")
        made.turned_away = once.turned_away(None, None, error)
        raise made from None


def _refused(provider: str, doing: str, response: Mapping[str, Any]) -> ProviderError:
    """The error to raise for what a service answered."""
    told, about = response.get("Error", {}), response.get("ResponseMetadata", {})
    code = str(told.get("Code", "unknown"))
    code = code[:1].upper() + code[1:]  # inside a stream: throttlingException
    text, status = without_secrets(str(told.get("Message", ""))), int(about.get("HTTPStatusCode", 0))
    headers: Mapping[str, str] = about.get("HTTPHeaders", {})
    kind = ProviderUnsettled if status >= 500 or status == 429 or code.startswith(BUSY) else ProviderError
    gone = code.startswith(("ResourceNotFound", "NoSuch")) or any(word in text.lower() for word in GONE)
    mend = _clock(code, text, headers.get("date")) or _mend(code, status, doing)
    message = f"{provider}: {doing} failed with {status} {code}: {text}{mend}"
    after = headers.get("retry-after")
    made = kind(message, 404 if gone and kind is ProviderError else status, code, once.seconds(after))
    made.turned_away = code.startswith(THROTTLED) or once.turned_away(status, after)
    return made


def _clock(code: str, text: str, date: str | None) -> str:
    """What to do where this machine's clock is the reason of a refusal, else nothing. `date`: the answer's header."""
    try:
        ahead = datetime.datetime.now(datetime.UTC) - parsedate_to_datetime(date or "")
    except (ValueError, TypeError):  # none, or one without a zone
        ahead = datetime.timedelta()
    said = code.startswith(SKEWED) or any(word in text for word in SIGNED_AT)
    if not said and not (code.startswith(SIGNATURES) and abs(ahead) > SKEW):
        return ""
    off = f"{abs(ahead).total_seconds() / 60:.0f} minutes {'ahead of' if ahead > NONE else 'behind'}" if ahead else "too far from"
    return (
        f" This machine's clock is {off} AWS's, which therefore takes none of its requests. Set it right (`timedatectl set-ntp "
        "true`, or the time service of its host), then run the same again."
    )


def is_there(error: ProviderError) -> bool:
    """Whether a creation was refused because what it would make is there already."""
    return (error.code or "").startswith(THERE) or "already exist" in str(error)


def _mend(code: str, status: int, doing: str) -> str:
    if code.startswith(("AccessDenied", "UnrecognizedClient", *SIGNATURES, "ExpiredToken", "InvalidClientTokenId")):
        mend = (
            " The credentials, or the role in remote.aws.role, may not do this: renew them (AWS_PROFILE, …), allow the "
            "action in their policy, or ask for access to the model in its region."
        )
        return f"{mend} No job was created; or train elsewhere: {ELSEWHERE}" if doing.startswith("creating the job") else mend
    if doing.startswith("creating the job") and status < 500 and not code.startswith(BUSY):
        return (
            " No job was created. Correct what it names (base_model, or remote.aws: region, role, bucket), or raise the "
            f"account's quota. Where the account may not train this model, train elsewhere: {ELSEWHERE}"
        )
    if code.startswith(("ResourceNotFound", "NoSuch")):
        return " Correct its name or remote.aws.region, and see in the AWS console whether it was deleted."
    return ""


def chat(url: str, model: str, body: Mapping[str, Any], timeout: float = 60.0) -> dict[str, Any]:
    """One reply in the shape of OpenAI's chat completion, with usage. Raises ProviderError, SettingsError."""
    service, _, region = url.partition("://")
    ask = _converse if service == "bedrock" else _invoke
    with translated(service, f"asking {model}"):
        return ask(client(service, f"{service}-runtime", region.strip("/") or None, timeout), model, body)


def events(url: str, model: str, body: Mapping[str, Any], timeout: float = 60.0) -> Generator[dict[str, Any]]:
    """`chat` as the events of OpenAI's stream: Bedrock's as they come, SageMaker's reply whole. Raises as `chat` does."""
    service, _, region = url.partition("://")
    if service != "bedrock":
        yield from _as_events(chat(url, model, body, timeout))
        return
    ended = False
    with translated(service, f"asking {model}"):
        runtime = client(service, f"{service}-runtime", region.strip("/") or None, timeout)
        with closing(runtime.converse_stream(**_asked(model, body))["stream"]) as stream:
            for event in stream:
                ended = ended or "messageStop" in event
                yield from _chunk(event)
    if not ended:
        raise ProviderUnsettled(f"bedrock: {model} broke off in the middle of a reply.")


def _converse(runtime: Any, model: str, body: Mapping[str, Any]) -> dict[str, Any]:
    answer = runtime.converse(**_asked(model, body))
    text = "".join(part.get("text", "") for part in answer["output"]["message"]["content"])
    end = ENDS.get(str(answer.get("stopReason")), "stop")
    return completion(model, text, end, _usage(answer))


def _asked(model: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """What Converse and ConverseStream take."""
    if body.get("tools"):
        raise ProviderError("bedrock: tools are not passed on to Bedrock models; ask without tools, or another version.")
    stop, most = body.get("stop"), body.get("max_tokens") or body.get("max_completion_tokens")
    asked = {"maxTokens": most, "temperature": body.get("temperature"), "topP": body.get("top_p")}
    asked["stopSequences"] = [stop] if isinstance(stop, str) else stop
    system = [{"text": m["content"]} for m in body["messages"] if m["role"] in ("system", "developer")]
    config = {key: value for key, value in asked.items() if value is not None}
    made = {"modelId": model, "messages": turns(body["messages"]), "inferenceConfig": config}
    return {**made, "system": system} if system else made


def _usage(told: Mapping[str, Any]) -> dict[str, int]:
    """Bedrock's counts of tokens under OpenAI's names."""
    usage = told.get("usage") or {}
    asked, said = int(usage.get("inputTokens") or 0), int(usage.get("outputTokens") or 0)
    return {"prompt_tokens": asked, "completion_tokens": said, "total_tokens": asked + said}


def _chunk(event: Mapping[str, Any]) -> list[dict[str, Any]]:
    """OpenAI's event for one of ConverseStream; none for those that only begin and end a block."""
    if "messageStart" in event:
        return [_piece({"role": "assistant", "content": ""})]
    if text := event.get("contentBlockDelta", {}).get("delta", {}).get("text"):
        return [_piece({"content": text})]
    if "messageStop" in event:
        return [_piece({}, ENDS.get(str(event["messageStop"].get("stopReason")), "stop"))]
    return [_piece(None, usage=_usage(event["metadata"]))] if "metadata" in event else []


def _as_events(made: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A whole completion as the events of a stream: text and tool calls at once, the end, the usage."""
    choice = made["choices"][0]
    message: dict[str, Any] = choice["message"]
    calls = [{"index": n, **call} for n, call in enumerate(message.get("tool_calls") or [])]
    said = _piece({"role": "assistant", "content": message["content"], **({"tool_calls": calls} if calls else {})})
    return [said, _piece({}, choice.get("finish_reason") or "stop"), _piece(None, usage=made.get("usage") or {})]


def _piece(delta: dict[str, Any] | None, end: str | None = None, usage: Mapping[str, Any] | None = None) -> dict[str, Any]:
    choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": end}]
    made = {"id": "chatcmpl-aws", "object": "chat.completion.chunk", "created": int(time.time()), "choices": choices}
    return made if usage is None else {**made, "usage": usage}


def turns(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """User's and assistant's turns in alternation, as Converse wants them: several of one role in a row are one."""
    made: list[dict[str, Any]] = []
    for message in messages:
        if message["role"] not in ("user", "assistant") or not message.get("content"):
            continue
        part = {"text": message["content"]}
        if made and made[-1]["role"] == message["role"]:
            made[-1]["content"].append(part)
        else:
            made.append({"role": message["role"], "content": [part]})
    return made


def _invoke(runtime: Any, model: str, body: Mapping[str, Any]) -> dict[str, Any]:
    data = json.dumps({**{key: value for key, value in body.items() if key != "stream_options"}, "stream": False}).encode()
    answer = runtime.invoke_endpoint(EndpointName=model, ContentType="application/json", Accept="application/json", Body=data)
    try:
        made: dict[str, Any] = json.loads(answer["Body"].read())
        made["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError):
        raise ProviderError(
            f"sagemaker: the endpoint {model} does not answer like OpenAI's chat; deploy it with a container that does (LMI, "
            "vLLM, TGI with its Messages API)."
        ) from None
    return made


def completion(model: str, text: str, finish_reason: str, usage: Mapping[str, int]) -> dict[str, Any]:
    """OpenAI's chat completion."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}
    return {"object": "chat.completion", "model": model, "choices": [choice], "usage": usage}
