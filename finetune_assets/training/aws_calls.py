"""Calls to AWS: clients, what their errors mean, and one chat with a model that Bedrock or SageMaker serves.

An address of such a model is `bedrock://REGION` or `sagemaker://REGION`, its name a deployment's or model's ARN, or an endpoint's
name. `chat` takes and gives OpenAI's chat completion, so whoever asks a model over HTTP asks these the same way:
Bedrock by Converse, SageMaker by `invoke_endpoint` of a container that speaks OpenAI's chat (LMI, vLLM, TGI). Plain boto3.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from finetune_assets.errors import ProviderError, ProviderUnsettled, SettingsError
from finetune_assets.training.remote import without_secrets

SCHEMES = ("bedrock://", "sagemaker://")
BUSY = (
    *("Throttl", "RequestThrottled", "EC2Throttled", "TooManyRequests", "RequestLimitExceeded", "BandwidthLimitExceeded"),
    *("ProvisionedThroughputExceeded", "TransactionInProgress", "LimitExceededException", "PriorRequestNotComplete", "SlowDown"),
    *("ServiceUnavailable", "InternalServer", "InternalFailure", "RequestTimeout", "ModelNotReady", "ModelTimeout"),
)
"""Beginnings of codes that mean: later. Those of throttling are botocore's (`retries/standard.py`); the status is 400 or 429."""
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


@lru_cache(maxsize=32)
def client(provider: str, service: str, region: str | None, timeout: float | None = None, tries: int = 3) -> Any:
    """A boto3 client, which threads may share. Raises SettingsError where boto3 or a region is missing."""
    try:
        from boto3.session import Session
        from botocore.config import Config  # noqa: PLC0415
        from botocore.exceptions import NoRegionError, ProfileNotFound  # noqa: PLC0415
    except ModuleNotFoundError:
        raise SettingsError(f"{provider} needs boto3: pip install 'finetune-assets[aws]'.") from None
    patience: dict[str, Any] = {"read_timeout": timeout, "connect_timeout": timeout} if timeout else {}
    retries: dict[str, Any] = {"mode": "standard", "total_max_attempts": tries}
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
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError  # noqa: PLC0415

    try:
        yield
    except (NoCredentialsError, PartialCredentialsError):
        raise SettingsError(
            f"{provider}: no AWS credentials. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or a role."
        ) from None
    except ClientError as error:
        told: dict[str, Any] = error.response.get("Error", {})  # pyright: ignore[reportAssignmentType]
        code, text = str(told.get("Code", "unknown")), without_secrets(str(told.get("Message", "")))
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        kind = ProviderUnsettled if status >= 500 or status == 429 or code.startswith(BUSY) else ProviderError
        gone = code.startswith(("ResourceNotFound", "NoSuch")) or any(word in text.lower() for word in GONE)
        message = f"{provider}: {doing} failed with {status} {code}: {text}{_mend(code, status, doing)}"
        raise kind(message, 404 if gone and kind is ProviderError else status, code) from None
    except (BotoCoreError, Boto3Error) as error:  # no connection, a time-out, a parameter that botocore refuses
        wrong = type(error).__name__ == "ParamValidationError"
        text = without_secrets(str(error).splitlines()[-1])
        raise (ProviderError if wrong else ProviderUnsettled)(f"{provider}: {doing} failed: {text}") from None


def is_there(error: ProviderError) -> bool:
    """Whether a creation was refused because what it would make is there already."""
    return (error.code or "").startswith(THERE) or "already exist" in str(error)


def _mend(code: str, status: int, doing: str) -> str:
    if code.startswith(("AccessDenied", "UnrecognizedClient", "InvalidSignature", "ExpiredToken", "InvalidClientTokenId")):
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


def _converse(runtime: Any, model: str, body: Mapping[str, Any]) -> dict[str, Any]:
    if body.get("tools"):
        raise ProviderError("bedrock: tools are not passed on to Bedrock models; ask without tools, or another version.")
    asked = {"maxTokens": body.get("max_tokens"), "temperature": body.get("temperature"), "topP": body.get("top_p")}
    system = [{"text": m["content"]} for m in body["messages"] if m["role"] in ("system", "developer")]
    answer = runtime.converse(
        modelId=model,
        messages=turns(body["messages"]),
        inferenceConfig={key: value for key, value in asked.items() if value is not None},
        **({"system": system} if system else {}),
    )
    text = "".join(part.get("text", "") for part in answer["output"]["message"]["content"])
    usage = answer.get("usage") or {}
    end = ENDS.get(str(answer.get("stopReason")), "stop")
    return completion(model, text, end, int(usage.get("inputTokens") or 0), int(usage.get("outputTokens") or 0))


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


def completion(model: str, text: str, finish_reason: str, prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
    """OpenAI's chat completion."""
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
    return {
        "object": "chat.completion",
        "model": model,
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}],
        "usage": {**usage, "total_tokens": prompt_tokens + completion_tokens},
    }
