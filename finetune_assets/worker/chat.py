"""Task `chat`: a model that answers line by line, for `finetune chat`.

Standard input: one JSON object a line, {"messages": [{"role", "content"}, …], "tools"?: […]}; standard output: {"reply": "…",
"seconds": …} for each, calls of tools in the corpus' text, or {"error": "…"} for a line that is none. The first line out is
{"ready": true}. It ends with its input.

    spec: {"task": "chat", "output": dir, "model": folder or id, "max_new_tokens": 96, "threads": 2}
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any, TextIO

import torch

from finetune_assets.evaluation.called import as_said
from finetune_assets.worker.generate import Generator
from finetune_assets.worker.models import encode_prompt
from finetune_assets.worker.progress import Progress


def run(spec: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Answers until standard input ends; the number of replies."""
    if spec.get("threads"):
        torch.set_num_threads(int(spec["threads"]))
    generator = Generator(spec["model"], int(spec.get("max_new_tokens", 96)))
    return {"replies": answer(generator, sys.stdin, sys.stdout)}


def answer(generator: Generator, lines: TextIO, out: TextIO) -> int:
    """One JSON line out for each line in."""
    _say(out, {"ready": True})
    count = 0
    for line in lines:
        if not line.strip():
            continue
        start = time.perf_counter()
        try:
            asked = json.loads(line)
            messages, tools = [_message(message) for message in asked["messages"]], asked.get("tools")
            ids, dropped = encode_prompt(generator.tokenizer, messages, generator.prompt_length, tools)
            reply = generator.replies([ids])[0]
        except (ValueError, KeyError, TypeError, IndexError) as error:
            _say(out, {"error": f'expected {{"messages": [{{"role", "content"}}, …]}} on one line: {error!r}'})
            continue
        count += 1
        text = as_said(reply.text) if tools else reply.text
        _say(out, {"reply": text, "seconds": round(time.perf_counter() - start, 4), "dropped_turns": dropped})
    return count


def _message(message: dict[str, Any]) -> dict[str, Any]:
    """Role and text; what it calls, or answers. Raises KeyError where it says nothing at all."""
    kept = {key: message[key] for key in ("tool_calls", "tool_call_id", "name") if message.get(key)}
    content = message.get("content") if "tool_calls" in kept else message["content"]
    return {"role": str(message["role"]), "content": str(content or ""), **kept}


def _say(out: TextIO, value: dict[str, Any]) -> None:
    out.write(json.dumps(value, ensure_ascii=False) + "\n")
    out.flush()
