"""One benchmark's measuring: replies, likelihoods, waiting times, guards and scores of each candidate, cached by content."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from jinja2 import TemplateError

from finetune_assets.dataset.formats import read_lines
from finetune_assets.evaluation.called import as_said
from finetune_assets.training import base_model as base_models
from finetune_assets.worker import classify, embed, endpoint, guards, models
from finetune_assets.worker.asking import Asking, Candidate
from finetune_assets.worker.cached import Cache, Rows, ask
from finetune_assets.worker.generate import Generator, batches, content, finite, logit_tokens
from finetune_assets.worker.progress import Progress
from finetune_assets.worker.scores import texts
from finetune_assets.worker.threads import side_by_side

BESIDE = 8
"""Prompts on which an adapter beside its base is held to the merged model."""


class Stage:
    """Counts the rows that are done."""

    def __init__(self, progress: Progress, name: str, total: int) -> None:
        self.progress, self.name, self.total, self.count = progress, name, total, 0

    def done(self, rows: int) -> None:
        """`rows` more."""
        self.count += rows
        self.progress.update(self.name, self.count, self.total)


class Bench:
    """One benchmark: its spec, its cache, and the encoder and index that candidates share."""

    def __init__(self, spec: dict[str, Any], cache: Cache, progress: Progress) -> None:
        self.spec, self.cache, self.progress = spec, cache, progress
        self.most = int(spec.get("max_new_tokens", 96))
        self.encoder_name = str(spec.get("similarity_model") or embed.DEFAULT)
        self.scoring = 0.0
        """CPU seconds of everything that is neither generation nor likelihood."""
        self._encoder: embed.Encoder | None = None
        self._vectors: dict[str, embed.Floats] = {}
        self._guarded: dict[str, dict[str, Any]] = {}
        self.asking = Asking(spec, cache, progress, self.encode, self.encoder_name)

    def encode(self, texts: list[str]) -> embed.Floats:
        """Unit vectors of texts, each computed once; the encoder is loaded when it is first needed."""
        fresh = [text for text in dict.fromkeys(texts) if text not in self._vectors]
        if fresh:
            self._encoder = self._encoder or embed.Encoder(self.spec.get("similarity_model"))
            self._vectors |= dict(zip(fresh, self._encoder.encode(fresh), strict=True))
        return np.stack([self._vectors[text] for text in texts]) if texts else np.zeros((0, 1), np.float32)

    def local(self, candidate: Candidate, generator: Generator) -> dict[str, Any]:
        """Columns of a candidate as lists, and `_facts` about its model."""
        started = time.perf_counter()
        identity = content(candidate.model or "")
        about = [identity, generator.max_new_tokens, transformers.__version__, torch.__version__]
        rows, chosen = self.asking.rows(candidate, candidate.rows, generator, about)
        prompts, columns = _prompts(rows, generator)
        replies, likelihoods = self._answers(candidate.name, prompts, rows, generator, about)
        said = [as_said(r["text"]) if _calls_tools(row) else r["text"] for r, row in zip(replies, rows, strict=True)]
        columns |= {"reply": said, "reply_tokens": [r["tokens"] for r in replies]}
        columns |= {"stopped": [r["stopped"] for r in replies], "sources": [row.get("sources", []) for row in rows]}
        columns |= likelihoods
        measured = prompts[: int(self.spec.get("latency_rows", 24))]
        where = [machine(), torch.get_num_threads()]
        self.progress.update(f"{candidate.name} waiting time", 0, len(measured))
        alone = self.cache.get(lambda: _alone(generator, measured), "alone", about, measured, where)
        columns["seconds"] = [one["seconds"] for one in alone] + [None] * (len(prompts) - len(alone))
        self.progress.update(f"{candidate.name} waiting time", len(measured), len(measured))
        facts = self.cache.get(lambda: _facts(generator), "facts", about) | self._guards(candidate, generator, about)
        if candidate.cases:
            cases, _chosen = self.asking.rows(candidate, candidate.cases, generator, about)
            facts["checks"] = self.cache.get(lambda: _say(generator, cases), "checks", about, cases)
        facts |= {"context": generator.context, "max_new_tokens": generator.max_new_tokens, "model": candidate.model}
        facts |= {"same_alone": [one["text"] == reply["text"] for one, reply in zip(alone, replies, strict=False)]}
        beside = self.cache.get(lambda: generator.beside(measured[:BESIDE]), "beside", about, measured[:BESIDE])
        facts |= {"same_adapter": [text == one["text"] for text, one in zip(beside or [], alone, strict=False)]}
        facts |= {"same_rendering": _same_rendering(generator, rows[: len(measured)], prompts, columns["dropped_turns"])}
        facts |= {**chosen, "identity": identity, "seconds": round(time.perf_counter() - started, 3)}
        return {**columns, "missing": [None] * len(rows), "_facts": facts}

    def remote(self, candidate: Candidate) -> dict[str, Any]:
        """Columns of an endpoint's answers; what is missing is asked for again in the next report, the rest is cached."""
        where = candidate.endpoint
        if where is None:
            raise ValueError(candidate.name)
        rows, started = candidate.rows, time.perf_counter()
        self.progress.update(f"{candidate.name} replies", 0, len(rows))
        tools = [row.get("tools") or [] for row in rows]
        answers, fresh = ask(self.cache, where, [row["messages"] for row in rows], self.most, tools)
        self.progress.update(f"{candidate.name} replies", len(rows), len(rows))
        empty: list[Any] = [None] * len(rows)
        names = ("reply", "missing", "prompt_tokens", "reply_tokens", "stopped", "seconds")
        columns: dict[str, Any] = {name: [answer.get(name) for answer in answers] for name in names}
        columns |= {"nll": empty, "reference_tokens": empty, "dropped_turns": [0] * len(rows), "sources": [[] for _ in rows]}
        facts: dict[str, Any] = {
            "model": where.model,
            "url": where.url,
            "identity": {"id": where.model, "url": where.url},
            "max_new_tokens": self.most,
        }
        if candidate.cases:
            cases = candidate.cases
            asked = [case["messages"] for case in cases], self.most, [case.get("tools") or [] for case in cases]
            said, more = ask(self.cache, where, *asked)
            facts["checks"] = [answer["reply"] for answer in said]
            fresh = [*fresh, *more]
        if self.spec.get("canaries"):
            planted = self.spec["canaries"]
            answered, more = ask(self.cache, where, [guards.canary_prompt(canary) for canary in planted], self.most)
            facts["canaries"] = guards.said(planted, [answer["reply"] for answer in answered])
            fresh = [*fresh, *more]
        facts["bought"] = endpoint.bought(fresh)
        return {**columns, "_facts": {**facts, "seconds": round(time.perf_counter() - started, 3)}}

    def _guards(self, candidate: Candidate, generator: Generator, about: list[Any]) -> dict[str, Any]:
        """What is known of a model's everyday talk and secrets; once a model."""
        model = str(candidate.model)
        if model not in self._guarded:
            found: dict[str, Any] = {}
            if self.spec.get("general"):
                rows = list(read_lines(Path(self.spec["general"])))
                found["general"] = self.cache.get(lambda: guards.likelihoods(generator, rows), "general", about, rows)
            if self.spec.get("canaries"):
                planted = self.spec["canaries"]
                found["canaries"] = self.cache.get(lambda: guards.canaries(generator, planted), "canaries 2", about, planted)
            self._guarded[model] = found
        return self._guarded[model]

    def _answers(
        self, name: str, prompts: list[list[int]], rows: Rows, generator: Generator, about: list[Any]
    ) -> tuple[Rows, dict[str, list[Any]]]:
        """Each prompt's reply (`text`, `tokens`, `stopped`), and the columns `nll` and `reference_tokens`.

        A reference whose likelihood stands after the very prompt that is answered shares its computation; what a longer prompt
        fits before, since no room for a reply is wanted there, is computed for itself.
        """
        examples = guards.examples(generator, rows)
        fits = [len(ids) <= generator.context for ids, _mask in examples]
        following = [_following(prompts[n], *examples[n]) if fit else None for n, fit in enumerate(fits)]
        replies: Rows = [{} for _ in rows]
        nll: list[float | None] = [None] * len(rows)

        def answer(batch: list[int]) -> Any:
            asked = [(prompts[row], following[row] or ([], [])) for row in batch]

            def make() -> Any:
                made = generator.answers(*zip(*asked, strict=True))
                return [{**vars(reply), "nats": finite(nats)} for reply, nats in made]

            return self.cache.get(make, "answers", about, asked)

        stage = Stage(self.progress, f"{name} replies", len(rows))
        room = [max(generator.max_new_tokens, len(known[0]) if known else 0) for known in following]
        for batch, made in _each(generator, batches([len(prompt) for prompt in prompts], after=room), answer, stage):
            for row, one in zip(batch, made, strict=True):
                replies[row] = one
                nll[row] = one["nats"] if following[row] else None
        alone = [n for n, known in enumerate(following) if known is None and fits[n]]

        def measure(batch: list[int]) -> Any:
            inputs = [examples[alone[n]] for n in batch]
            return self.cache.get(lambda: [finite(nats) for nats in generator.likelihoods(inputs)], "nll", about, inputs)

        groups = batches([len(examples[n][0]) for n in alone], tokens=logit_tokens(generator.vocabulary))
        for batch, made in _each(generator, groups, measure, Stage(self.progress, f"{name} likelihood", len(alone))):
            for n, nats in zip(batch, made, strict=True):
                nll[alone[n]] = nats
        return replies, {"nll": nll, "reference_tokens": [sum(mask) for _, mask in examples]}

    def similarities(self, candidates: list[Candidate], results: dict[str, dict[str, Any]]) -> None:
        """Adds similarity, floor and text statistics to every candidate's columns."""
        started = time.process_time()
        seed = int(self.spec.get("seed", 0))
        for step, candidate in enumerate(candidates):
            self.progress.update("similarity", step, len(candidates))
            columns = results[candidate.name]
            replies = [reply or "" for reply in columns["reply"]]
            asked = [[row["reference"], row.get("conversation_id")] for row in candidate.rows]
            columns |= self.cache.get(
                lambda c=candidate, r=replies: self._scores(r, c.rows, seed), "texts 2", self.encoder_name, seed, replies, asked
            )
        self.progress.update("similarity", len(candidates), len(candidates))
        self.scoring += time.process_time() - started

    def toxicities(self, candidates: list[Candidate], results: dict[str, dict[str, Any]]) -> None:
        """Adds the classifier's score of every reply; null where the settings name none."""
        started, source = time.process_time(), self.spec.get("toxicity_model")
        classifier = classify.Classifier(source) if source else None
        about = content(source) if source else None
        for candidate in candidates:
            columns = results[candidate.name]
            replies = [reply or "" for reply in columns["reply"]]
            scores = (
                self.cache.get(lambda c=classifier, r=replies: c.toxicity(r), "toxicity", about, replies) if classifier else None
            )
            columns["toxicity"] = scores or [None] * len(replies)
        self.scoring += time.process_time() - started

    def _scores(self, replies: list[str], rows: Rows, seed: int) -> dict[str, Any]:
        references = [row["reference"] for row in rows]
        groups = [str(row.get("conversation_id") or n) for n, row in enumerate(rows)]
        vectors = self.encode([*references, *replies])
        partner = embed.derangement(groups, seed)
        own, floor = embed.similarities(vectors[len(rows) :], vectors[: len(rows)], partner)
        empty = np.array([not reference.strip() for reference in references], bool)
        empty_partner = (partner >= 0) & empty[partner]
        made = texts(replies, references)
        return {"similarity": _null(own, empty), "floor": _null(floor, np.isnan(floor) | empty_partner), **made}


def _prompts(rows: Rows, generator: Generator) -> tuple[list[list[int]], dict[str, Any]]:
    """Prompt ids of each row, and their columns."""
    most = generator.prompt_length
    made = [models.encode_prompt(generator.tokenizer, row["messages"], most, row.get("tools")) for row in rows]
    return [ids for ids, _ in made], {"prompt_tokens": [len(ids) for ids, _ in made], "dropped_turns": [d for _, d in made]}


def _following(prompt: list[int], ids: list[int], mask: list[int]) -> tuple[list[int], list[int]] | None:
    """The part of an example (ids, mask) that comes after the prompt; null where it begins with another."""
    if ids[: len(prompt)] != prompt or any(mask[: len(prompt)]):
        return None
    return ids[len(prompt) :], mask[len(prompt) :]


def _each(generator: Generator, groups: list[list[int]], work: Callable[[list[int]], Any], stage: Stage) -> Iterator[Any]:
    """(batch, what `work` made of it) in order, counted."""
    stage.done(0)
    for batch, made in side_by_side(work, groups, small=generator.small):
        yield batch, made
        stage.done(len(batch))


def _say(generator: Generator, cases: Rows) -> list[str]:
    """Greedy replies to the prompts of the standing suite, calls in the corpus' text."""
    prompts, _columns = _prompts(cases, generator)
    said = [""] * len(cases)
    for batch in batches([len(prompt) for prompt in prompts]):
        for n, reply in zip(batch, generator.replies([prompts[n] for n in batch]), strict=True):
            said[n] = as_said(reply.text) if cases[n].get("tools") else reply.text
    return said


def _alone(generator: Generator, prompts: list[list[int]]) -> list[dict[str, Any]]:
    """Text and seconds of each prompt's reply alone, after one that warms up; a small model uses one thread."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if generator.small else threads)
        for prompt in prompts[:1]:
            generator.alone(prompt)
        return [{"seconds": seconds, "text": reply.text} for reply, seconds in map(generator.alone, prompts)]
    finally:
        torch.set_num_threads(threads)


def _calls_tools(row: dict[str, Any]) -> bool:
    return bool(row.get("tools") or row.get("calls"))


def _same_rendering(generator: Generator, rows: Rows, prompts: list[list[int]], dropped: list[int]) -> list[bool]:
    """Whether the tokenizer's own chat template, as other servers apply it, gives the prompt ids that were measured. Rows with
    tools are left out where the template knows none: there they are text, which this project alone writes."""
    knows_tools = models.renderer(generator.tokenizer).knows_tools
    try:
        return [
            generator.tokenizer.apply_chat_template(
                row["messages"], tools=row.get("tools") or None, add_generation_prompt=True, return_dict=False
            )
            == ids
            for row, ids, gone in zip(rows, prompts, dropped, strict=False)
            if not gone and (knows_tools or not _calls_tools(row))
        ]
    except TemplateError:  # a template that knows no system role: the rendering puts it into the user's turn
        return []


def _facts(generator: Generator) -> dict[str, Any]:
    numbers = list(generator.model.parameters())
    folder = base_models.folder(generator.source)
    files = [*folder.glob("*.safetensors"), *folder.glob("*.bin")] if folder else []
    size = sum(file.stat().st_size for file in files) or sum(p.numel() * p.element_size() for p in numbers)
    return {"parameters": generator.parameters(), "bytes": size}


def _null(values: Any, where: Any) -> list[float | None]:
    return [None if gone else round(float(value), 6) for value, gone in zip(values, where, strict=True)]


def machine() -> dict[str, Any]:
    """What the times depend on."""
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8") if info.exists() else ""
    names = [line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name")]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"processor": names[0] if names else platform.processor(), "cores": len(names) or None, "gpu": gpu}
