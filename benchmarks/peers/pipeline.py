"""Raw export to JSONL with pandas, re and datasketch: `pipeline.py [--same-work] FOLDER OUT.json`. As their users write it.

The same steps as ours: bad rows, personal data, one example a reply with its context, feedback, filters, near-duplicates (word
MinHash, 128 permutations, Jaccard 0.9), splits by a hash of the user, train, validation and test as JSON lines. It does less:
no check digits, no names, no reasons, no lineage, no preferences, no proof that the splits share nothing.
`--same-work` scrubs with `FOLDER/patterns.json` (pattern, flags), one `re.sub` each, and with the phonenumbers library for the
regions of `FOLDER/regions.json` where a text holds seven digits.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pandas as pd
from datasketch import MinHash, MinHashLSH

PERSONAL = [
    (re.compile(r"[\w.+-]+@[\w-]+\.[\w.-]+"), "[EMAIL]"),
    (re.compile(r"https?://\S*(?:token|key|secret)=\S+"), "[URL]"),
    (re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){3,7}\b"), "[IBAN]"),
    (re.compile(r"\b(?:\d[ -]?){13,19}\b"), "[CREDIT_CARD]"),
    (re.compile(r"\b(?:\d{1,3}\.){3}\d{1,3}\b"), "[IP]"),
    (re.compile(r"\b\d{8}-?[A-Z]\b|\b\d{1,2}\.\d{3}\.\d{3}-[\dkK]\b"), "[NATIONAL_ID]"),
    (re.compile(r"\b(?:sk|pk|ghp|AKIA)[-_A-Za-z0-9]{16,}\b"), "[SECRET]"),
    (re.compile(r"(?:\+?\d{1,3}[ -]?)?(?:\(?\d{2,4}\)?[ -]?){2,4}\d{2,4}"), "[PHONE]"),
]
ERRORS = re.compile(r"\berror\b|no entiendo|no puedo ayudar|don't understand|can't help", re.IGNORECASE)


def scrub(text: str) -> str:
    """Typed placeholders."""
    for pattern, placeholder in PERSONAL:
        text = pattern.sub(placeholder, text)
    return text


def same_work(folder: Path) -> Callable[[str], str]:
    """A `scrub` with the patterns of the folder; a pattern's group `name` is what is replaced, else the whole of it."""
    import phonenumbers

    given = json.loads((folder / "patterns.json").read_text(encoding="utf-8"))
    patterns = [re.compile(pattern, flags) for pattern, flags in given]
    regions = json.loads((folder / "regions.json").read_text(encoding="utf-8"))

    def replaced(match: re.Match[str]) -> str:
        group = "name" if "name" in match.re.groupindex else 0
        start, end = match.start(group) - match.start(), match.end(group) - match.start()
        return match[0][:start] + "[X]" + match[0][end:]

    def scrub(text: str) -> str:
        if sum(map(str.isdigit, text)) >= 7:
            for region in regions:
                for found in phonenumbers.PhoneNumberMatcher(text, region):
                    text = text.replace(found.raw_string, "[PHONE]")
        for pattern in patterns:
            text = pattern.sub(replaced, text)
        return text

    return scrub


def load(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """The three tables without bad rows."""
    conversations, messages, feedback = (pd.read_parquet(folder / name) for name in ("conversations", "messages", "feedback"))
    conversations = conversations.dropna(subset=["conversation_id", "tenant_id", "started_at"]).drop_duplicates("conversation_id")
    messages = messages.dropna(subset=["message_id", "conversation_id", "content", "created_at"]).drop_duplicates("message_id")
    messages = messages[messages["role"].isin(["user", "assistant"]) & (messages["content"].str.strip() != "")]
    messages = messages[messages["conversation_id"].isin(conversations["conversation_id"])]
    feedback = feedback[feedback["message_id"].isin(messages["message_id"])].drop_duplicates("feedback_id")
    return conversations, messages, feedback


def examples(
    conversations: pd.DataFrame, messages: pd.DataFrame, feedback: pd.DataFrame, scrub: Callable[[str], str]
) -> pd.DataFrame:
    """One row a reply: context, user text, reply, satisfaction, verdict."""
    messages = messages.assign(content=messages["content"].apply(scrub)).sort_values(["conversation_id", "created_at"])
    newest = feedback.sort_values("created_at").drop_duplicates("message_id", keep="last").set_index("message_id")
    verdict, expected = newest["feedback_type"].to_dict(), newest["expected_response"].dropna().to_dict()
    rows = []
    for conversation_id, group in messages.groupby("conversation_id", sort=False):
        context: list[dict[str, str]] = []
        for message_id, role, content in zip(group["message_id"], group["role"], group["content"], strict=True):
            if role == "assistant" and context and context[-1]["role"] == "user":
                rows.append(
                    {
                        "conversation_id": conversation_id,
                        "context": list(context[-8:]),
                        "user_text": context[-1]["content"],
                        "reply": expected.get(message_id, content),
                        "corrected": message_id in expected,
                        "verdict": verdict.get(message_id),
                    }
                )
            if context and context[-1]["role"] == role:
                context[-1] = {"role": role, "content": context[-1]["content"] + "\n" + content}
            else:
                context.append({"role": role, "content": content})
    columns = ["conversation_id", "user_id", "satisfaction_score"]
    return pd.DataFrame(rows).merge(conversations[columns], on="conversation_id", how="left")


def keep(row: pd.Series) -> bool:
    """The default filters."""
    if row["corrected"]:
        return True
    if row["verdict"] == "negative" or (row["verdict"] != "positive" and not row["satisfaction_score"] >= 4):
        return False
    return 5 <= len(row["user_text"]) <= 500 and 10 <= len(row["reply"]) <= 1000 and not ERRORS.search(row["reply"])


def without_near_duplicates(frame: pd.DataFrame) -> pd.DataFrame:
    """The first of each group stays."""
    index, kept = MinHashLSH(threshold=0.9, num_perm=128), []
    for row, (user_text, reply) in enumerate(zip(frame["user_text"], frame["reply"], strict=True)):
        signature = MinHash(num_perm=128)
        words = re.sub(r"[^\w\s]", "", f"{user_text} {reply}".lower()).split()
        signature.update_batch([word.encode("utf8") for word in set(words)])
        if not index.query(signature):
            index.insert(row, signature)
            kept.append(row)
    return frame.iloc[kept]


def split(user: object) -> str:
    """80 / 10 / 10 by a hash."""
    place = int(hashlib.sha256(str(user).encode()).hexdigest(), 16) % 100
    return "train" if place < 80 else "validation" if place < 90 else "test"


def run(folder: Path, out: Path, scrub: Callable[[str], str]) -> int:
    """Everything; the number of rows."""
    frame = examples(*load(folder), scrub)
    frame = frame[frame.apply(keep, axis=1)].sort_values("corrected", ascending=False, kind="stable")
    frame = without_near_duplicates(frame.drop_duplicates(["user_text", "reply"]))
    frame = frame.assign(split=frame["user_id"].fillna(frame["conversation_id"]).apply(split))
    for name, part in frame.groupby("split"):
        with (out / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for context, reply in zip(part["context"], part["reply"], strict=True):
                messages = [{"role": "system", "content": "Eres amable."}, *context, {"role": "assistant", "content": reply}]
                file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    return len(frame)


if __name__ == "__main__":
    source, target = map(Path, sys.argv[-2:])
    start = time.process_time()
    with tempfile.TemporaryDirectory() as made:
        number = run(source, Path(made), same_work(source) if "--same-work" in sys.argv else scrub)
    told = {
        "cpu_seconds": time.process_time() - start,
        "rows": number,
        "version": f"{version('pandas')}, {version('datasketch')}",
    }
    target.write_text(json.dumps(told), encoding="utf-8")
