"""Plants what a real export has: wrong replies, copies, broken rows, feedback. Everything planted is returned as the truth."""

from __future__ import annotations

import random
import re
import unicodedata
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from .sample import Conversation, clock
from .talk import Turn

Row = dict[str, Any]

WRONG = (
    "Lo siento, no puedo ayudarte con eso.",
    "No entiendo tu mensaje, intenta de nuevo.",
    "Error: tiempo de espera agotado.",
    "Ocurrió un error inesperado. Vuelve a intentarlo más tarde.",
    "Sorry, I didn't get that. Could you rephrase?",
    "No entiendo la pregunta.",
    "No tengo esa información.",
    "Gracias por tu mensaje. Un agente te responderá.",
)
CRITICISM = (
    "La hora no es la que pidió la persona.",
    "No responde a lo que se preguntó.",
    "Debía contestar con los datos del local.",
    "Respuesta fuera de lugar.",
    "Esto no ayuda en nada.",
    "Confundió los datos.",
    "Falta confirmar lo que se pidió.",
)
PRAISE = (
    "Muy clara.",
    "Respuesta correcta y amable.",
    "Bien resuelto.",
    "Rápido y sin vueltas.",
    "Así debería responder siempre.",
    "Perfecto.",
)
WEEKDAYS = ("lunes", "martes", "miércoles", "jueves", "viernes", "sábado")


def normal(text: str) -> str:
    """Text as near-duplicates are compared: NFKC, casefold, letters and digits only."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return re.sub(r"\s+", " ", "".join(char if char.isalnum() else " " for char in folded)).strip()


def indel_ratio(left: str, right: str) -> float:
    """2 · longest common subsequence / total length: what `rapidfuzz.fuzz.ratio` / 100 gives."""
    row = [0] * (len(right) + 1)
    for char in left:
        previous = 0
        for at, other in enumerate(right, 1):
            kept = row[at]
            row[at] = previous + 1 if char == other else max(row[at], row[at - 1])
            previous = kept
    return 2 * row[-1] / (len(left) + len(right)) if left or right else 1.0


def bad_replies(rng: random.Random, made: list[Conversation], corrected: float, negative: float) -> None:
    """Replace a good reply with a wrong one in a share of the conversations; the good one stays as the correction."""
    targets = [one for one in made if len(one.turns) >= 4]
    picked = rng.sample(targets, round(len(made) * (corrected + negative)))
    for number, one in enumerate(picked):
        places = [at for at, turn in enumerate(one.turns) if turn.role == "assistant" and one.turns[at - 1].intent != "smalltalk"]
        if not places:
            continue
        at = rng.choice(places)
        good = one.turns[at].text
        one.bad[at] = _wrong(rng, good, one, made)
        one.turns[at] = Turn("assistant", one.bad[at])
        if number < len(made) * corrected:
            one.corrected[at] = good
        one.score = rng.choice((1, 1, 2, 2, 3, None))


def _wrong(rng: random.Random, good: str, one: Conversation, made: list[Conversation]) -> str:
    hours = re.findall(r"\b\d{1,2}:[0-5]\d\b", good)
    if hours and rng.random() < 0.6:
        other = f"{rng.choice([h for h in range(9, 22) if not hours[-1].startswith(str(h))])}:{rng.choice(('00', '30'))}"
        return good.replace(hours[-1], other)
    days = [day for day in WEEKDAYS if f"el {day}" in good]
    if days and rng.random() < 0.5:
        return good.replace(f"el {days[0]}", f"el {rng.choice([day for day in WEEKDAYS if day not in days])}")
    if rng.random() < 0.5:
        asked = one.turns[max(at for at in range(len(one.turns)) if one.turns[at].text == good) - 1].intent
        for other_one in rng.sample(made, 40):
            for at, turn in enumerate(other_one.turns):
                plain = (
                    turn.role == "assistant"
                    and not turn.pii
                    and not any(name.split()[0] in turn.text for name in other_one.names)
                )
                if (
                    plain
                    and other_one.tenant.vertical == one.tenant.vertical
                    and other_one.turns[at - 1].intent not in (asked, "smalltalk")
                ):
                    return turn.text
    return rng.choice(WRONG)


def copies(
    rng: random.Random, made: list[Conversation], exact: int, near: int
) -> tuple[list[tuple[Conversation, Conversation]], list[tuple[Conversation, Conversation]]]:
    """Copies of good conversations by other people of the same tenant: unchanged ones, and ones with small edits."""
    good = [one for one in made if not one.bad and len(one.turns) >= 4]
    rng.shuffle(good)
    same: list[tuple[Conversation, Conversation]] = []
    like: list[tuple[Conversation, Conversation]] = []
    for one in good:
        if len(same) < exact:
            same.append((one, _copy(rng, one, made, one.turns)))
        elif len(like) < near:
            turns = _edited(rng, one.turns)
            if turns:
                like.append((one, _copy(rng, one, made, turns)))
    return same, like


def _copy(rng: random.Random, one: Conversation, made: list[Conversation], turns: list[Turn]) -> Conversation:
    other = rng.choice([who for who in made if who.tenant is one.tenant and who.user_id != one.user_id])
    started = one.started_at + timedelta(hours=rng.randint(5, 200))
    started = min(started, datetime(2026, 10, 25, 21, tzinfo=UTC))
    score = rng.choice((None, 3, 4, 4, 5))
    return replace(
        one,
        user_id=other.user_id,
        channel=other.channel,
        started_at=started,
        turns=list(turns),
        score=score,
        times=clock(rng, started, turns),
        bad={},
        corrected={},
    )


def _edited(rng: random.Random, turns: list[Turn]) -> list[Turn] | None:
    """One or two small edits that keep every pair of user turn and reply at a ratio of 0.9 or more."""
    result, done = list(turns), 0
    places = [
        at
        for at, turn in enumerate(turns)
        if at + 1 < len(turns) and turn.role == "user" and turns[at + 1].role == "assistant" and not turn.pii
    ]
    rng.shuffle(places)
    for at in places:
        text = turns[at].text
        edited = _edit(rng, text)
        reply = turns[at + 1].text
        before, after = normal(f"{text} {reply}"), normal(f"{edited} {reply}")
        names_kept = all(value in edited for _, value in turns[at].pii)
        if edited != text and names_kept and indel_ratio(before, after) >= 0.92:
            result[at] = turns[at].saying(edited)
            done += 1
        if done == 2:
            break
    changed = any(normal(a.text) != normal(b.text) for a, b in zip(turns, result, strict=True))
    return result if changed else None


def _edit(rng: random.Random, text: str) -> str:
    kind = rng.randrange(4)
    if kind == 0:
        return text + rng.choice((" ya", " eh", " ok", " si"))
    if kind == 1:
        return text.replace(" ", "  ", 1) + " 🙂"
    return _drop_letter(rng, text) if kind == 2 else "y " + text[:1].lower() + text[1:]


def _drop_letter(rng: random.Random, text: str) -> str:
    words = [found for found in re.finditer(r"\b[a-záéíóú]{6,}\b", text) if found[0] not in ("nombre",)]
    if not words:
        return text
    word = rng.choice(words)
    cut = rng.randrange(word.start() + 1, word.end() - 1)
    return text[:cut] + text[cut + 1 :]


def feedback(
    rng: random.Random, made: list[Conversation], ids: dict[int, list[str]], positive: float
) -> tuple[list[Row], dict[str, list[str]]]:
    """Feedback rows: corrections and negatives on the planted replies, praise on good ones."""
    rows: list[Row] = []
    truth: dict[str, list[str]] = {"bad_replies": [], "corrected": [], "positive": [], "negative": []}
    for one in made:
        message_ids = ids[id(one)]
        for at in one.bad:
            truth["bad_replies"].append(message_ids[at])
            truth["corrected" if at in one.corrected else "negative"].append(message_ids[at])
            rows.append(_opinion(rng, one, message_ids, at, "negative"))
        fine = [at for at, turn in enumerate(one.turns) if turn.role == "assistant" and at not in one.bad]
        if rng.random() < positive and fine and (one.score or 4) >= 3:
            at = rng.choice(fine)
            truth["positive"].append(message_ids[at])
            rows.append(_opinion(rng, one, message_ids, at, "positive"))
    return rows, truth


def _opinion(rng: random.Random, one: Conversation, message_ids: list[str], at: int, kind: str) -> Row:
    hours = rng.randint(1, 72) if rng.random() < 0.6 else rng.randint(72, 24 * 24)
    ratings, comments = ((4, 5, 5, None), PRAISE) if kind == "positive" else ((1, 1, 2, None), CRITICISM)
    return {
        "tenant_id": one.tenant.tenant_id,
        "conversation_id": one.conversation_id,
        "message_id": message_ids[at],
        "feedback_type": kind,
        "rating": rng.choice(ratings),
        "expected_response": one.corrected.get(at),
        "comment": rng.choice(comments) if rng.random() < 0.3 else None,
        "created_at": one.times[at] + timedelta(hours=hours, minutes=rng.randrange(60)),
    }


def broken_rows(rng: random.Random, tables: dict[str, list[Row]], count: int = 8) -> list[Row]:
    """Add rows that break the schema's promises, and name each with its reason."""
    messages, marks = tables["messages"], []
    sound = list(messages)
    changes: dict[str, Row] = {
        "content is null": {"content": None},
        "content is empty": {"content": "   "},
        "role is unknown": {"role": "bot"},
        "conversation does not exist": {"conversation_id": "conv_missing"},
        "created_at is absurd": {"created_at": datetime(1970, 1, 1, tzinfo=UTC)},
        "content is broken text": {"content": "Hola, quer\x00\ufffda una \ufffd\ufffdcita"},
    }
    next_id = len(messages) + 1
    for reason, change in changes.items():
        for row in rng.sample(sound, count):
            message_id = f"msg_{next_id:06d}"
            messages.append({**row, "message_id": message_id, "created_at": row["created_at"] + timedelta(seconds=2), **change})
            marks.append({"table": "messages", "id": message_id, "reason": reason})
            next_id += 1
    for row in rng.sample(sound, count):
        messages.append({**row, "created_at": row["created_at"] + timedelta(minutes=rng.choice((0, 60)))})
        marks.append({"table": "messages", "id": row["message_id"], "reason": "message id is repeated"})
    for row in rng.sample([row for row in tables["conversations"] if row["satisfaction_score"] is not None], count):
        row["satisfaction_score"] = rng.choice((-1, 0, 7))
        marks.append({"table": "conversations", "id": row["conversation_id"], "reason": "satisfaction_score is out of 1..5"})
    _broken_feedback(rng, tables["feedback"], marks, count)
    return marks


def _broken_feedback(rng: random.Random, rows: list[Row], marks: list[Row], count: int) -> None:
    praise = [row for row in rows if row["feedback_type"] == "positive"]
    for reason, change in (
        ("message does not exist", {"message_id": "msg_missing"}),
        ("feedback_type is unknown", {"feedback_type": "meh"}),
    ):
        for row in rng.sample(praise, count):
            feedback_id = f"fb_{len(rows) + 1:06d}"
            rows.append({**row, "feedback_id": feedback_id, **change})
            marks.append({"table": "feedback", "id": feedback_id, "reason": reason})
