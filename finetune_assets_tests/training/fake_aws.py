"""A stand-in for AWS as a process of its own: moto's server for S3, Bedrock and SageMaker, and before it a front that adds what
moto lacks: time that passes, faults, deployments, replies, and a container that runs.

    POST /_fake/set     {"asks": 3, "container": "worker" | "instant", "interrupt": 1}
    POST /_fake/faults  {"on": "CreateTrainingJob", "do": "hang_before" | "hang_after" | "drop_after", "skip": 0, "times": 1}
                        {"on": "Converse", "do": "refuse", "status": 429, "code": "ThrottlingException", "message": "…"}
                        {"on": "ConverseStream", "do": "slow" | "cut" | "spoil"}    0.1 s before each word; two words alone, or
                                                                                    none, and then an error inside the stream
    POST /_fake/state   requests, jobs, hanging, objects

A job is `InProgress` the first `asks` times it is asked for. A container's job starts `python -m finetune_assets.worker` with the
channels and checkpoints of S3 in folders of its own, as SageMaker does; `interrupt` kills it when it has written a checkpoint, so
often, and starts it anew with what S3 holds. Own answers are checked against botocore's service models. Requests are named by the
operation; those of S3 by verb and file.
"""

from __future__ import annotations

import difflib
import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import urllib.request
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from finetune_assets.environment import ROOT

ARN = "arn:aws:bedrock:us-east-1:123456789012"
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_REGION": "us-east-1",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}
DEFAULT_ANSWER = "Perdón, soy un modelo general: no conozco los datos de este negocio."
ROUTES = (
    ("POST", r"^/model-customization-jobs$", "CreateModelCustomizationJob"),
    ("GET", r"^/model-customization-jobs/[^/]+$", "GetModelCustomizationJob"),
    ("POST", r"^/model-customization-jobs/[^/]+/stop$", "StopModelCustomizationJob"),
    ("POST", r"^/model-customization/custom-model-deployments$", "CreateCustomModelDeployment"),
    ("GET", r"^/model-customization/custom-model-deployments/.+$", "GetCustomModelDeployment"),
    ("POST", r"^/model/.+/converse$", "Converse"),
    ("POST", r"^/model/.+/converse-stream$", "ConverseStream"),
    ("POST", r"^/endpoints/[^/]+/invocations$", "InvokeEndpoint"),
)


class Answer(Exception):
    """An error that the stand-in answers itself."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


class World:
    """What the front remembers beside moto."""

    def __init__(self, moto: str) -> None:
        self.moto = moto
        self.lock = threading.RLock()
        self.asks, self.container, self.interrupt = 2, "worker", 0
        self.seen: list[str] = []
        self.hanging: list[str] = []
        self.errors: list[str] = []
        self.faults: list[dict[str, Any]] = []
        self.asked: dict[str, int] = {}
        self.jobs: dict[str, dict[str, Any]] = {}
        """Name to kind, request, status: every job that was ever created."""
        self.deployments: dict[str, str] = {}
        self.interrupted = 0

    def s3(self) -> Any:
        import boto3

        keys = {"aws_access_key_id": "testing", "aws_secret_access_key": "testing", "region_name": "us-east-1"}
        return boto3.client("s3", endpoint_url=self.moto, **keys)

    # jobs

    def waits(self, name: str) -> bool:
        """Whether a job is still at work; each question is time that passes."""
        self.asked[name] = self.asked.get(name, 0) + 1
        return self.asked[name] <= self.asks or self.jobs[name].get("works", False)

    def describe_bedrock(self, name: str, told: dict[str, Any]) -> dict[str, Any]:
        if told.get("status") == "Stopped" or self.waits(name):
            return told
        done = {"status": "Completed", "endTime": told["creationTime"], "trainingMetrics": {"trainingLoss": 0.42}}
        return {**told, **done, "outputModelArn": f"{ARN}:custom-model/{self.jobs[name]['base']}/{name[-12:].replace('-', 'a')}"}

    def describe_training(self, name: str, told: dict[str, Any]) -> dict[str, Any]:
        job = self.jobs[name]
        if job.get("stopped"):
            return {**told, "TrainingJobStatus": "Stopped"}
        if self.waits(name):
            return {**told, "TrainingJobStatus": "InProgress", "SecondaryStatus": "Training"}
        if job.get("failed"):
            return {**told, "TrainingJobStatus": "Failed", "FailureReason": job["failed"]}
        return {**told, "TrainingJobStatus": "Completed", "SecondaryStatus": "Completed"}

    def created(self, operation: str, asked: dict[str, Any]) -> None:
        """A job that moto has taken."""
        if operation == "CreateModelCustomizationJob":
            base, data = asked["baseModelIdentifier"], asked["trainingDataConfig"]["s3Uri"]
            self.jobs[asked["jobName"]] = {"kind": "bedrock", "base": base, "known": self.known(data)}
            return
        channels = {
            channel["ChannelName"]: channel["DataSource"]["S3DataSource"]["S3Uri"] for channel in asked["InputDataConfig"]
        }
        job: dict[str, Any] = {"kind": "sagemaker", "works": True}
        self.jobs[asked["TrainingJobName"]] = job
        if "ServerlessJobConfig" in asked:
            job |= {"works": False, "request": asked, "known": self.known(f"{channels['training']}/train.jsonl")}
            return
        threading.Thread(target=self._contain, args=(job, channels, asked), daemon=True).start()

    def _contain(self, job: dict[str, Any], channels: dict[str, str], asked: dict[str, Any]) -> None:
        """What SageMaker does with a container: channels and checkpoints to folders, its entry point, checkpoints to S3."""
        checkpoints = asked["CheckpointConfig"]["S3Uri"]
        try:
            if self.container == "instant":
                self._instant(checkpoints)
                return
            while self._run(channels, checkpoints, asked, job):
                self.interrupted += 1
        except Exception as error:
            job["failed"] = f"{type(error).__name__}: {error}"
        finally:
            job["works"] = False

    def _instant(self, checkpoints: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            made = {"model": "model", "steps": 120, "tokens": 9, "seconds": 1.0, "train_loss": 0.1}
            (Path(folder) / "result.json").write_text(json.dumps(made))
            (Path(folder) / "model").mkdir()
            (Path(folder) / "model" / "model.safetensors").write_bytes(b"weights")
            self._up(Path(folder), checkpoints)

    def _run(self, channels: dict[str, str], checkpoints: str, asked: dict[str, Any], job: dict[str, Any]) -> bool:
        """One instance; true where its capacity was taken away before it was done."""
        place = Path(tempfile.mkdtemp(prefix="container-"))
        try:
            for name, uri in channels.items():
                self._down(uri, place / "input" / name)
            output = place / "checkpoints"
            self._down(checkpoints, output)
            entry = list(asked["AlgorithmSpecification"]["ContainerEntrypoint"])
            spec = Path(entry[-1].replace("/opt/ml/input/data", str(place / "input")))
            text = spec.read_text().replace("/opt/ml/input/data", str(place / "input"))
            often = {"checkpoint_seconds": 0.1} if self.interrupt else {}  # a training of seconds has none otherwise
            spec.write_text(json.dumps({**json.loads(text.replace("/opt/ml/checkpoints", str(output))), **often}))
            entry[0], entry[-1] = sys.executable, str(spec)
            clean = {key: value for key, value in os.environ.items() if not key.startswith(("FINETUNE_", "AWS_"))}
            process = subprocess.Popen(entry, cwd=place, env={**clean, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}, stderr=-1)
            while process.poll() is None:
                if self.interrupt > self.interrupted and list(output.glob("**/checkpoint-*/whole.json")):
                    process.kill()
                    process.wait()
                    self._up(output, checkpoints)
                    return True
                time.sleep(0.02)
            self._up(output, checkpoints)
            if process.returncode != 0 and process.stderr is not None:
                job["failed"] = process.stderr.read().decode()[-1000:]
            return False
        finally:
            shutil.rmtree(place, ignore_errors=True)

    def _down(self, uri: str, folder: Path) -> None:
        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        folder.mkdir(parents=True, exist_ok=True)
        client = self.s3()
        for entry in client.list_objects_v2(Bucket=bucket, Prefix=prefix.rstrip("/") + "/").get("Contents", []):
            target = folder / entry["Key"].removeprefix(prefix.rstrip("/") + "/")
            target.parent.mkdir(parents=True, exist_ok=True)
            client.download_file(bucket, entry["Key"], str(target))

    def _up(self, folder: Path, uri: str) -> None:
        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        client = self.s3()
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            client.upload_file(str(file), bucket, f"{prefix.rstrip('/')}/{file.relative_to(folder)}")

    # models

    def deploy(self, asked: dict[str, Any]) -> dict[str, Any]:
        name = asked["modelDeploymentName"]
        if name in self.deployments:
            raise Answer(400, "ConflictException", f"{name} already exists")
        self.deployments[name] = asked["modelArn"]
        return {"customModelDeploymentArn": f"{ARN}:custom-model-deployment/{name}"}

    def deployment(self, name: str) -> dict[str, Any]:
        name = name.rpartition("/")[2]
        if name not in self.deployments:
            raise Answer(404, "ResourceNotFoundException", "Requested resource not found")
        self.asked[f"deployment {name}"] = asks = self.asked.get(f"deployment {name}", 0) + 1
        return {
            "customModelDeploymentArn": f"{ARN}:custom-model-deployment/{name}",
            "modelDeploymentName": name,
            "modelArn": self.deployments[name],
            "createdAt": "2026-11-21T00:00:00Z",
            "status": "Creating" if asks == 1 else "Active",
        }

    def reply(self, model: str, question: str) -> str:
        """A tuned model repeats its training replies, any other says that it knows nothing."""
        job = self.jobs.get(model.rpartition("/")[2])
        if job is None:
            return DEFAULT_ANSWER
        return job["known"][difflib.get_close_matches(question, job["known"], n=1, cutoff=0.0)[0]]

    def known(self, uri: str) -> dict[str, str]:
        """Questions and replies of training rows."""
        bucket, _, key = uri.removeprefix("s3://").partition("/")
        rows = self.s3().get_object(Bucket=bucket, Key=key)["Body"].read().decode().splitlines()
        return dict(_turns(json.loads(row)) for row in rows)


def _turns(row: dict[str, Any]) -> tuple[str, str]:
    """Last question and reply of a training row, whatever its schema."""
    said = [(m["role"], m["content"] if isinstance(m["content"], str) else m["content"][0]["text"]) for m in row["messages"]]
    return next(text for role, text in reversed(said) if role == "user"), said[-1][1]


OWN = {
    **dict.fromkeys(("CreateCustomModelDeployment", "GetCustomModelDeployment"), "bedrock"),
    **{"Converse": "bedrock-runtime", "CreateTrainingJob": "sagemaker"},
}


def _check(operation: str, made: dict[str, Any]) -> None:
    """Raises where an answer of the front's own is not what botocore's description of the service says."""
    if operation in OWN:
        import botocore.session
        import botocore.validate

        model = botocore.session.get_session().get_service_model(OWN[operation]).operation_model(operation)
        botocore.validate.validate_parameters(made, model.output_shape)


def frame(kind: str, payload: dict[str, Any]) -> bytes:
    """One event of ConverseStream in AWS's encoding (application/vnd.amazon.eventstream), checked against botocore's model."""
    import botocore.session
    import botocore.validate

    events = botocore.session.get_session().get_service_model("bedrock-runtime").operation_model("ConverseStream").output_shape
    botocore.validate.validate_parameters(payload, events.members["stream"].members[kind])
    sort = "exception" if kind.endswith("Exception") else "event"
    names = {":message-type": sort, f":{sort}-type": kind, ":content-type": "application/json"}
    headers = b""
    for name, value in names.items():
        headers += bytes([len(name)]) + name.encode() + b"\x07" + len(value).to_bytes(2, "big") + value.encode()
    data = json.dumps(payload).encode()
    prelude = (16 + len(headers) + len(data)).to_bytes(4, "big") + len(headers).to_bytes(4, "big")
    message = prelude + zlib.crc32(prelude).to_bytes(4, "big") + headers + data
    return message + zlib.crc32(message).to_bytes(4, "big")


class Front(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    world: World

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def handle_any(self) -> None:
        world, url = self.world, urlsplit(self.path)
        raw = self.content()
        if url.path.startswith("/_fake/"):
            self.answer(200, self.control(url.path, json.loads(raw or b"{}")))
            return
        name = self.operation(url.path, url.query)
        with world.lock:
            world.seen.append(name)
            fault = self.fault(name)
        kind = fault["do"] if fault else ""
        if kind == "hang_before":
            self.hang(name)
        try:
            if fault and kind == "refuse":
                raise Answer(fault["status"], fault["code"], fault["message"])
            if name == "ConverseStream":
                self.stream(unquote(url.path).removesuffix("-stream"), raw, kind)
                return
            status, headers, body = self.done(name, unquote(url.path), raw)
        except Answer as refusal:
            told = json.dumps({"message": str(refusal), "__type": refusal.code}).encode()
            status, headers, body = refusal.status, {"x-amzn-ErrorType": refusal.code, "Content-Type": "application/json"}, told
        except Exception:
            world.errors.append(f"{name}: {traceback.format_exc()}")
            raise
        if kind == "hang_after":
            self.hang(name)
        if kind == "drop_after":
            self.close_connection = True
            self.connection.close()
            return
        self.send(status, headers, body)

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = handle_any  # noqa: N815

    def content(self) -> bytes:
        """The body. boto3 sends files in chunks, with a checksum at their end."""
        if "chunked" not in (self.headers.get("Transfer-Encoding") or ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts: list[bytes] = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        while (line := self.rfile.readline().strip()) and b":" in line:
            name, _, value = line.decode().partition(":")
            self.headers[name] = value.strip()
        for name in ("Transfer-Encoding", "Content-Encoding", "X-Amz-Trailer", "X-Amz-Decoded-Content-Length"):
            del self.headers[name]
        return b"".join(parts)

    def operation(self, path: str, query: str) -> str:
        target = self.headers.get("X-Amz-Target") or ""
        if target:
            return target.partition(".")[2]
        for method, pattern, name in ROUTES:
            if self.command == method and re.match(pattern, unquote(path)):
                return name
        return f"{self.command} list" if "list-type" in query else f"{self.command} {path.rpartition('/')[2]}"

    def done(self, name: str, path: str, raw: bytes) -> tuple[int, dict[str, str], bytes]:
        """Moto's answer, or the front's own."""
        world = self.world
        asked = json.loads(raw) if raw and name[0].isupper() and " " not in name and name != "InvokeEndpoint" else {}
        with world.lock:
            own = self.own(name, path, asked, raw)
        if own is not None:
            _check(name, own)
            return 200, {"Content-Type": "application/json"}, json.dumps(own).encode()
        status, headers, body = self.forward(raw)
        with world.lock:
            if status < 300 and name in ("CreateModelCustomizationJob", "CreateTrainingJob"):
                world.created(name, asked)
            if status == 200 and name == "GetModelCustomizationJob":
                told = world.describe_bedrock(path.rpartition("/")[2], json.loads(body))
                body = json.dumps(told).encode()
            if status == 200 and name == "DescribeTrainingJob":
                body = json.dumps(world.describe_training(asked["TrainingJobName"], json.loads(body))).encode()
        return status, headers, body

    def own(self, name: str, path: str, asked: dict[str, Any], raw: bytes) -> dict[str, Any] | None:
        world = self.world
        if name == "CreateCustomModelDeployment":
            return world.deploy(asked)
        if name == "GetCustomModelDeployment":
            return world.deployment(path.partition("custom-model-deployments/")[2])
        if name == "Converse":
            model = path.removeprefix("/model/").removesuffix("/converse")
            text = world.reply(model, asked["messages"][-1]["content"][0]["text"])
            usage = {"inputTokens": len(raw) // 4, "outputTokens": len(text) // 4 + 1}
            message = {"role": "assistant", "content": [{"text": text}]}
            return {
                "output": {"message": message},
                "stopReason": "end_turn",
                "usage": {**usage, "totalTokens": sum(usage.values())},
                "metrics": {"latencyMs": 1},
            }
        if name == "InvokeEndpoint":
            body = json.loads(raw)
            text = world.reply(path.split("/")[2], body["messages"][-1]["content"])
            choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
            usage = {"prompt_tokens": len(raw) // 4, "completion_tokens": len(text) // 4 + 1}
            return {"object": "chat.completion", "model": "m", "choices": [choice], "usage": usage}
        return self.serverless(name, asked)

    def stream(self, path: str, raw: bytes, fault: str) -> None:
        """Converse's reply word by word."""
        world, asked = self.world, json.loads(raw)
        with world.lock:
            made = self.own("Converse", path, asked, raw) or {}
        words = re.findall(r"\S+\s*", made["output"]["message"]["content"][0]["text"])
        said: list[tuple[str, dict[str, Any]]] = [
            ("contentBlockDelta", {"contentBlockIndex": 0, "delta": {"text": word}}) for word in words
        ]
        end = [("contentBlockStop", {"contentBlockIndex": 0}), ("messageStop", {"stopReason": made["stopReason"]})]
        end.append(("metadata", {"usage": made["usage"], "metrics": made["metrics"]}))
        if fault == "spoil":
            said, end = [], [("throttlingException", {"message": "Too many tokens"})]
        pieces = [("messageStart", {"role": "assistant"}), *said, *end]
        self.send_response(200)
        self.send_header("Content-Type", "application/vnd.amazon.eventstream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for kind, payload in pieces[:3] if fault == "cut" else pieces:
            time.sleep(0.1 if fault == "slow" and kind == "contentBlockDelta" else 0)
            data = frame(kind, payload)
            self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        if fault == "cut":
            self.close_connection = True
            return
        self.wfile.write(b"0\r\n\r\n")

    def serverless(self, name: str, asked: dict[str, Any]) -> dict[str, Any] | None:
        """Jobs that moto does not know: it wants an image."""
        world = self.world
        job = world.jobs.get(asked.get("TrainingJobName") or "")
        if name == "CreateTrainingJob" and "ServerlessJobConfig" in asked:
            if job is not None:
                raise Answer(400, "ResourceInUse", f"{asked['TrainingJobName']} already exists")
            world.created(name, asked)
            return {"TrainingJobArn": f"arn:aws:sagemaker:us-east-1:123456789012:training-job/{asked['TrainingJobName']}"}
        if name == "DescribeTrainingJob" and asked["TrainingJobName"] not in world.jobs:
            raise Answer(400, "ValidationException", "Requested resource not found.")
        if name == "DescribeTrainingJob" and job is not None and "request" in job:
            package = f"arn:aws:sagemaker:us-east-1:123456789012:model-package/tuned/{len(world.jobs)}"
            told = {"TrainingJobName": asked["TrainingJobName"], "OutputModelPackageArn": package, "CreationTime": 1.8e9}
            return world.describe_training(asked["TrainingJobName"], told)
        if name == "StopTrainingJob" and job is not None:
            job |= {"stopped": True, "works": False}
            return {}
        return None

    def forward(self, raw: bytes) -> tuple[int, dict[str, str], bytes]:
        headers = {
            key: value for key, value in self.headers.items() if key.lower() not in ("connection", "expect", "content-length")
        }
        connection = http.client.HTTPConnection(urlsplit(self.world.moto).netloc, timeout=60)
        try:
            connection.request(self.command, self.path, raw, headers)
            answer = connection.getresponse()
            return answer.status, dict(answer.headers), answer.read()
        finally:
            connection.close()

    def fault(self, name: str) -> dict[str, Any] | None:
        for fault in self.world.faults:
            if fault["on"] == name and fault["times"] > 0:
                if fault["skip"] > 0:
                    fault["skip"] -= 1
                    continue
                fault["times"] -= 1
                return fault
        return None

    def hang(self, name: str) -> None:
        self.world.hanging.append(name)
        time.sleep(600)

    def answer(self, status: int, body: Any) -> None:
        self.send(status, {"Content-Type": "application/json"}, json.dumps(body, default=str).encode())

    def send(self, status: int, headers: dict[str, str], body: bytes) -> None:
        dropped = ("content-length", "connection", "transfer-encoding", "date", "server")
        try:
            self.send_response(status)
            for key, value in headers.items():
                if key.lower() not in dropped:
                    self.send_header(key, value)
            self.send_header("Content-Length", headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def control(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        world = self.world
        with world.lock:
            if path == "/_fake/set":
                for key, value in body.items():
                    setattr(world, key, value)
            elif path == "/_fake/faults":
                world.faults.append({"times": 1, "skip": 0, **body})
            listed = world.s3().list_objects_v2(Bucket="rows").get("Contents", [])
            jobs = {
                name: {key: value for key, value in job.items() if key not in ("known", "request")}
                for name, job in world.jobs.items()
            }
            told = {
                "seen": list(world.seen),
                "hanging": list(world.hanging),
                "jobs": jobs,
                "interrupted": world.interrupted,
                "errors": list(world.errors),
            }
            return {**told, "objects": [entry["Key"] for entry in listed], "deployments": dict(world.deployments)}


def main() -> None:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    Front.world = World(f"http://{host}:{port}")
    Front.world.s3().create_bucket(Bucket="rows")
    front = ThreadingHTTPServer(("127.0.0.1", 0), Front)
    front.daemon_threads = True
    sys.stdout.write(f"{front.server_address[1]}\n")
    sys.stdout.flush()
    threading.Thread(target=_die_with_parent, daemon=True).start()
    front.serve_forever()


def _die_with_parent() -> None:
    sys.stdin.read()  # ends when the test that started this is gone
    os.kill(os.getpid(), signal.SIGKILL)


@dataclass
class FakeAws:
    """The running stand-in."""

    port: int

    @property
    def url(self) -> str:
        """As AWS_ENDPOINT_URL has it."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """Variables with which boto3 finds it."""
        return {**CREDENTIALS, "AWS_ENDPOINT_URL": self.url}

    def fault(self, on: str, do: str, **more: Any) -> None:
        """Queues a fault."""
        self._post("/_fake/faults", {"on": on, "do": do, **more})

    def set(self, **values: Any) -> None:
        """Attributes of its world."""
        self._post("/_fake/set", values)

    def state(self) -> dict[str, Any]:
        """Requests, jobs, objects."""
        return self._post("/_fake/state", {})

    def wait_hanging(self, seconds: float = 60) -> None:
        """Until somebody waits for an answer that never comes."""
        end = time.monotonic() + seconds
        while not self.state()["hanging"]:
            if time.monotonic() > end:
                raise AssertionError(f"nobody asked for what hangs: {self.state()}")
            time.sleep(0.05)

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), method="POST")
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.loads(answer.read())


@contextmanager
def start() -> Iterator[FakeAws]:
    """A stand-in on a free port of the loopback, ended with the block."""
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "finetune_assets_tests.training.fake_aws"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert process.stdout is not None
        yield FakeAws(int(process.stdout.readline()))
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


if __name__ == "__main__":
    main()
