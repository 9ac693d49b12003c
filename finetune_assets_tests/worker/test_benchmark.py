"""The worker's benchmark on real (tiny) models, and the report made of it."""

import io
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from finetune_assets.assistants.settings import Assistant
from finetune_assets.corpus.forms import calls_text
from finetune_assets.dataset.tool_calls import messages_of
from finetune_assets.environment import ROOT
from finetune_assets.evaluation import benchmark, candidates, card, report
from finetune_assets.storage import read_json, write_json
from finetune_assets.worker import benchmark as worker
from finetune_assets.worker import chat, decoding, embed
from finetune_assets.worker.generate import Generator, Reply, batches
from finetune_assets.worker.models import encode_example, encode_prompt
from finetune_assets.worker.progress import Progress
from finetune_assets_tests.evaluation.frozen import make_dataset
from finetune_assets_tests.tiny_model import dialogues, make_tiny_model

ASSISTANT = Assistant(
    name="dental",
    select={"vertical": "dental"},
    language="es",
    rules=[
        {"name": "notes_it", "intent": "scheduling", "contains_any": ["anoto"]},
        {"name": "modest", "not_contains": ["garantiz"]},
    ],
    benchmark={"max_rows": 12, "max_new_tokens": 24, "retrieval": False},
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return str(make_tiny_model(folder / "base", context=192)), str(make_tiny_model(folder / "tuned", context=192, seed=1))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    chats = dialogues(28, seed=8, turns=3)
    chats += [
        [*chats[0][:-1], {"role": "assistant", "content": ""}],
        [*chats[1][:-1], {"role": "assistant", "content": "la cita " * 1250}],
    ]
    return make_dataset(tmp_path_factory.mktemp("dataset"), rows={"test": chats[-12:]})


@pytest.fixture(scope="module")
def made(models: tuple[str, str], dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a benchmark of 12 rows (one reference empty, one of 10,000 characters) and three candidates."""
    output = tmp_path_factory.mktemp("benchmark") / "out"
    spec = benchmark.prepare(ASSISTANT, dataset, candidates.standard(dataset, *models, ASSISTANT.benchmark), output, threads=1)
    write_json(output / "result.json", worker.run(spec, Progress.open(output)))
    return output


def summary(made: Path, dataset: Path) -> dict:
    log = made / "training_log.jsonl"
    log.write_text("".join(json.dumps({"step": n, "loss": 5 / (n + 1), "eval_loss": 5.5 / (n + 1)}) + "\n" for n in range(10)))
    about = benchmark.Made(
        "v1-1a2b3c4d", dataset, {"train_loss": 1.5, "tokens": 1000, "seconds": 12.5}, log, {"tokens": 900}, "c0de", "run"
    )
    return benchmark.summarise(ASSISTANT, made, about)


def test_outputs_are_whole(made: Path):
    for name in ("base", "few_shot", "tuned"):
        frame = pl.read_parquet(made / f"{name}.parquet")
        assert frame.schema == pl.Schema(worker.COLUMNS)
        assert frame["row"].to_list() == list(range(12))
        empty = frame.filter(pl.col("reference_bytes") == 0)
        assert empty["similarity"].null_count() == 1
        assert empty["nll"].null_count() == 0  # the end token alone
        assert frame.filter(pl.col("reference_bytes") >= 10_000 - 1)["nll"].null_count() == 1  # longer than the context
        assert frame["floor"].null_count() < 12
        assert frame["seconds"].min() > 0
    few = pl.read_parquet(made / "few_shot.parquet")
    assert few["dropped_turns"].max() > 0
    assert few["prompt_tokens"].max() <= 192 - 24


def test_a_second_run_computes_nothing_and_says_the_same(made: Path, models: tuple[str, str], dataset: Path, tmp_path: Path):
    again = tmp_path / "again"
    spec = benchmark.prepare(
        ASSISTANT,
        dataset,
        candidates.standard(dataset, *models, ASSISTANT.benchmark),
        again,
        threads=1,
        cache=made.parent / "cache",
    )
    result = worker.run(spec, Progress.open(again))
    assert result["computed_batches"] == 0
    for name in ("base", "few_shot", "tuned"):
        assert pl.read_parquet(again / f"{name}.parquet").equals(pl.read_parquet(made / f"{name}.parquet"))


def test_an_empty_cache_gives_the_same_replies(made: Path, models: tuple[str, str], dataset: Path, tmp_path: Path):
    spec = benchmark.prepare(ASSISTANT, dataset, [candidates.Plain("tuned", models[1])], tmp_path / "out", threads=2)
    worker.run(spec, Progress.open(tmp_path / "out"))
    fresh, first = (pl.read_parquet(folder / "tuned.parquet").drop("seconds") for folder in (tmp_path / "out", made))
    assert fresh.drop("nll").equals(first.drop("nll"))
    assert np.allclose(fresh["nll"].drop_nulls(), first["nll"].drop_nulls(), rtol=1e-5)


def test_likelihood_is_that_of_the_reply_and_its_end(models: tuple[str, str]):
    generator = Generator(models[0], 16)
    chats = dialogues(3, seed=5)
    examples = [encode_example(generator.tokenizer, chat, 192)[:2] for chat in chats]
    together = generator.likelihoods(examples)
    for (ids, mask), nats in zip(examples, together, strict=True):
        with torch.inference_mode():
            logits = generator.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        expected = -sum(float(logits[n - 1, token]) for n, token in enumerate(ids) if mask[n])
        assert nats == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("most", [decoding.LOGITS, 1])
def test_a_reply_and_a_reference_share_their_prompt(models: tuple[str, str], monkeypatch: pytest.MonkeyPatch, most: int):
    monkeypatch.setattr(decoding, "LOGITS", most)  # 1: one token of the references at a time
    generator = Generator(models[0], 16)
    chats = dialogues(5, seed=5)
    examples = [encode_example(generator.tokenizer, chat, 192)[:2] for chat in chats]
    starts = [mask.index(1) for _ids, mask in examples]
    prompts = [ids[:start] for (ids, _mask), start in zip(examples, starts, strict=True)]
    after = [(ids[start:], mask[start:]) for (ids, mask), start in zip(examples, starts, strict=True)]
    alone, nats = generator.replies(prompts), generator.likelihoods(examples)
    both = generator.answers(prompts, [*after[:4], ([], [])])
    assert [reply for reply, _ in both] == alone
    assert [one for _, one in both[:4]] == pytest.approx(nats[:4], rel=1e-4)


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_replies_are_those_of_generate_one_at_a_time(monkeypatch: pytest.MonkeyPatch):
    generator = Generator(str(ROOT / "data" / "base_model"), 40)  # a trained one: its replies end, and differ
    prompts = [encode_prompt(generator.tokenizer, chat[:-1], 120)[0] for chat in dialogues(5, turns=2)]
    assert decoding.is_plain(generator.model)
    alone = [decoding._generate(generator.model, [prompt], 40, 0)[0] for prompt in prompts]
    assert len({len(row) for row in alone}) > 2  # some end earlier and leave the batch
    chats = [encode_example(generator.tokenizer, chat, 192)[:2] for chat in dialogues(3, seed=5)]
    for plain in (True, False):
        monkeypatch.setattr(decoding, "is_plain", lambda _model, plain=plain: plain)
        assert generator.replies(prompts) == [generator._reply(row) for row in alone]
        together = generator.likelihoods(chats)
        assert together == pytest.approx([generator.likelihoods([chat])[0] for chat in chats], rel=1e-4)


def test_layers_with_a_window_go_through_generate():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 32}
    window = AutoConfig.for_model("mistral", **sizes, num_key_value_heads=2, sliding_window=8)
    model = AutoModelForCausalLM.from_config(window).eval()
    assert not decoding.is_plain(model)
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, 1
    prompts = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14], [5, 6, 3]]
    with torch.inference_mode():
        assert [row[:1] for row in decoding.greedy(model, prompts, 4, {1}, 0)] == [
            [int(model(input_ids=torch.tensor([prompt])).logits[0, -1].argmax())] for prompt in prompts
        ]


def test_batches_hold_every_row_once_and_stay_within_their_size():
    lengths = [5, 90, 17, 4000, 17, 3, 60]
    made = batches(lengths, tokens=200, rows=3)
    assert sorted(n for batch in made for n in batch) == list(range(7))
    assert all(len(batch) == 1 or len(batch) * max(lengths[n] for n in batch) <= 200 for batch in made)
    assert max(map(len, made)) <= 3
    assert batches([]) == []


def test_what_follows_the_rows_of_a_batch_takes_its_room():
    after = [1, 1, 150, 1]
    made = batches([10, 9, 8, 7], tokens=200, rows=3, after=after)
    assert made == [[0, 1], [2], [3]]
    assert batches([10, 9, 8, 7], tokens=200) == [[0, 1, 2, 3]]


def test_derangement_pairs_rows_of_different_conversations():
    groups = ["a", "a", "b", "c", "c", "c", "d", "e"]
    partner = embed.derangement(groups, 0)
    assert all(groups[n] != groups[other] for n, other in enumerate(partner) if other >= 0)
    assert (partner >= 0).sum() == 8
    assert (embed.derangement(["a", "a"], 0) == -1).all()
    assert embed.derangement([], 0).size == 0
    assert (embed.derangement(groups, 0) == partner).all()


def test_report_files_are_whole_and_parse(made: Path, dataset: Path, tmp_path: Path):
    content = summary(made, dataset)
    paths = report.write_report(content, tmp_path)
    stored = read_json(paths["json"])
    assert stored["verdict"] in ("do_not_serve", "cannot_tell")
    assert stored["test_rows"] == 12
    assert stored["dataset_fingerprint"] == "f" * 20
    assert stored["model_version"] == "v1-1a2b3c4d"
    assert set(stored["candidates"]) == {"base", "few_shot", "tuned"}
    for measures in stored["candidates"].values():
        assert set(measures["bits_per_byte"]) == {"value", "low", "high"}
    assert set(stored["differences"]) == {"tuned_vs_base", "tuned_vs_few_shot"}
    assert stored["reasons"]
    markdown = paths["md"].read_text()
    assert len(markdown.encode()) < 6_000
    assert "Bits por byte" in markdown
    page = paths["html"].read_text()
    assert '<html lang="es">' in page
    assert not re.search(r"(?:src|href)=\"(?!#)", page)  # nothing from elsewhere
    assert "@import" not in page
    _Balanced().feed(page)
    images = re.findall(r"<svg(?![^>]*aria-hidden)[^>]*>", page)
    assert images
    assert all('aria-label="' in image for image in images)


def test_a_report_of_an_earlier_version_is_written_again(made: Path, dataset: Path, tmp_path: Path):
    content = summary(made, dataset)
    for values in content["candidates"].values():
        for measure in ("accuracy", "overfitting", "toxic", "refused", "tool_calls"):
            del values[measure]
    for key in ("intents", "seeds", "accurate_similarity"):
        del content[key]
    paths = report.write_report(content, tmp_path)
    assert "Respuestas acertadas" not in paths["html"].read_text()


def test_reliability_by_intent_adds_up(made: Path, dataset: Path):
    content = summary(made, dataset)
    assert {one["intent"] for one in content["intents"]} == set(content["test_intents"])
    assert sum(one["rows"] for one in content["intents"]) == 12
    judged = [one for one in content["intents"] if one["candidates"]["tuned"]["value"] is not None]
    for one in judged:
        found = one["candidates"]["tuned"]
        assert 0 <= found["low"] <= found["value"] <= found["high"] <= 1
        assert one["tuned_vs_base"]["value"] == pytest.approx(found["value"] - one["candidates"]["base"]["value"])
    assert "En qué se puede confiar" in report.html(content)


def test_the_page_says_whether_the_model_learns_from_its_prompt(made: Path, dataset: Path):
    content = summary(made, dataset)
    for helps, said in (
        (None, "no se puede saber si los ejemplos"),
        (False, "0 millones de parámetros es demasiado pequeño para aprender de su instrucción"),
        (True, "aprende de su instrucción"),
    ):
        content["decision"]["prompting_helps"] = helps
        assert said in report.html(content)
    assert "demasiado pequeño" not in report.html(content)
    content["decision"]["prompting_helps"] = False
    for parameters in (7e9, None):  # a large one, and one behind an address
        content["candidates"]["base"]["parameters"]["value"] = parameters
        page = report.html(content)
        assert "no gana aquí con ejemplos" in page
        assert "demasiado pequeño" not in page


def test_the_page_blames_the_rows_only_for_what_they_did(made: Path, dataset: Path):
    content = summary(made, dataset)  # of twelve rows
    difference = content["differences"]["tuned_vs_base"][content["decision"]["measure"]]
    assert difference["p"] is None
    assert "no se puede saber: con esta prueba, la diferencia" in report.html(content)
    for low, high, p, said in (
        (-0.5, 0.5, 1.0, "no se puede saber: con esta prueba, la diferencia"),
        (-0.5, -0.4, 0.001, "Alcanzaron para superar al modelo base"),
        (0.4, 0.5, 0.001, "Con ellos no supera al modelo base"),
    ):
        difference |= {"value": (low + high) / 2, "low": low, "high": high, "p": p}
        assert said in report.html(content)


def test_what_leads_is_recommended_only_by_gates(made: Path, dataset: Path):
    content = summary(made, dataset)
    found = content["decision"]
    found |= {"recommendation": "base", "settled": True, "ready": False}
    found["judged"] = {"verdict": "do_not_serve", "reasons": ["Respuestas vacías: todas."]}
    for told in (report.html(content), report.markdown(content)):
        assert "aún no listo para servirse: el modelo base tal cual" in told
        assert "Recomendado" not in told
    assert "Respuestas vacías: todas." in report.html(content)
    assert report.recommended(content) == "base (not ready)"
    found |= {"judged": None, "ready": None}
    assert report.recommended(content) == "base (judged by no gate)"
    for told in (report.html(content), report.markdown(content)):
        assert "Ninguna exigencia se ha medido en esta opción." in told
    found |= {"judged": {"verdict": "serve", "reasons": []}, "ready": True}
    assert "Recomendado: el modelo base tal cual" in report.html(content)
    del found["judged"]  # as earlier versions wrote it
    assert "Ninguna exigencia se ha medido en esta opción." in report.html(content)


def test_a_verdict_that_cannot_tell_says_what_was_not_measured(made: Path, dataset: Path):
    content = summary(made, dataset) | {"verdict": "cannot_tell"}
    content["gates"] = [gate | {"outcome": "passed"} for gate in content["gates"]]
    content["gates"][0] |= {"outcome": "cannot_tell", "value": None}
    for told in (report.html(content), report.markdown(content)):
        assert "no se pudo medir todo lo que se exige (pérdida de entrenamiento)" in told
        assert "demasiado pequeña o el resultado" not in told
    content["gates"][1] |= {"outcome": "cannot_tell", "value": 9.9}
    assert "y parte de lo que se exige no se pudo medir (pérdida" in report.html(content)


def test_the_page_tells_what_preferences_taught(made: Path, dataset: Path):
    content = summary(made, dataset)
    held = {
        "rows": 66,
        "reward_accuracy": {"value": 0.665, "low": 0.503, "high": 0.813},
        "good_nats_per_token": {"before": 5.96, "after": 6.2},
        "likelihood_fell": False,
    }
    for fell in (False, True):
        stage = {"objective": "kto", "heldout": {**held, "likelihood_fell": fell}}
        content["training"]["result"] = {"stages": [{"objective": "sft"}, stage]}
        page = report.html(content)
        assert "KTO en 66 filas apartadas: acierto de la recompensa 0,67 (intervalo del 95 %: de 0,50 a 0,81" in page
        assert "5,96 antes, 6,20 después" in page
        assert ("se volvieron menos probables" in page) is fell
    held["reward_accuracy"] = dict.fromkeys(("value", "low", "high"))  # too few rows to tell
    content["training"]["result"] = {"stages": [{"objective": "dpo", "heldout": held}]}
    assert "acierto de la recompensa" not in report.html(content)


def test_page_and_card_tell_what_the_training_did_about_trouble(made: Path, dataset: Path):
    content = summary(made, dataset)
    assert "punto de control" not in report.html(content)
    cause = "the process before this one was killed"
    event = {"what": "resumed", "stage": "sft", "step": 1200, "did": "goes on from its checkpoint", "cause": cause}
    kinds = ("out_of_memory", "diverged", "disk_full", "broken_checkpoint", "early_stop")
    content["training"]["result"] = {"recoveries": [event, *({**event, "what": kind} for kind in kinds)]}
    page = report.html(content)
    assert "Paso 1.200: el proceso anterior había terminado; siguió desde su punto de control." in page
    assert page.count("Paso 1.200: ") == 6
    assert "went on with smaller parts" in report.html({**content, "language": "en"})
    told = card.model_card(read_json(dataset / "manifest.json"), {"recoveries": [event] * 25}, content)
    assert told.count("- At step 1,200 of sft: the process before this one was killed; goes on from its checkpoint") == 20
    assert "- 5 more in training_log.jsonl" in told


def test_texts_are_escaped(made: Path, dataset: Path):
    content = summary(made, dataset)
    content["samples"]["best"][0]["reference"] = "<script>alert(1)</script>"
    content["assistant"] = "a<b>"
    page = report.html(content)
    assert "<script>" not in page
    assert "a<b>" not in page


def test_english_report_and_card(made: Path, dataset: Path):
    content = {**summary(made, dataset), "language": "en"}
    assert '<html lang="en">' in report.html(content)
    text = card.model_card(
        read_json(dataset / "manifest.json"), {"train_loss": 1.5, "seconds": 90}, content, {"license": "cc-by-sa-4.0"}
    )
    head = yaml.safe_load(text.split("---")[1])
    assert head["license"] == "cc-by-sa-4.0"
    assert head["language"] == ["en"]
    assert head["model-index"][0]["results"][0]["metrics"]
    for title in (
        "## Data",
        "## Training",
        "## Evaluation",
        "## What it is good at",
        "## Known limitations",
        "## Cost",
        "## Licence",
    ):
        assert title in text
    assert "no consent 3" in text
    assert "{" not in text.split("---", 2)[2]


def test_identical_candidates_differ_by_nothing(made: Path, models: tuple[str, str], dataset: Path, tmp_path: Path):
    same = [candidates.Plain("base", models[0]), candidates.Plain("tuned", models[0])]
    spec = benchmark.prepare(ASSISTANT, dataset, same, tmp_path / "out", threads=1, cache=made.parent / "cache")
    write_json(tmp_path / "out" / "result.json", worker.run(spec, Progress.open(tmp_path / "out")))
    content = benchmark.summarise(ASSISTANT, tmp_path / "out", benchmark.Made("v1", dataset))
    for measure, found in content["differences"]["tuned_vs_base"].items():
        assert found["value"] in (0, None), measure
        assert found["low"] == found["high"] == found["value"]
    report.html(content)
    report.markdown(content)
    result = read_json(tmp_path / "out" / "result.json")
    result["candidates"]["tuned"]["identity"] = "other weights, which happened to say the same"
    write_json(tmp_path / "out" / "result.json", result)
    empty = benchmark.summarise(ASSISTANT, tmp_path / "out", benchmark.Made("v1", dataset))["differences"]["tuned_vs_base"][
        "empty"
    ]
    assert empty["low"] < empty["value"] == 0 < empty["high"]


def test_chat_answers_line_by_line(models: tuple[str, str]):
    lines = io.StringIO('{"messages": [{"role": "user", "content": "Hola"}]}\nnonsense\n\n{"messages": []}\n')
    out = io.StringIO()
    count = chat.answer(Generator(models[0], 8), lines, out)
    said = [json.loads(line) for line in out.getvalue().splitlines()]
    assert said[0] == {"ready": True}
    assert isinstance(said[1]["reply"], str)
    assert "error" in said[2]
    assert count >= 1


def test_chat_offers_tools_and_hands_results_on(models: tuple[str, str]):
    class Booking(Generator):
        """Calls as a tuned model would: the words of this one are random."""

        heard: list[str]

        def replies(self, prompts: Any) -> list[Reply]:
            self.heard = [self.tokenizer.decode(ids) for ids in prompts]
            return [Reply('<tool_call>{"name": "book", "arguments": {"day": "lunes"}}</tool_call>', 9, True)]

    tool = {"type": "function", "function": {"name": "book", "parameters": {}}}
    talk = messages_of([("user", "Hola"), ("assistant", calls_text([{"name": "book", "arguments": {}}]))])
    talk.append({"role": "tool", "tool_call_id": "call_1", "name": "book", "content": "libre"})
    generator, out = Booking(models[0], 8), io.StringIO()
    lines = [{"messages": talk, "tools": [tool]}, {"messages": talk[:1]}]
    chat.answer(generator, io.StringIO("".join(json.dumps(line) + "\n" for line in lines[:1])), out)
    assert '"name": "book"' in generator.heard[0]
    assert "libre" in generator.heard[0]
    assert json.loads(out.getvalue().splitlines()[1])["reply"] == calls_text([{"name": "book", "arguments": {"day": "lunes"}}])
    out = io.StringIO()
    chat.answer(generator, io.StringIO(json.dumps(lines[1]) + "\n"), out)
    assert json.loads(out.getvalue().splitlines()[1])["reply"].startswith("<tool_call>")  # nobody offered it one


class _Balanced(HTMLParser):
    """Fails on a tag that is closed out of order."""

    VOID = frozenset({"meta", "link", "br", "input", "path", "circle", "rect"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag
