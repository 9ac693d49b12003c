"""The trainer of OpenAI's wire against the stateful stand-in on a real socket."""

from __future__ import annotations

import datetime
import json
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from finetune_assets.errors import (
    DataError,
    FinetuneError,
    ModelUnavailable,
    ProviderError,
    ProviderUnsettled,
    SettingsError,
    TrainingError,
)
from finetune_assets.training import lifecycle
from finetune_assets.training.remote import Notes, RemoteModel
from finetune_assets.training.trainer import JobHandle
from finetune_assets.training.wire_states import STATUS
from finetune_assets_tests.training.fake_provider import FakeProvider
from finetune_assets_tests.training.fake_provider.process import KEY
from finetune_assets_tests.training.remote_request import assistant, dataset, request, wire

CREATE = "POST /fine_tuning/jobs"
RETRIEVE = "GET /fine_tuning/jobs/ID"


@pytest.fixture(scope="module")
def frozen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dataset(tmp_path_factory.mktemp("frozen") / "f1")


def finish(trainer: Any, handle: JobHandle) -> None:
    for _ in range(10):
        if trainer.poll(handle).status not in ("pending", "running"):
            return
    raise AssertionError("the job does not end")


def test_from_estimate_to_model(fake: FakeProvider, frozen: Path, tmp_path: Path) -> None:
    settings = assistant(remote={"file_days": 3})
    asked, journal = request(frozen, settings), Notes()
    trainer = wire(settings, tmp_path, journal)
    trainer.validate(asked)
    estimate = trainer.estimate(asked)
    assert estimate.usd == pytest.approx(estimate.tokens * 3 / 1e6)  # the table says $3.00 a million
    handle = trainer.submit(asked)
    assert trainer.submit(asked) == handle  # nothing is bought twice
    [job] = fake.jobs
    assert job["metadata"]["run_key"] == asked.run_key
    assert job["suffix"] == "finetune-dental"
    assert job["hyperparameters"]["n_epochs"] == 3
    state = fake.state(contents=True)
    assert {file["expires_at"] - file["created_at"] for file in state["files"]} == {3 * 86400}
    rows = [json.loads(line) for line in state["contents"][job["training_file"]].splitlines()]
    assert [m.get("weight") for m in rows[0]["messages"] if m["role"] == "assistant"] == [
        0,
        None,
    ]  # only the last reply is learnt
    finish(trainer, handle)
    result = trainer.keep(handle, tmp_path / "job", {"base_model": asked.base_model})
    assert (result["steps"], result["train_loss"]) == (120, 0.4286)  # events are read to the end, not the first page
    log = [json.loads(line) for line in (tmp_path / "job" / "training_log.jsonl").read_text().splitlines()]
    assert [point["step"] for point in log] == list(range(1, 121))
    model = RemoteModel.read(tmp_path / "job" / "model")
    assert model is not None
    assert model.model.startswith("ft:gpt-4o-mini-2024-07-18:org:finetune-dental:")
    assert KEY not in (tmp_path / "job" / "model" / "remote.json").read_text()
    assert trainer.clean_up(handle) == []
    assert fake.state()["files"] == []


def test_preferences_go_out_as_dpo(fake: FakeProvider, frozen: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    settings = assistant(hyperparameters={"beta": 0.3})
    asked = replace(request(frozen, settings), objective=("dpo",))
    wire(settings, tmp_path).submit(asked)
    [job] = fake.jobs
    assert job["method"]["type"] == "dpo"
    assert job["method"]["dpo"]["hyperparameters"]["beta"] == 0.3
    with pytest.raises(TrainingError, match=r"hyperparameters\.beta is 3"):
        wire(settings, tmp_path).parameters(replace(asked, overrides={"beta": 3.0}))
    content = fake.state(contents=True)["contents"][job["training_file"]]
    assert set(json.loads(content.splitlines()[0])) == {"input", "preferred_output", "non_preferred_output"}


@pytest.mark.parametrize("provider", ["azure", "nebius", "openai_compatible"])
def test_profiles(fake: FakeProvider, frozen: Path, tmp_path: Path, provider: str) -> None:
    fake.set(bom=provider == "azure")
    settings = assistant(provider, remote={"base_url": fake.url, "suffix": "v1.5 ñ"})
    asked, trainer = request(frozen, settings), wire(settings, tmp_path)
    trainer.validate(asked)
    handle = trainer.submit(asked)
    [job] = fake.jobs
    assert job["suffix"] == ("v1-5-dental" if provider == "azure" else "v1.5-dental")
    assert ("metadata" in job) == (provider == "azure")
    content = fake.state(contents=True)["contents"][job["training_file"]]
    assert content.startswith("\ufeff") == (provider == "azure")
    assert ('"weight":0' in content) == (provider == "azure")
    if provider == "nebius":
        return
    finish(trainer, handle)
    assert trainer.result(handle).model.startswith("ft:")


@pytest.mark.parametrize("deploy", [False, True])
def test_nebius_names_no_model_its_checkpoint_comes_home_or_is_served(
    fake: FakeProvider, frozen: Path, tmp_path: Path, deploy: bool
) -> None:
    made = tmp_path / "made"
    made.mkdir()
    (made / "adapter_config.json").write_text("{}")
    (made / "adapter_model.safetensors").write_bytes(bytes(range(256)) * 4096)
    fake.set(checkpoint=str(made))
    settings, journal = assistant("nebius", remote={"base_url": fake.url, "deploy": deploy}), Notes()
    trainer = wire(settings, tmp_path, journal)
    handle = trainer.submit(request(frozen, settings))
    words: list[str] = []
    while (state := trainer.poll(handle)).status in ("pending", "running"):
        words.append(state.provider_status)
        if state.provider_status.startswith("Deploying"):
            journal.state.pop("served")  # killed before the name was written down: it is found, not made again
    assert words[-1] == ("Deploying (validating)" if deploy else "running")
    trainer.keep(handle, tmp_path / "job", {"base_model": "open/small-7b"})
    model = RemoteModel.read(tmp_path / "job" / "model")
    if deploy:
        assert model is not None
        assert model.model.startswith("open/small-7b-LoRa:finetune-dental-")
        assert len([one for one in fake.state()["seen"] if one == "POST /v0/models"]) == 1
    else:
        assert model is None
        weights = tmp_path / "job" / "model" / "adapter_model.safetensors"
        assert weights.read_bytes() == (made / "adapter_model.safetensors").read_bytes()
    (made / "adapter_config.json").unlink()
    with pytest.raises(TrainingError, match="is no model") if not deploy else nullcontext():
        trainer.keep(handle, tmp_path / "again", {"base_model": "open/small-7b"})


def test_two_that_ask_at_once_make_one_custom_model(fake: FakeProvider, frozen: Path, tmp_path: Path) -> None:
    class Slow(Notes):
        def save(self, **values: Any) -> dict[str, Any]:
            time.sleep(0.3 if "serve_started" in values else 0)
            return super().save(**values)

    (tmp_path / "made").mkdir()
    fake.set(checkpoint=str(tmp_path / "made"), progress=["succeeded"])
    settings, journal = assistant("nebius", remote={"base_url": fake.url, "deploy": True}), Slow()
    first, second = (wire(settings, tmp_path, journal) for _ in range(2))
    handle = first.submit(request(frozen, settings))
    fake.set(jobs={handle.id: {"_rows": []}})
    with ThreadPoolExecutor(2) as pool:
        words = list(pool.map(lambda one: one.poll(handle).provider_status, (first, second)))
    assert {word.partition(" ")[0] for word in words} <= {"Deploying", "succeeded"}
    assert fake.state()["seen"].count("POST /v0/models") == 1


@pytest.mark.parametrize("fault", ["drop_after", "drop_before", "error_after", "error", "garbage"])
def test_a_creation_without_an_answer_is_one_job(fake: FakeProvider, frozen: Path, tmp_path: Path, fault: str) -> None:
    for provider in ("openai", "nebius"):  # found by metadata, and by file and suffix
        fake.fault(CREATE, fault, status=500, times=1)
        settings = assistant(provider, remote={"base_url": fake.url})
        handle = wire(settings, tmp_path / provider).submit(request(frozen, settings, f"job-{provider}-1"))
        assert handle.id in [job["id"] for job in fake.jobs]
    assert len(fake.jobs) == 2
    assert all(job["status"] != "cancelled" for job in fake.jobs)


@pytest.mark.parametrize("fault", ["drop_after", "error_after", "drop_before", "garbage"])
def test_an_upload_without_an_answer_lies_there_once_and_leaves_with_the_job(
    fake: FakeProvider, frozen: Path, tmp_path: Path, fault: str
) -> None:
    fake.fault("POST /files", fault, status=500)
    settings = assistant("nebius", remote={"base_url": fake.url})
    trainer = wire(settings, tmp_path, Notes())
    handle = trainer.submit(request(frozen, settings))
    assert [file["filename"] for file in fake.state()["files"]] == ["job-abc-1.training.jsonl", "job-abc-1.validation.jsonl"]
    assert len(fake.jobs) == 1
    assert trainer.clean_up(handle) == []
    assert fake.state()["files"] == []


def test_a_file_that_nobody_wrote_down_leaves_with_the_job(fake: FakeProvider, frozen: Path, tmp_path: Path) -> None:
    settings = assistant("nebius", remote={"base_url": fake.url})
    trainer = wire(settings, tmp_path, Notes())
    with OpenAI(api_key=KEY, base_url=fake.url) as other:
        for name in ("job-abc-1.training.jsonl", "job-other-1.training.jsonl"):  # half a file, and somebody else's
            other.files.create(file=(name, b'{"messages": []}\n'), purpose="fine-tune")
    handle = trainer.submit(request(frozen, settings))
    assert len(fake.state()["files"]) == 4
    assert trainer.clean_up(handle) == []
    assert [file["filename"] for file in fake.state()["files"]] == ["job-other-1.training.jsonl"]


def test_two_jobs_of_one_run_key_become_one(fake: FakeProvider, frozen: Path, tmp_path: Path) -> None:
    settings = assistant()
    asked, journal = request(frozen, settings), Notes()
    handle = wire(settings, tmp_path, journal).submit(asked)
    fake.clone(2)  # as if a lost request had arrived late, twice
    journal.state.pop("provider_job_id")
    assert wire(settings, tmp_path, journal).submit(asked) == handle
    assert sorted(job["status"] for job in fake.jobs) == ["cancelled", "cancelled", "validating_files"]


def test_too_many_requests_are_waited_for_then_left_open(fake: FakeProvider, frozen: Path, tmp_path: Path) -> None:
    settings = assistant()
    fake.fault(CREATE, "error", status=429, code="rate_limit_exceeded", times=3)
    asked, journal = request(frozen, settings), Notes()
    with pytest.raises(ProviderUnsettled, match="429 rate_limit_exceeded"):
        wire(settings, tmp_path, journal).submit(asked)
    wire(settings, tmp_path, journal).submit(asked)
    assert len(fake.jobs) == 1


@pytest.mark.parametrize(
    ("status", "code", "text"),
    [
        (400, "model_not_available", "Fine-tuning is not available for this model."),
        (403, "permission_denied", "Your organization may no longer create fine-tuning jobs."),
        (413, "too_large", "The request is too large."),
        (422, "unprocessable", "The suffix is not valid."),
        (429, "insufficient_quota", "You exceeded your current quota."),
    ],
)
def test_a_plain_no_says_code_text_and_what_to_do(
    fake: FakeProvider, frozen: Path, tmp_path: Path, status: int, code: str, text: str
) -> None:
    settings, journal = assistant(), Notes()
    fake.fault(CREATE, "error", status=status, code=code, message=text, times=1)
    with pytest.raises(ProviderError, match=rf"{status} {code}: {text}") as refused:
        wire(settings, tmp_path, journal).submit(request(frozen, settings))
    assert not isinstance(refused.value, ProviderUnsettled)
    assert "finetune migrate" in str(refused.value)
    assert not journal.state["create_started"]
    assert fake.jobs == []


def test_keys(fake: FakeProvider, frozen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = assistant()
    asked = request(frozen, settings)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-wrong-secret-0123456789")
    with pytest.raises(ProviderError, match="401 invalid_api_key") as wrong:
        wire(settings, tmp_path).validate(asked)
    assert "sk-wrong" not in str(wrong.value)  # the provider repeats it
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(SettingsError, match="OPENAI_API_KEY"):
        wire(settings, tmp_path).validate(asked)
    monkeypatch.setenv("OPENAI_API_KEY", "two words")
    with pytest.raises(SettingsError, match="OPENAI_API_KEY") as odd:
        wire(settings, tmp_path).validate(asked)
    assert "two words" not in str(odd.value)
    with pytest.raises(SettingsError, match=r"remote\.base_url"):
        wire(assistant("azure"), tmp_path).submit(request(frozen, assistant("azure")))


def test_an_address_with_a_password_is_refused(frozen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_BASE_URL", "https://ana:s3cret@host/v1")
    with pytest.raises(SettingsError, match="holds a user or a password") as told:
        wire(assistant(), tmp_path).validate(request(frozen, assistant()))
    assert "s3cret" not in str(told.value)


def test_no_message_holds_a_secret(fake: FakeProvider, frozen: Path, tmp_path: Path) -> None:
    settings = assistant()
    asked = request(frozen, settings)
    messages: list[str] = []
    for where, status in (("GET /files", 500), ("POST /files", 400), (CREATE, 400), (CREATE, 401)):
        fake.fault(
            where,
            "error",
            status=status,
            message=f"Incorrect API key provided: {KEY}. Header: Bearer {KEY}",
            times=3 if status == 500 else 1,
        )
        with pytest.raises(FinetuneError) as raised:
            wire(settings, tmp_path / where.replace("/", "_") / str(status)).submit(asked)
        messages.append(str(raised.value))
    fake.set(forced={"*": {"status": "failed", "error": {"code": "x", "message": f"key {KEY}", "param": None}}})
    trainer, handle = submitted(frozen, tmp_path / "last")
    messages.append(trainer.poll(handle).error or "")
    assert messages[-1]
    assert not [text for text in messages if KEY in text or KEY[3:] in text]


def test_a_file_that_the_provider_refuses(fake: FakeProvider, frozen: Path, tmp_path: Path) -> None:
    fake.set(bom=True)
    settings = assistant()
    with pytest.raises(DataError, match="invalid encoding: a byte order mark is required"):
        wire(settings, tmp_path).submit(request(frozen, settings))
    assert fake.jobs == []


def test_what_is_refused_here_is_never_sent(fake: FakeProvider, frozen: Path, tmp_path: Path) -> None:
    few = dataset(tmp_path / "few", rows=9)
    with pytest.raises(DataError, match="9 rows, the provider needs at least 10"):
        wire(assistant(), tmp_path).validate(request(few, assistant()))
    personal = dataset(tmp_path / "personal")
    lines = (personal / "train.jsonl").read_text().splitlines()
    lines[3] = json.dumps(
        {"messages": [{"role": "user", "content": "soy ana@example.org"}, {"role": "assistant", "content": "sí"}]}
    )
    (personal / "train.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=r"train\.jsonl:4 holds personal data \(email") as told:
        wire(assistant(), tmp_path).validate(request(personal, assistant()))
    assert "ana@" not in str(told.value)
    half = assistant(hyperparameters={"epochs": 0.5})
    with pytest.raises(TrainingError, match="whole epochs"):
        wire(half, tmp_path).validate(request(frozen, half))
    assert fake.state()["seen"] == []


def test_a_model_that_ends_soon_is_refused(
    fake: FakeProvider, frozen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = assistant(remote={"min_model_life_days": 90})
    asked = request(frozen, settings)
    monkeypatch.setattr(lifecycle, "today", lambda: datetime.date(2026, 11, 21))
    with pytest.raises(ModelUnavailable, match=r"off on 2027-01-14, in 54 days.*min_model_life_days is 90.*finetune migrate"):
        wire(settings, tmp_path).validate(asked)
    monkeypatch.setattr(lifecycle, "today", lambda: datetime.date(2026, 6, 1))
    wire(settings, tmp_path).validate(asked)
    fake.set(shutdown={"gpt-4o-mini-2024-07-18": "2026-07-01"})  # the provider knows better than the table
    with pytest.raises(ModelUnavailable, match=r"2026-07-01.*provider's own answer"):
        wire(settings, tmp_path).validate(asked)
    monkeypatch.setattr(lifecycle, "today", lambda: datetime.date(2027, 1, 7))
    with pytest.raises(ModelUnavailable, match="no training of gpt-4o-mini-2024-07-18 since 2027-01-06"):
        wire(assistant(), tmp_path).validate(asked)


def submitted(frozen: Path, home: Path) -> tuple[Any, JobHandle]:
    trainer = wire(assistant(), home)
    return trainer, trainer.submit(request(frozen, assistant()))


@pytest.mark.parametrize(("theirs", "ours"), [*STATUS.items(), ("dreaming", "running"), ("__missing__", "running")])
def test_statuses_are_an_open_set(fake: FakeProvider, theirs: str, ours: str) -> None:
    from openai.types.fine_tuning import FineTuningJob

    from finetune_assets.training.wire_states import state_of

    values = {"id": "ftjob-1", "fine_tuned_model": "ft:x"} | ({} if theirs == "__missing__" else {"status": theirs})
    state = state_of(FineTuningJob.model_construct(**values), "ftjob-1", "openai", KEY)
    assert state.status == ours
    assert ("warning" in state.progress) == (theirs not in STATUS)


def test_a_safety_evaluation_that_failed_is_explained(fake: FakeProvider, frozen: Path, tmp_path: Path) -> None:
    trainer, handle = submitted(frozen, tmp_path)
    error = {"code": "unsafe_model", "message": "The model failed the safety evaluation: harassment.", "param": None}
    fake.set(jobs={handle.id: {"status": "failed", "error": error}})
    state = trainer.poll(handle)
    assert state.status == "failed"
    assert "unsafe_model: The model failed the safety evaluation" in (state.error or "")
    assert "train it locally" in (state.error or "")
    with pytest.raises(TrainingError, match="unsafe_model"):
        trainer.keep(handle, tmp_path / "job", {"base_model": "b"})


def test_a_provider_that_is_busy_while_a_model_is_fetched(fake: FakeProvider, frozen: Path, tmp_path: Path) -> None:
    trainer, handle = submitted(frozen, tmp_path)
    finish(trainer, handle)
    trainer = trainer.hurried(10)
    for skip in (0, 1):  # each time that `keep` asks for the job
        fake.fault("GET /fine_tuning/jobs/ID", "error", status=500, skip=skip)
        with pytest.raises(ProviderUnsettled, match="asking for job"):
            trainer.keep(handle, tmp_path / "job", {"base_model": "b"})


def test_a_result_that_is_gone(fake: FakeProvider, frozen: Path, tmp_path: Path) -> None:
    trainer, handle = submitted(frozen, tmp_path)
    finish(trainer, handle)
    fake.forget_model(fake.jobs[0]["fine_tuned_model"])
    with pytest.raises(TrainingError, match=r"succeeded, but its model is gone.*hyperparameters\.seed.*finetune migrate"):
        trainer.result(handle)


def test_answers_of_other_jobs_and_without_fields(fake: FakeProvider, frozen: Path, tmp_path: Path) -> None:
    trainer, handle = submitted(frozen, tmp_path)
    fake.set(forced={handle.id: {"id": "ftjob-999999"}})
    with pytest.raises(ProviderUnsettled, match="answered for job ftjob-999999"):
        trainer.poll(handle)
    gone = dict.fromkeys(("error", "hyperparameters", "trained_tokens", "result_files", "fine_tuned_model"), "__missing__")
    fake.set(forced={handle.id: {**gone, "status": "succeeded"}})
    state = trainer.poll(handle)
    assert (state.status, state.progress["warning"]) == ("running", "succeeded, but no model is named yet")
    fake.fault(RETRIEVE, "garbage", times=9)
    with pytest.raises(ProviderUnsettled):
        trainer.poll(handle)


def test_pause_resume_cancel(fake: FakeProvider, frozen: Path, tmp_path: Path) -> None:
    trainer, handle = submitted(frozen, tmp_path)
    assert trainer.pause(handle).provider_status == "paused"
    assert (trainer.poll(handle).status, trainer.poll(handle).progress["paused"]) == ("running", True)
    assert trainer.resume(handle).provider_status == "validating_files"
    trainer.cancel(handle)
    assert trainer.poll(handle).status == "cancelled"
    trainer.cancel(handle)  # nothing happens


def test_a_list_without_end_is_left(fake: FakeProvider, frozen: Path, tmp_path: Path) -> None:
    trainer, handle = submitted(frozen, tmp_path)
    fake.set(pages_for_ever=True)
    assert len(trainer.events(handle)) == 1
    before = len(fake.state()["seen"])
    trainer.events(handle)
    assert len(fake.state()["seen"]) - before <= 3


def test_at_azure_a_job_is_open_until_a_person_has_deployed_its_model(fake: FakeProvider, frozen: Path, tmp_path: Path) -> None:
    fake.set(bom=True, deployments={}, progress=["running", "succeeded"])
    settings = assistant("azure", remote={"base_url": fake.url})
    asked, trainer = request(frozen, settings), wire(settings, tmp_path)
    handle = trainer.submit(asked)
    trainer.poll(handle)
    state = trainer.poll(handle)
    model = fake.jobs[0]["fine_tuned_model"]
    assert (state.status, state.provider_status, state.trained) == ("running", "Not deployed", True)
    assert f"answers nowhere (404 DeploymentNotFound); deploy {model} under that name, or " in state.progress["warning"]
    trainer.cancel(handle)  # by hand or at the deadline: what is trained stays
    state = trainer.poll(handle)
    assert (state.status, handle.id in state.progress["warning"]) == ("succeeded", True)
    with pytest.raises(TrainingError, match=r"answers nowhere \(404 DeploymentNotFound\).*run the same again"):
        trainer.keep(handle, tmp_path / "job", {"base_model": asked.base_model})
    fake.set(deployments={handle.id: model})
    trainer.keep(handle, tmp_path / "job", {"base_model": asked.base_model})
    kept = RemoteModel.read(tmp_path / "job" / "model")
    assert kept is not None
    assert (kept.model, kept.of) == (handle.id, model)  # asked by the one, and its last day is the other's
