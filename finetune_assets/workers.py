"""Where child processes run, and what a Ray job or a pod that runs one is made of.

Everywhere it is `python -m finetune_assets.worker SPEC` with the same spec, in the image of this project, with FINETUNE_HOME at
the same path on a disk that all machines share. Secrets are never passed on: a Ray job or a pod has them in its own environment.
Imports no Dagster, and a cluster's library only where one is asked.
"""

from __future__ import annotations

import importlib
import json
import os
import shlex
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import yaml

from finetune_assets.errors import SettingsError

LAUNCHERS = ("subprocess", "ray", "kubernetes")
LAUNCHED = "launched-{}.json"
"""In the folder of a task while a cluster may be at work on it: launcher, id, and what finds it there."""

LABEL = "finetune-assets/task"
"""Label of a pod: the id of its task."""

NEEDS = {"ray": ("dagster_ray", "ray"), "kubernetes": ("dagster_k8s", "kubernetes")}
PASSED_ON = (
    *("HF_HUB_OFFLINE", "FINETUNE_HOME", "FINETUNE_MEMORY_GB", "FINETUNE_LOOKBACK_WEEKS", "FINETUNE_FIRST_WEEK"),
    *("FINETUNE_ASSISTANTS", "FINETUNE_SOURCE_MAPPING", "FINETUNE_SOURCE_SECONDS", "FINETUNE_PRESIDIO"),
    "FINETUNE_MAX_VANISHED",
)
"""Settings that a worker elsewhere must share; none is a secret."""


@dataclass(frozen=True)
class Workers:
    """How child processes are started."""

    launcher: str = "subprocess"
    python: str = "python"
    """Interpreter in the cluster's image; a subprocess takes this one's."""
    cpus: float = 1.0
    gpus: float = 0.0
    """What a Ray job asks for; a pod's template says it itself."""
    pod: Path | None = None
    ray_address: str = "http://127.0.0.1:8265"
    weeks: int = 1
    """Workers that build weeks of the corpus at once; 1: no worker, the run's own process."""
    processes: int = 1
    """Of one training: one for each GPU of a machine."""
    nodes: int = 1
    """Machines of one training."""
    rendezvous: str | None = None
    """Where they meet: address of this machine, and a free port."""
    parallel: str = "ddp"
    """`ddp`: each process holds the whole model; `fsdp`: weights, gradients and moments are divided among them."""

    @classmethod
    def read(cls, variables: Mapping[str, str], root: Path) -> Workers:
        """From the environment. Raises SettingsError."""
        launcher = variables.get("FINETUNE_LAUNCHER") or "subprocess"
        if launcher not in LAUNCHERS:
            raise SettingsError(f"FINETUNE_LAUNCHER={launcher!r} is unknown; allowed: {', '.join(LAUNCHERS)}.")
        return cls(
            launcher=launcher,
            python=variables.get("FINETUNE_WORKER_PYTHON") or "python",
            cpus=_number(variables, "FINETUNE_WORKER_CPUS", 1.0),
            gpus=_number(variables, "FINETUNE_WORKER_GPUS", 0.0),
            pod=root / (variables.get("FINETUNE_POD") or "deploy/pod.yaml"),
            ray_address=variables.get("RAY_ADDRESS") or cls.ray_address,
            weeks=_weeks(variables.get("FINETUNE_WEEK_WORKERS") or "1"),
            processes=_processes(variables.get("FINETUNE_PROCESSES") or "1"),
            **_nodes(variables, launcher),
            parallel=_parallel(variables.get("FINETUNE_PARALLEL") or cls.parallel),
        )

    @property
    def here(self) -> bool:
        """Whether children run on this machine, so that what it has tells what they have."""
        return self.launcher == "subprocess"

    @property
    def together(self) -> int:
        """Processes of one training, on all of its machines."""
        return self.processes * self.nodes

    @property
    def threads(self) -> int | None:
        """Threads of a child, where they are known beforehand."""
        return max(1, int(self.cpus)) if self.launcher == "ray" else None

    def check(self) -> None:
        """Raises SettingsError where the launcher's package is not installed."""
        package = NEEDS.get(self.launcher, ("", ""))[0]
        if package and find_spec(package) is None:
            raise SettingsError(
                f"FINETUNE_LAUNCHER={self.launcher} needs the package {package}: pip install 'finetune-assets[{self.launcher}]'."
            )


THIS_MACHINE = Workers()


def _number(variables: Mapping[str, str], name: str, default: float) -> float:
    text = variables.get(name) or str(default)
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < 1e4:
        raise SettingsError(f"{name}={text!r} makes no sense; write a number of at least 0, e.g. 1.")
    return number


def _processes(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 64:
        raise SettingsError(f"FINETUNE_PROCESSES={text!r} makes no sense; write a number from 1 to 64: one for each GPU.")
    return int(text)


def _weeks(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 64:
        raise SettingsError(f"FINETUNE_WEEK_WORKERS={text!r} makes no sense; write a number from 1 to 64: weeks built at once.")
    return int(text)


def _nodes(variables: Mapping[str, str], launcher: str) -> dict[str, Any]:
    """`nodes` and `rendezvous`."""
    text, where = variables.get("FINETUNE_NODES") or "1", variables.get("FINETUNE_RENDEZVOUS") or ""
    if not text.isdecimal() or not 1 <= int(text) <= 64:
        raise SettingsError(f"FINETUNE_NODES={text!r} makes no sense; write a number of machines from 1 to 64.")
    if text == "1":
        return {}
    host, _, port = where.rpartition(":")
    if not host or not port.isdecimal() or not 1 <= int(port) <= 65535:
        raise SettingsError(
            f"FINETUNE_NODES is {text}, but FINETUNE_RENDEZVOUS={where!r} does not say where they meet: write this machine's "
            "address, as the others see it, and a free port, e.g. 10.0.0.5:29500."
        )
    if launcher != "subprocess":
        raise SettingsError(
            f"FINETUNE_NODES={text} goes with FINETUNE_LAUNCHER=subprocess: where a {launcher} job will run is not known before. "
            "Take FINETUNE_PROCESSES for the GPUs of one machine, or run on one of the machines themselves."
        )
    return {"nodes": int(text), "rendezvous": where}


def _parallel(text: str) -> str:
    if text not in ("ddp", "fsdp"):
        raise SettingsError(
            f"FINETUNE_PARALLEL={text!r} is unknown; write ddp (each process holds the whole model) or fsdp (they divide it)."
        )
    return text


def is_postgres(source: str) -> bool:
    """Whether an address may hold a password: before the host or, as libpq takes it, among the parameters."""
    scheme, separator, _ = source.partition("://")
    return bool(separator) and scheme.partition("+")[0] in ("postgresql", "postgres")


def passed_on(variables: Mapping[str, str]) -> dict[str, str]:
    """What a worker on another machine is told of this one's environment. A source whose address may hold a password is not."""
    told = {name: variables[name] for name in PASSED_ON if variables.get(name)}
    source = variables.get("FINETUNE_SOURCE") or ""
    secret = any(is_postgres(one.strip()) for one in source.split(","))
    return told | ({"FINETUNE_SOURCE": source} if source and not secret else {})


def ray_job(workers: Workers, spec_file: Path, task_id: str, variables: Mapping[str, str]) -> dict[str, Any]:
    """The parameters of a Ray job submission."""
    command = [workers.python, "-m", "finetune_assets.worker", str(spec_file)]
    return {
        "entrypoint": shlex.join(command),
        "submission_id": task_id,
        "entrypoint_num_cpus": workers.cpus,
        "entrypoint_num_gpus": workers.gpus,
        "runtime_env": {"env_vars": passed_on(variables)},
    }


def pod(workers: Workers, spec_file: Path, task_id: str, variables: Mapping[str, str]) -> dict[str, Any]:
    """`metadata` and `spec` of the pod: the template with command, environment and label. Raises SettingsError."""
    template = _template(workers.pod)
    meta, spec = deepcopy(template.get("metadata") or {}), deepcopy(template["spec"])
    meta["labels"] = {**(meta.get("labels") or {}), LABEL: task_id}
    meta.pop("name", None)  # each pod has its own
    main = spec["containers"][0]
    main["command"] = [workers.python, "-m", "finetune_assets.worker", str(spec_file)]
    main.pop("args", None)
    own = {entry["name"] for entry in main.get("env") or []}
    told = [{"name": name, "value": value} for name, value in passed_on(variables).items() if name not in own]
    main["env"] = [*(main.get("env") or []), *told]
    return {"metadata": meta, "spec": {"restartPolicy": "Never", **spec}}


def _template(file: Path | None) -> dict[str, Any]:
    try:
        read = yaml.safe_load(file.read_text(encoding="utf-8")) if file else None
    except (OSError, yaml.YAMLError) as error:
        raise SettingsError(f"FINETUNE_POD={file} cannot be read ({error}); name a file like deploy/pod.yaml.") from None
    template = cast("dict[str, Any]", read) if isinstance(read, dict) else {}
    containers = (template.get("spec") or {}).get("containers")
    if not containers or not isinstance(containers, list) or not containers[0].get("image"):
        raise SettingsError(f"FINETUNE_POD={file} has no spec.containers[0].image; write a pod as in deploy/pod.yaml.")
    return template


@contextmanager
def noted(output: Path, task: Mapping[str, str]) -> Generator[None]:
    """Notes where a task goes, before it goes there, so that anybody can end it; takes the note away when it is over."""
    note = output / LAUNCHED.format(task["id"])
    draft = note.with_suffix(".tmp")
    draft.write_text(json.dumps(dict(task)), encoding="utf-8")
    draft.rename(note)
    try:
        yield
    finally:
        note.unlink(missing_ok=True)


def launched(output: Path) -> list[dict[str, str]]:
    """The tasks of a folder that a cluster may be at work on; of one whose starter was killed it is not known."""
    return [json.loads(note.read_text(encoding="utf-8")) for note in sorted(output.glob(LAUNCHED.format("*")))]


def stop(task: Mapping[str, str]) -> bool:
    """Ends a task on its cluster; whether it was there. Raises SettingsError where the cluster does not answer."""
    Workers(task["launcher"]).check()
    try:
        return _stop_ray(task) if task["launcher"] == "ray" else _stop_pod(task)
    except (OSError, RuntimeError) as error:  # requests' and urllib3's errors are OSErrors too
        where = task.get("address") or task.get("namespace")
        raise SettingsError(f"{task['launcher']} at {where} does not answer ({error}); {task['id']} may still run.") from error


def _stop_ray(task: Mapping[str, str]) -> bool:
    submission: Any = importlib.import_module("ray.job_submission")
    client = submission.JobSubmissionClient(task["address"])
    known = {one.submission_id: one.status for one in client.list_jobs()}
    return task["id"] in known and not known[task["id"]].is_terminal() and bool(client.stop_job(task["id"]))


def _stop_pod(task: Mapping[str, str]) -> bool:
    kubernetes: Any = importlib.import_module("kubernetes")
    if os.getenv("KUBERNETES_SERVICE_HOST"):
        kubernetes.config.load_incluster_config()
    else:
        kubernetes.config.load_kube_config()
    api, selector = kubernetes.client.CoreV1Api(), f"{LABEL}={task['id']}"
    pods = api.list_namespaced_pod(task["namespace"], label_selector=selector).items
    for one in pods:
        api.delete_namespaced_pod(one.metadata.name, task["namespace"])
    return bool(pods)
