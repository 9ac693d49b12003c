"""From a frozen data set to one of the same contexts with a teacher's replies, frozen beside it.

    distilled = distil(work, teacher, ask, …)     <home>/datasets/<assistant>/<fingerprint>/, `latest` stays where it is

Only training rows change: validation, test and preferences are those of the data set it comes from, so both models are measured
on the same rows. A correction stays (a person knew better than the teacher), as does a row that calls a tool. Every other
training context gets what the teacher said there: in production, where the log names it, else by asking. Such a reply passes the
rules that every reply passes, and is left out where people rated it badly; nothing else takes its place.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import sqlalchemy as sa

from finetune_assets.assistants.settings import Assistant
from finetune_assets.corpus.examples import ERROR_REPLIES
from finetune_assets.corpus.personal_data import residual
from finetune_assets.dataset import manifest as manifests
from finetune_assets.dataset.duplicates import twins_in, with_text
from finetune_assets.dataset.formats import FILES, digest, read_frames, read_lines, read_targets, write_files
from finetune_assets.dataset.leaks import examine
from finetune_assets.dataset.manifest import counts, tally
from finetune_assets.dataset.selection import CORRECTED, content, own_contacts
from finetune_assets.dataset.splits import TRAIN
from finetune_assets.distillation.replies import Question, Replies, estimated, question
from finetune_assets.distillation.teacher import Teacher
from finetune_assets.errors import LeakError, TooFewExamples
from finetune_assets.evaluation import rules
from finetune_assets.evaluation.candidates import TestRow
from finetune_assets.registry import Ledger
from finetune_assets.registry.traffic import requests
from finetune_assets.storage import Store, replacing_folder, write_json, write_parquet

DISTILLED = "distilled"
"""Source of a row whose reply is the teacher's."""
LOG, ASKED = "log", "asked"
Row = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """One training context of the data set, and its reply there."""

    lineage: Row
    prompt: list[dict[str, Any]]
    reply: str
    fixed: bool
    """A correction or a tool call: it stays as it is."""
    line: Row
    """The row it stands in."""
    alone: bool
    """Whether it is the row's only target."""

    @property
    def ids(self) -> Row:
        """Whose it is."""
        return {name: self.lineage[name] for name in ("message_id", "conversation_id", "user")}


def targets(folder: Path) -> list[Target]:
    """Every training context of a frozen data set, in the order of its lines; a line of several targets has as many."""
    lineage = pl.read_parquet(folder / "lineage.parquet").filter(pl.col("split") == TRAIN).sort("line", "turn")
    rows = list(read_lines(folder / "train.jsonl"))
    many = {line for line, count in lineage["line"].value_counts().rows() if count > 1}
    made: list[Target] = []
    for of in lineage.iter_rows(named=True):
        line = rows[of["line"]]
        turn = int(of["turn"]) if of.get("turn") is not None else len(line["messages"]) - 1
        prompt = [{key: value for key, value in message.items() if key != "weight"} for message in line["messages"][:turn]]
        said = line["messages"][turn]
        fixed = of["source"] == CORRECTED or any(m.get("tool_calls") or m["role"] == "tool" for m in [*prompt, said])
        made.append(Target(of, prompt, str(said.get("content") or ""), fixed, line, of["line"] not in many))
    return made


def said_in_production(ledger: Ledger, teacher: Teacher, found: list[Target], since: datetime.date | None) -> set[str]:
    """Ids of messages that the teacher itself wrote: the router's log names its version, or `since` says that it was serving."""
    known: set[str] = set()
    if teacher.version is not None:
        query = sa.select(requests.c.message_id).where(
            (requests.c.version == teacher.version) & (requests.c.kind == "live") & (requests.c.status == 200)
        )
        with ledger.engine.connect() as connection:
            known = {str(one) for one in connection.execute(query).scalars() if one}
    if since is not None:
        moments = {one.lineage["message_id"]: one.lineage["started_at"] for one in found}
        known |= {message for message, moment in moments.items() if moment is not None and moment.date() >= since}
    return known


def questions(teacher: Teacher, found: list[Target], said: set[str]) -> list[Question]:
    """What the teacher has to be asked."""
    wanted = [one for one in found if not one.fixed and one.lineage["message_id"] not in said]
    return [question(teacher, one.prompt, one.ids) for one in wanted]


def freeze(store: Store, assistant: Assistant, folder: Path, what: tuple[Teacher, Replies, set[str]]) -> manifests.Manifest:
    """Writes the distilled data set; its manifest. `what`: teacher, its replies, messages it wrote in production.

    Raises TooFewExamples, LeakError.
    """
    teacher, replies, said = what
    found, before = targets(folder), manifests.read_manifest(folder)
    frame = _judged(assistant, folder, _replied(teacher, found, replies, said), own_contacts(store))
    kept = frame.filter(pl.col("reason").is_null())
    learnt = kept.filter(pl.col("source") == DISTILLED).height
    if kept.height < assistant.min_examples or not learnt:
        unasked = [one for one in questions(teacher, found, said) if replies.get(one.key) is None]
        usd = estimated(teacher.model, unasked)[1] if unasked else None
        cost = f" Asking for all that are missing would cost about ${usd:.2f}." if usd is not None else ""
        raise TooFewExamples(
            f"{assistant.name}: {learnt} replies of {teacher.name} and {kept.height - learnt} corrections are fit to learn from, "
            f"min_examples is {assistant.min_examples}. Left out: {_listed(tally(frame['reason'].drop_nulls()))}.{cost} "
            "Raise --max-usd, widen window_weeks, or lower min_examples."
        )
    settings = {**before["settings"], "teacher": {"provider": teacher.model.provider, "model": teacher.model.model}}
    frames = read_frames(folder)
    schema = frames["examples"].schema
    made = pl.DataFrame([_line(found[row["n"]], row) for row in kept.to_dicts()], schema=schema).sort("digest")
    frames["examples"] = pl.concat([made, frames["examples"].filter(pl.col("split") != TRAIN)])
    mark = manifests.fingerprint(settings, frames)
    target = store.dataset(assistant.name, mark)
    if not (target / "manifest.json").exists():
        about = _about(teacher, frame)
        with replacing_folder(target) as draft:
            write_files(draft, {kind: [rows] for kind, rows in frames.items()})
            dropped = pl.read_parquet(folder / "dropped.parquet")
            out = frame.filter(pl.col("reason").is_not_null()).select(
                "message_id", "reason", kept_message_id=pl.lit(None, pl.String)
            )
            write_parquet(draft / "dropped.parquet", pl.concat([dropped, out.select(dropped.columns)]).sort("message_id"))
            problems, compared = examine(draft, settings)
            if problems:
                raise LeakError(
                    f"The replies of {teacher.name} would tie the splits of {assistant.name} together, so nothing was frozen. "
                    f"{'; '.join(problems[:5])} ({len(problems)} in all)."
                )
            write_json(draft / "manifest.json", _manifest(before, settings, mark, frames, (draft, about, problems, compared)))
        seen = manifests.seen_file(store, assistant.name, folder.name)
        if seen.exists():
            manifests.write_seen(store, assistant.name, mark, pl.read_parquet(seen)["feedback_id"])
    return manifests.read_manifest(target)


def _replied(teacher: Teacher, found: list[Target], replies: Replies, said: set[str]) -> pl.DataFrame:
    """One row a target: what it is going to say, where that comes from, or the reason why there is nothing."""
    rows: list[Row] = []
    for n, one in enumerate(found):
        row: Row = {"n": n, "message_id": one.lineage["message_id"], "intent": one.lineage["intent"], "reply": one.reply}
        row |= {
            "user_text": str(one.prompt[-1].get("content") or ""),
            "source": one.lineage["source"],
            "by": None,
            "reason": None,
        }
        if not one.fixed:
            row["source"] = DISTILLED
            if one.lineage["message_id"] in said:
                row["by"] = LOG
            else:
                answer = replies.get(question(teacher, one.prompt, one.ids).key)
                row |= {"by": ASKED, "reply": (answer.reply if answer else None) or ""}
                row["reason"] = "not_asked" if answer is None else answer.missing
        rows.append(row)
    text = ("message_id", "intent", "reply", "user_text", "source", "by", "reason")
    return pl.DataFrame(rows, schema={"n": pl.Int64, **dict.fromkeys(text, pl.String)})


def _judged(assistant: Assistant, folder: Path, frame: pl.DataFrame, allow: frozenset[str]) -> pl.DataFrame:
    """Fills `reason`, the first rule that a teacher's reply breaks; what people wrote was judged when the data set was frozen."""
    new = (pl.col("source") == DISTILLED) & pl.col("reason").is_null()
    errors = "(?i)" + "|".join(pattern for patterns in ERROR_REPLIES.values() for pattern in patterns)
    judged = content(
        frame.with_columns(user_chars=pl.col("user_text").str.len_chars(), error_reply=pl.col("reply").str.contains(errors)),
        assistant.filters,
    )
    # A user's turn that is here has passed its bounds, perhaps under other settings: only the reply is on trial.
    about_reply = ~pl.col("reason").is_in(["user_too_short", "user_too_long"]).fill_null(False)
    reasons = judged.select(pl.when(about_reply).then("reason")).to_series()
    frame = frame.with_columns(reason=pl.when(new).then(reasons).otherwise("reason"))
    frame = _mark(frame, "breaks_rule", _broken(assistant, frame))
    frame = _mark(frame, "personal_data_residual", [bool(residual([text], allow=allow)) for text in frame["reply"]])
    threshold = assistant.filters.near_duplicate
    mine = with_text(frame, "reply")["text"]
    bad, held = _texts(folder)
    frame = _mark(frame, "same_as_negative", (twins_in(mine, bad, threshold) >= 0).tolist())
    frame = _mark(frame, "same_as_heldout", (twins_in(mine, held, threshold) >= 0).tolist())
    first = pl.struct("text", "fit").is_first_distinct()
    again = frame.select(text=mine, fit=pl.col("reason").is_null()).select(~first & pl.col("fit")).to_series()
    return _mark(frame, "exact_duplicate", again.to_list())


def _mark(frame: pl.DataFrame, reason: str, hit: list[bool]) -> pl.DataFrame:
    on_trial = (pl.col("source") == DISTILLED) & pl.col("reason").is_null() & pl.lit(pl.Series(hit, dtype=pl.Boolean))
    return frame.with_columns(reason=pl.when(on_trial).then(pl.lit(reason)).otherwise("reason"))


def _broken(assistant: Assistant, frame: pl.DataFrame) -> list[bool]:
    """Whether a reply breaks a rule of the assistant, the same that the benchmark holds replies to."""
    if not assistant.rules:
        return [False] * frame.height
    rows = [
        TestRow([{"role": "user", "content": one["user_text"]}], one["reply"], "", one["message_id"], "", one["intent"] or "")
        for one in frame.iter_rows(named=True)
    ]
    table = rules.verdicts(assistant.rules, rows, frame["reply"].to_list())
    return (np.nan_to_num(table, nan=1.0) == 0).any(axis=1).tolist()


def _texts(folder: Path) -> tuple[pl.Series, pl.Series]:
    """What people rated badly or corrected, and what is held out: user's turn and reply of each."""
    bad: list[pl.DataFrame] = [pl.DataFrame(schema={"user_text": pl.String, "reply": pl.String})]
    held = [bad[0]]
    for spec in FILES:
        found = read_targets(folder, spec).select("user_text", "reply")
        if TRAIN not in spec.splits:
            held.append(found)
        bad.append(pl.DataFrame(list(_bad(folder / spec.name, spec.kind)), schema=bad[0].schema))
    return with_text(pl.concat(bad), "reply")["text"], with_text(pl.concat(held), "reply")["text"]


def _bad(path: Path, kind: str) -> Iterator[Row]:
    if kind == "examples":
        return
    for row in read_lines(path):
        said = row["rejected"] if kind == "preferences" else row["completion"] if row["label"] is False else []
        for message in said[:1]:
            yield {"user_text": row["prompt"][-1].get("content") or "", "reply": message.get("content") or ""}


def _line(target: Target, row: Row) -> Row:
    """A row of the new file: context and reply in one line of JSON to every reader, with the lineage of the target."""
    said = {"role": "assistant", "content": target.reply if row["source"] != DISTILLED else row["reply"]}
    line = target.line if target.fixed and target.alone else {**target.line, "messages": [*target.prompt, said]}
    text = json.dumps(line, ensure_ascii=False, separators=(",", ":"))
    for raw, escaped in (("\u2028", "\\u2028"), ("\u2029", "\\u2029"), ("\x85", "\\u0085")):
        text = text.replace(raw, escaped)
    return {**target.lineage, "source": row["source"], "turn": len(target.prompt), "jsonl": text, "digest": digest(text.encode())}


def _about(teacher: Teacher, frame: pl.DataFrame) -> Row:
    kept = frame.filter(pl.col("reason").is_null())
    return {
        **teacher.as_dict(),
        "contexts": frame.height,
        "learnt": tally(kept.filter(pl.col("source") == DISTILLED)["by"]),
        "kept_as_they_were": tally(kept.filter(pl.col("source") != DISTILLED)["source"]),
        "left_out": tally(frame["reason"].drop_nulls()),
    }


def _manifest(
    before: manifests.Manifest, settings: Row, mark: str, frames: dict[str, pl.DataFrame], made: tuple[Path, Row, Any, Any]
) -> manifests.Manifest:
    draft, about, problems, compared = made
    return {
        **before,
        "fingerprint": mark,
        "settings": settings,
        "counts": counts(frames["examples"]),
        "rejected": tally(pl.read_parquet(draft / "dropped.parquet")["reason"]),
        "leaks": {**before["leaks"], "found": problems, "compared": compared},
        "parents": [before["fingerprint"]],
        "distilled": about,
        "created_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _listed(reasons: dict[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in reasons.items()) or "none"
