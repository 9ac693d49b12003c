"""What a Ray job and a pod are made of: no secret goes along, and the API's own schema accepts the pod."""

from pathlib import Path

import pytest

from finetune_assets.environment import ROOT, Environment
from finetune_assets.errors import SettingsError
from finetune_assets.workers import LABEL, Workers, launched, noted, passed_on, pod, ray_job

SECRETS = {
    "FINETUNE_HOME": "/store",
    "HF_HUB_OFFLINE": "1",
    "FINETUNE_USER_KEY": "hush-key",
    "FINETUNE_SOURCE": "postgresql://reader:hush-word@db/chats",
    "FINETUNE_DATABASE_URL": "postgresql://writer:hush-word@db/ledger",
    "OPENAI_API_KEY": "hush-sk",
}


def test_a_ray_job_runs_the_worker_and_is_told_no_secret():
    workers = Workers.read({"FINETUNE_LAUNCHER": "ray", "FINETUNE_WORKER_CPUS": "4", "FINETUNE_WORKER_GPUS": "1"}, ROOT)
    job = ray_job(workers, Path("/store/jobs/a b/spec.json"), "finetune-1", SECRETS)
    assert job["entrypoint"] == "python -m finetune_assets.worker '/store/jobs/a b/spec.json'"
    assert (job["entrypoint_num_cpus"], job["entrypoint_num_gpus"], workers.threads) == (4, 1, 4)
    assert job["runtime_env"]["env_vars"] == {"HF_HUB_OFFLINE": "1", "FINETUNE_HOME": "/store"}
    assert passed_on({"FINETUNE_SOURCE": "data/sample,postgresql://db/chats?password=hush-word"}) == {}
    assert passed_on({"FINETUNE_SOURCE": "data/sample"}) == {"FINETUNE_SOURCE": "data/sample"}


def test_the_pod_is_one_that_the_api_accepts():
    pytest.importorskip("dagster_k8s", reason="needs pip install 'finetune-assets[kubernetes]'")
    import kubernetes
    import kubernetes_validate
    from dagster_k8s.pipes import build_pod_body

    workers = Workers.read({"FINETUNE_LAUNCHER": "kubernetes"}, ROOT)
    made = pod(workers, Path("/app/data/store/jobs/x/spec.json"), "finetune-x-1", SECRETS)
    assert "hush" not in str(made)
    made["metadata"].pop("namespace")
    body = build_pod_body("p", None, None, {"DAGSTER_PIPES_CONTEXT": "c"}, made["metadata"], made["spec"])
    sent = kubernetes.client.ApiClient().sanitize_for_serialization(body)
    sent |= {"apiVersion": "v1", "kind": "Pod"}
    kubernetes_validate.validate(sent, kubernetes_validate.latest_version(), strict=True)
    main = sent["spec"]["containers"][0]
    assert main["command"] == ["python", "-m", "finetune_assets.worker", "/app/data/store/jobs/x/spec.json"]
    assert {"FINETUNE_HOME", "DAGSTER_PIPES_CONTEXT"} <= {entry["name"] for entry in main["env"]}
    assert (sent["metadata"]["labels"][LABEL], sent["spec"]["restartPolicy"]) == ("finetune-x-1", "Never")
    main["resources"]["limit"] = {}  # a misspelt key
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(sent, kubernetes_validate.latest_version(), strict=True)


def test_a_pod_without_image_and_settings_without_sense_are_refused(tmp_path: Path):
    file = tmp_path / "pod.yaml"
    file.write_text("spec: {containers: [{name: x}]}\n")
    with pytest.raises(SettingsError, match=r"containers\[0\]\.image"):
        pod(Workers.read({"FINETUNE_POD": str(file)}, ROOT), Path("s"), "i", {})
    with pytest.raises(SettingsError, match="cannot be read"):
        pod(Workers.read({"FINETUNE_POD": str(tmp_path / "none.yaml")}, ROOT), Path("s"), "i", {})
    for name, value in (("FINETUNE_WORKER_CPUS", "many"), ("FINETUNE_WORKER_GPUS", "-1"), ("FINETUNE_LAUNCHER", "slurm")):
        with pytest.raises(SettingsError, match=name):
            Environment.read({name: value})


def test_a_task_is_noted_while_a_cluster_may_be_at_work_on_it(tmp_path: Path):
    with noted(tmp_path, {"launcher": "ray", "id": "a"}), noted(tmp_path, {"launcher": "ray", "id": "b"}):
        assert [task["id"] for task in launched(tmp_path)] == ["a", "b"]
    assert launched(tmp_path) == []
