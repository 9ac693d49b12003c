"""Tells people that a rollout changed: one POST of {"text": …} (Slack, Mattermost, Teams bridges) with the facts beside it.

`FINETUNE_WEBHOOK` holds one or more URLs, comma-separated. A webhook that fails never stops a rollout: its error is returned,
without the URL, which is a secret.
"""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any

from dotenv import dotenv_values

from finetune_assets.environment import ROOT

SECONDS = 5.0


def webhooks() -> list[str]:
    """URLs of FINETUNE_WEBHOOK, from the process's environment or `.env`."""
    text = os.environ.get("FINETUNE_WEBHOOK") or dotenv_values(ROOT / ".env").get("FINETUNE_WEBHOOK") or ""
    return [url.strip() for url in text.split(",") if url.strip()]


def notify(text: str, facts: dict[str, Any], urls: Sequence[str] | None = None) -> list[str]:
    """Posts to every webhook; the problems, one sentence each."""
    problems: list[str] = []
    body = json.dumps({"text": text, "facts": facts}, ensure_ascii=False, default=str).encode()
    for number, url in enumerate(webhooks() if urls is None else urls, start=1):
        if not url.startswith(("http://", "https://")):
            problems.append(f"Webhook {number} of FINETUNE_WEBHOOK is no http(s) URL; nobody was told.")
            continue
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"}, method="POST")
        try:
            with urllib.request.urlopen(request, timeout=SECONDS) as answer:
                answer.read(1024)
        except (urllib.error.URLError, OSError, ValueError) as error:
            why = getattr(error, "code", None) or getattr(error, "reason", None) or type(error).__name__
            problems.append(f"Webhook {number} of FINETUNE_WEBHOOK did not take the message ({why}); check the URL.")
    return problems
