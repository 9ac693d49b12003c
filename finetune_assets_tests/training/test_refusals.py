"""What cannot be trained is refused before anything is started, and each refusal says what to do instead.

what                                        where (finetune_assets.training)          test here
unknown model id or path                    base_model.resolve, .identity             what_cannot_be_trained
weights absent or half a download           base_model.unfinished, ._shapes           weights_that_are_not_whole
no template                                 (a plain one is given: tests of models)
a template that is broken or refuses rows   worker.models.rendering, by the plan      a_template_that_cannot_render
tokenizer without end token                 encoding.LightRenderer                    a_tokenizer_without_end
tokenizer of another model                  checks._check_tokenizer                   a_tokenizer_of_another_model
text that is empty or no UTF-8                tokens._windows                           text_that_is_none
adapter of another base or vocabulary       base_model.misfit                         an_adapter_of_another_base
data longer than the context                plan.TokenCount: counted; local: none     rows_that_are_cut, no_row_that_fits
objective without its data                  checks._check_objectives                  what_cannot_be_trained
qlora, bfloat16, liger without hardware     checks._check_hardware                    what_cannot_be_trained, an_old_card
too little disk, memory, memory of a GPU    checks._check_disk, ._check_memory        what_this_machine_cannot_hold, a_small_card
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from finetune_assets.errors import DataError, LaunchError, ModelUnavailable, SettingsError, TrainingError
from finetune_assets.storage import Store, read_json, write_json
from finetune_assets.training import machine
from finetune_assets.training.checks import check_processes
from finetune_assets.training.local import LocalTrainer
from finetune_assets.training.trainer import TrainingRequest
from finetune_assets.worker.__main__ import run_task
from finetune_assets.workers import Workers
from finetune_assets_tests.tiny_model import make_tiny_model


def never(spec_file: Path, output: Path) -> None:
    raise AssertionError(f"{spec_file} was started")


def validate(request: TrainingRequest, store: Store, workers: Workers | None = None) -> None:
    LocalTrainer(never, store, workers or Workers()).validate(request)


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"liger": True}, TrainingError, "liger is true, but there is no NVIDIA GPU. Remove the setting"),
        ({"report_to": ("nowhere",)}, SettingsError, "'nowhere' is unknown; allowed: tensorboard, mlflow"),
        ({"report_to": ("dvclive",)}, SettingsError, "needs the package dvclive: pip install dvclive"),
        ({"adapter": "qlora"}, TrainingError, "no NVIDIA GPU.*adapter: lora"),
        ({"objective": ("dpo",)}, DataError, "preferences.jsonl is missing or empty.*take dpo out"),
        ({"objective": ("kto",)}, DataError, "kto.jsonl is missing or empty.*take kto out"),
        ({"objective": ("rlhf",)}, TrainingError, "'rlhf' cannot be trained here; continued_pretraining, tools, sft"),
        ({"adapter": "ia3"}, SettingsError, "'ia3' is unknown; allowed: full, lora, qlora"),
        ({"objective": ("tools",)}, DataError, "calls a tool.*objective: .sft"),
        ({"objective": ("continued_pretraining",)}, DataError, "holds no .txt or .md file"),
        ({"base_model": "data/no_such_model"}, ModelUnavailable, "there is no folder.*Correct `base_model`"),
        ({"base_model": "org/no-such-model"}, ModelUnavailable, "could not be found"),
    ],
)
def test_what_cannot_be_trained_is_refused(request_: TrainingRequest, store: Store, changes: dict, error: type, says: str):
    if machine.has_gpu() and "adapter" in changes:
        pytest.skip("qlora works here")
    with pytest.raises(error, match=says):
        validate(replace(request_, stages=(), **changes), store)


@pytest.mark.parametrize(
    ("workers", "changes", "says"),
    [
        (Workers(processes=3), {}, "batch_size 8 of `sft` cannot be divided among 3 processes.*multiple of 3"),
        (Workers(processes=2, nodes=3), {}, "batch_size 8 of `sft` cannot be divided among 6 processes"),
        (Workers(processes=2), {"objective": ("sft", "dpo")}, "objective `dpo` trains in one process: set FINETUNE_PROCESSES=1"),
        (Workers(processes=64), {}, "FINETUNE_PROCESSES is 64, this machine has"),
        (Workers(processes=2, parallel="fsdp"), {"adapter": "qlora"}, "in 4 bits: set FINETUNE_PARALLEL=ddp"),
    ],
)
def test_impossible_divisions_are_refused(
    request_: TrainingRequest, monkeypatch: pytest.MonkeyPatch, workers: Workers, changes: dict, says: str
):
    monkeypatch.setattr(machine, "cores", lambda: 4)
    monkeypatch.setattr(machine, "has_gpu", lambda: False)
    wanted = replace(request_, stages=(), **changes)
    check_processes(wanted, Workers())
    check_processes(request_, Workers(processes=2, nodes=2))
    with pytest.raises(SettingsError, match=says):
        check_processes(wanted, workers)


def test_what_this_machine_cannot_hold_is_refused(request_: TrainingRequest, store: Store, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine, "has_gpu", lambda: False)
    with monkeypatch.context() as patch:
        patch.setattr(machine, "total_memory", lambda: 2**28)
        with pytest.raises(TrainingError, match=r"GiB of memory for one short row, this machine has 0\.2.*adapter: lora"):
            validate(request_, store)
        validate(request_, store, Workers("ray"))  # another machine's memory is not this one's
    with monkeypatch.context() as patch:
        patch.setattr(machine, "total_memory", lambda: 3 * 2**29)
        patch.setattr(machine, "cores", lambda: 2)
        validate(request_, store)
        with pytest.raises(TrainingError, match=r"in each of 2 processes, this machine has 1\.5.*set FINETUNE_PROCESSES=1"):
            validate(request_, store, Workers(processes=2))
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1000))
        with pytest.raises(TrainingError, match="GB free\\. Make room"):
            validate(request_, store)
    with monkeypatch.context() as patch:
        patch.setattr(machine, "multiplies_bfloat16", lambda: False)
        with pytest.raises(TrainingError, match=r"precision is bfloat16.*this processor has none"):
            validate(replace(request_, precision="bfloat16"), store)


@pytest.fixture
def card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A driver with one card, whose nvidia-smi prints this line."""
    machine.cards.cache_clear()
    monkeypatch.setattr(machine, "gpus", lambda: 1)

    def show(line: str) -> None:
        machine.cards.cache_clear()
        (tmp_path / "bin").mkdir(exist_ok=True)
        program = tmp_path / "bin" / "nvidia-smi"
        program.write_text(f'#!/bin/sh\n[ "$1" = "--query-gpu=memory.total,compute_cap" ] && echo "{line}"\n')
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")

    yield show
    machine.cards.cache_clear()


Show = Callable[[str], None]


def test_an_old_card_multiplies_no_bfloat16(request_: TrainingRequest, store: Store, card: Show):
    card("15360, 7.5")
    assert machine.default_precision() == "float32"
    with pytest.raises(TrainingError, match=r"precision is bfloat16.*compute capability 7\.5\) has none before 8"):
        validate(replace(request_, precision="bfloat16"), store)
    card("81559, 9.0")
    assert machine.default_precision() == "bfloat16"
    validate(replace(request_, precision="bfloat16"), store)


def test_a_small_card_is_too_small(request_: TrainingRequest, store: Store, card: Show, monkeypatch: pytest.MonkeyPatch):
    card("1, 9.0")
    assert machine.room() == 2**20
    with pytest.raises(TrainingError, match=r"for one short row, the largest GPU here has 0\.0.*or a larger card"):
        validate(request_, store)
    card("[N/A], 9.0")  # as a card that is divided (MIG) may say: the worker tries
    assert machine.room() is None
    validate(request_, store)


def test_weights_that_are_not_whole_are_refused(request_: TrainingRequest, store: Store, tmp_path: Path):
    """No weights, a part that is missing, half a download, a pointer of Git LFS, and what is no JSON."""
    base = make_tiny_model(tmp_path / "base")
    weights = base / "model.safetensors"
    whole, asked = weights.read_bytes(), replace(request_, base_model=str(base))
    validate(asked, store)
    for content, says in (
        (whole[:-10], rf"of its {len(whole):,} bytes {len(whole) - 10:,} are there.*git lfs pull"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a pointer of Git LFS"),
    ):
        weights.write_bytes(content)
        with pytest.raises(ModelUnavailable, match=says):
            validate(asked, store)
    weights.rename(base / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    write_json(base / "model.safetensors.index.json", index)
    with pytest.raises(ModelUnavailable, match="lacks model-00002-of-00002"):
        validate(asked, store)
    (base / "model.safetensors.index.json").unlink()
    (base / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(ModelUnavailable, match="holds no weights"):
        validate(asked, store)
    weights.write_bytes(whole)
    (base / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ModelUnavailable, match=r"tokenizer.json is no tokenizer.*Fetch it again"):
        validate(asked, store)
    (base / "config.json").write_text("{")
    with pytest.raises(ModelUnavailable, match=r"config.json cannot be read as JSON"):
        validate(asked, store)


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{% for message in messages %}{{ message['content'] }}", "cannot render the rows.*delete it"),
        ("{{ raise_exception('Only tools may speak') }}", "cannot render the rows.*Only tools may speak"),
        ("{% for message in messages %}{{ message['role'] }}{% endfor %}", "does not render the assistant's reply"),
    ],
)
def test_a_template_that_cannot_render_is_told_by_the_plan(
    request_: TrainingRequest, store: Store, tmp_path: Path, template: str, says: str
):
    base = make_tiny_model(tmp_path / "base")
    (base / "chat_template.jinja").write_text(template, encoding="utf-8")

    def count(spec_file: Path, output: Path) -> None:
        if run_task(read_json(spec_file)) != 0:
            raise LaunchError("ended badly")

    trainer = LocalTrainer(count, store)
    asked = replace(request_, base_model=str(base))
    trainer.validate(asked)
    with pytest.raises(ModelUnavailable, match=says):
        trainer.estimate(asked)


def test_a_tokenizer_of_another_model_or_without_end_is_refused(request_: TrainingRequest, store: Store, tmp_path: Path):
    small, large = make_tiny_model(tmp_path / "small", vocabulary=400), make_tiny_model(tmp_path / "large", vocabulary=512)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (small / name).write_bytes((large / name).read_bytes())
    with pytest.raises(ModelUnavailable, match="tokens, the model embeds 400"):
        validate(replace(request_, base_model=str(small)), store)
    config = read_json(large / "tokenizer_config.json")
    for end, says in (({}, "names no end token"), ({"eos_token": "<|over|>"}, "ends replies with '<|over|>'.*vocabulary")):
        write_json(large / "tokenizer_config.json", {**{key: config[key] for key in config if key != "eos_token"}, **end})
        with pytest.raises(ModelUnavailable, match=says.replace("|", r"\|")):
            validate(replace(request_, base_model=str(large)), store)


@pytest.mark.parametrize("whole", [False, True])
def test_an_adapter_of_another_base_is_refused(request_: TrainingRequest, store: Store, tmp_path: Path, whole: bool):
    """Matrices of another width; embeddings of another vocabulary, trained whole."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base, adapter = make_tiny_model(tmp_path / "base"), tmp_path / "adapter"
    other = make_tiny_model(tmp_path / "other", **({"vocabulary": 400} if whole else {"hidden": 64}))
    config = LoraConfig(
        r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"] if whole else None, task_type="CAUSAL_LM"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's calls of what transformers deprecates
        get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(adapter)
    named = read_json(adapter / "adapter_config.json")
    write_json(adapter / "adapter_config.json", {**named, "base_model_name_or_path": str(base)})
    validate(replace(request_, base_model=str(adapter)), store)
    write_json(adapter / "adapter_config.json", {**named, "base_model_name_or_path": str(other)})
    with pytest.raises(ModelUnavailable, match=r"does not belong to .*in the base, .* in the adapter"):
        validate(replace(request_, base_model=str(adapter)), store)
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelUnavailable, match=r"holds no adapter_model.safetensors"):
        validate(replace(request_, base_model=str(adapter)), store)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b" \n", r"The \.txt and \.md files in .*text hold no text"),
        ("La clínica".encode("latin-1"), r"menu\.txt is no UTF-8: byte 5 is 0xed\. Save it as UTF-8"),
    ],
)
def test_text_that_is_none_is_refused(request_: TrainingRequest, store: Store, tmp_path: Path, content: bytes, says: str):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "menu.txt").write_bytes(content)
    asked = replace(request_, objective=("continued_pretraining",), text=tmp_path / "text", stages=())
    with pytest.raises(DataError, match=says):
        LocalTrainer(never, store).estimate(asked)


def test_kto_wants_rows_to_compare(request_: TrainingRequest, store: Store, tmp_path: Path):
    (tmp_path / "kto.jsonl").write_text(json.dumps({"prompt": [], "completion": [], "label": True}) + "\n")
    single = replace(request_.hyperparameters, batch_size=1)
    asked = replace(request_, dataset=tmp_path, objective=("kto",), hyperparameters=single, stages=())
    with pytest.raises(SettingsError, match="batch_size is 1, and kto compares"):
        validate(asked, store)


def test_rows_that_are_cut_are_counted_in_the_plan(request_: TrainingRequest, store: Store):
    short = replace(request_, stages=(("sft", replace(request_.hyperparameters, max_length=48)),))
    estimate = LocalTrainer(never, store).estimate(short)
    assert estimate.rows_shortened + estimate.rows_left_out > 0
    whole = LocalTrainer(never, store).estimate(request_)
    assert (whole.rows_shortened, whole.rows_left_out) == (0, 0)


def test_a_plan_of_no_row_that_fits_is_refused(request_: TrainingRequest, store: Store):
    tiny = replace(request_, stages=(("sft", replace(request_.hyperparameters, max_length=4)),))
    with pytest.raises(DataError, match=r"None of the 40 rows of `sft` fits in 4 tokens.*Raise hyperparameters.max_length"):
        LocalTrainer(never, store).estimate(tiny)
