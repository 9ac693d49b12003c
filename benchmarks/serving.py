"""The router beside litellm's on the same upstream, and the engine beside one `generate` at a time.

Router: real processes on loopback; the router's worker and its journal's writer share one core, upstream and load (wrk) the
other. The questions are those of the sample, so a fifth of them hold personal data to be scrubbed; every chat is logged. litellm
runs in the interpreter that BENCH_LITELLM names (a virtual environment with `pip install 'litellm[proxy]'`); else its figures are
missing. Seconds are wall seconds where a row says so: run it on a machine that does nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT, SAMPLE, Row

SECONDS = 4
SAYS = re.compile(rb'"content": ?"[^"]')
"""A streamed event with text: the first names the role alone."""
LUA = """
local asks, n = {}, 0
for line in io.lines(os.getenv("ASKS")) do asks[#asks + 1] = line end
request = function()
  n = n + 1
  return wrk.format("POST", nil, {["Content-Type"] = "application/json"}, asks[n % #asks + 1])
end
"""
LITELLM = """
model_list:
  - model_name: aurora
    litellm_params: {model: openai/m, api_base: "http://127.0.0.1:%d/v1", api_key: none}
litellm_settings: {telemetry: false}
"""


def rows(rounds: int) -> list[Row]:
    """Latency, throughput, streaming, weight changes, memory; then the engine."""
    found = [_needs("wrk")] if shutil.which("wrk") is None else _router(rounds)
    return [*found, *_engine()]


def _needs(what: str) -> Row:
    return Row("router", 0.0, "litellm proxy", note=f"{what} is not installed")


# --- the router


@dataclass
class Load:
    """What wrk measured: median seconds of a chat, chats a second, chats that failed."""

    p50: float
    rate: float
    failed: int


def _wrk(url: str, folder: Path, connections: int, seconds: int = SECONDS) -> Load:
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--latency", "-s", str(folder / "ask.lua"), url]
    environment = {**os.environ, "ASKS": str(folder / "asks.jsonl")}
    said = subprocess.run(_on(1, command), env=environment, check=True, capture_output=True, text=True).stdout
    value, unit = re.search(r"50%\s+([\d.]+)(us|ms|s)", said).groups()  # type: ignore[union-attr]
    failed = sum(int(n) for n in re.findall(r"Non-2xx or 3xx responses: (\d+)|timeout (\d+)", said) for n in n if n)
    rate = float(re.search(r"Requests/sec:\s+([\d.]+)", said)[1])  # type: ignore[index]
    return Load(float(value) * {"us": 1e-6, "ms": 1e-3, "s": 1.0}[unit], rate, failed)


def _on(core: int, command: list[str]) -> list[str]:
    """The command on one core, where there are two."""
    return ["taskset", "-c", str(core), *command] if (os.cpu_count() or 1) > 1 and shutil.which("taskset") else command


def _router(rounds: int) -> list[Row]:
    with tempfile.TemporaryDirectory() as name, _upstream() as port:
        folder = Path(name)
        _asks(folder)
        direct = f"http://127.0.0.1:{port}/v1/chat/completions"
        plain = [_wrk(direct, folder, 1).p50 for _ in range(rounds)]
        with _served(folder / "live", port, "champion") as (url, _):
            ours = [_wrk(url, folder, 1) for _ in range(rounds)]
            busy = _wrk(url, folder, 16)
            tokens = [statistics.median(_first_tokens(where) for _ in range(rounds)) for where in (direct, url)]
        with _served(folder / "shadow", port, "shadow") as (url, shop):
            before, start = _kept(shop), time.monotonic()
            shadowed = _wrk(url, folder, 16)
            kept = {kind: count - before[kind] for kind, count in _kept(shop).items()}
            sustained = kept["live"] / (time.monotonic() - start)
        peer = _litellm(folder, port, rounds)
        moves = [_weight_change(folder / f"move{n}", port) for n in range(rounds)]
        with _postgres() as database:
            moves_there = [] if database is None else [_weight_change(folder / "postgres", port, database)]
        memory = _memory(folder / "tenants", port)
    base = statistics.median(plain)
    added = statistics.median(load.p50 for load in ours) - base
    theirs = None if peer is None else statistics.median(load.p50 for load in peer[0]) - base
    first = tokens[1] - tokens[0]
    missing = "" if peer else "litellm is not there (BENCH_LITELLM); "
    return [
        Row(
            "router: seconds added to a chat, p50, one at a time (wall)",
            added,
            "litellm proxy",
            theirs,
            bar="≤ 0.5 ms",
            met=added <= 0.0005,
            note=f"{missing}{1e3 * added:.2f} ms over {1e3 * base:.3f} directly; {busy.rate:,.0f} chats/s with 16 at a time, "
            + (f"litellm {peer[1].rate:,.0f}" if peer else "logged"),
        ),
        Row(
            "router: seconds a chat, every one shadowed and logged, 16 at a time",
            1 / sustained,
            "litellm proxy, nothing shadowed or logged",
            1 / peer[1].rate if peer else None,
            bar="≥ 1,000 chats/s",
            met=sustained >= 1000 and shadowed.failed == 0 and kept["live"] == kept["shadow"],
            note=f"{sustained:,.0f} chats/s until all rows are in the ledger, on one core, writer included "
            f"({shadowed.rate:,.0f} answered); {kept['live']:,} live and {kept['shadow']:,} shadow replies",
        ),
        Row(
            "router: seconds added to the first token, p50 (wall)",
            first,
            bar="≤ 1 ms",
            met=first <= 0.001,
            note=f"{1e3 * first:.2f} ms over {1e3 * tokens[0]:.3f} directly",
        ),
        _moved("SQLite", moves),
        _moved("Postgres", moves_there),
        memory,
    ]


def _moved(where: str, moves: list[tuple[float, int]]) -> Row:
    slow, failed = max((seconds for seconds, _ in moves), default=0.0), sum(failed for _, failed in moves)
    return Row(
        f"router: seconds until a rollback is in effect in two workers under load, {where}",
        slow,
        bar="< 1 s, no chat failed",
        met=slow < 1 and failed == 0 if moves else None,
        note=f"{failed} failed; the slowest of {len(moves)}" if moves else "pgserver is not installed",
    )


@contextmanager
def _postgres() -> Generator[str | None]:
    """Address of a Postgres of its own; null where pgserver is not installed."""
    try:
        import pgserver
    except ModuleNotFoundError:
        yield None
        return
    folder = Path(tempfile.mkdtemp())
    server = pgserver.get_server(folder, cleanup_mode="stop")  # pyright: ignore[reportPrivateImportUsage]
    try:
        yield server.get_uri().replace("postgresql://", "postgresql+psycopg2://", 1)
    finally:
        server.cleanup()
        shutil.rmtree(folder, ignore_errors=True)


def _asks(folder: Path) -> None:
    import polars as pl

    said = pl.read_parquet(SAMPLE / "messages.parquet").filter(pl.col("role") == "user")["content"].drop_nulls()
    texts = [text for text in said if text.strip()][:2000]
    lines = [
        json.dumps({"model": "aurora", "user": f"u{n}", "messages": [{"role": "user", "content": text}]}, ensure_ascii=False)
        for n, text in enumerate(texts)
    ]
    (folder / "asks.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "ask.lua").write_text(LUA)


@contextmanager
def _upstream() -> Generator[int]:
    command = _on(1, [sys.executable, "-m", "benchmarks.upstream", "0"])
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield int(process.stdout.readline())
        finally:
            process.kill()


@contextmanager
def _served(
    folder: Path, port: int, step: str, *options: str, tenants: int = 1, database: str | None = None
) -> Generator[tuple[str, Any]]:
    """`finetune serve` with one version or two, workers and writer on the first core; its chat address and the store.

    Of several tenants each has a third version too, in an experiment with its first 200 users.
    """
    from finetune_assets.serving import experiments
    from finetune_assets_tests.serving.shop import Shop

    shop = Shop(folder, upstream=f"http://127.0.0.1:{port}/v1", database=database)
    settings = shop.assistants / "aurora.yaml"
    text = settings.read_text().replace("serving: {", "serving: {requests_per_minute: 1000000000, ")
    settings.write_text(text)
    for n in range(1, tenants):
        (shop.assistants / f"clinic{n}.yaml").write_text(text.replace("clinica_aurora", f"clinic{n}"))
    for assistant in ["aurora", *(f"clinic{n}" for n in range(1, tenants))]:
        for letter, to in {"champion": [("a", "done")], "shadow": [("a", "shadow")]}.get(step, [("a", "done"), ("b", step)]):
            shop.roll_out(shop.version(letter, assistant=assistant), to, assistant)
        if tenants > 1:
            third, people = shop.version("c", assistant=assistant), [f"u{n}" for n in range(200)]
            with shop.ledger() as book:
                champion = book.rollout(assistant).champion or "base"
                experiments.begin(
                    book, assistant, (champion, third), 0.5, {"tenants": [], "users": people}, ("benchmark", "bench")
                )
    with shop.served("--no-judge", *options) as served:
        for pid in [*served.children("worker"), *served.children("writer")]:
            if shutil.which("taskset") and (os.cpu_count() or 1) > 1:
                subprocess.run(["taskset", "-acp", "0", str(pid)], check=True, stdout=subprocess.DEVNULL)
        shop.running = served  # type: ignore[attr-defined]
        url = f"{served.url}/v1/chat/completions"
        _wrk(url, folder.parent, 1, 1)
        yield url, shop


def _kept(shop: Any) -> dict[str, int]:
    """Rows of the ledger by kind, once the journal is empty: each worker's own segment is all that is left."""
    journal = shop.home / "serving" / "journal"
    while any(path.stat().st_size for path in journal.glob("*.jsonl") if path.exists()):
        time.sleep(0.01)
    with shop.ledger() as book, book.engine.connect() as connection:
        return dict(connection.exec_driver_sql("SELECT kind, count(*) FROM requests GROUP BY kind").all())


def _first_tokens(url: str) -> float:
    """Median seconds to the first piece of text of a streamed chat, one at a time on one connection, asked on the second core."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {1} & cores or cores)
    try:
        return asyncio.run(_streams(url))
    finally:
        os.sched_setaffinity(0, cores)


async def _streams(url: str, count: int = 300) -> float:
    host, port = re.search(r"//([\d.]+):(\d+)", url).groups()  # type: ignore[union-attr]
    path = "/" + url.split("/", 3)[3]
    body = json.dumps(
        {"model": "aurora", "user": "u", "stream": True, "messages": [{"role": "user", "content": "Hola"}]}
    ).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    taken: list[float] = []
    reader, writer = await asyncio.open_connection(host, int(port))
    for _ in range(count):
        start = time.perf_counter()
        writer.write(head.encode() + body)
        while not SAYS.search(line := await reader.readline()):
            assert line, "the stream ended"
        taken.append(time.perf_counter() - start)
        while b"[DONE]" not in await reader.readline():
            pass
        while await reader.readline() != b"0\r\n":
            pass
        await reader.readline()
    writer.close()
    return statistics.median(taken)


def _litellm(folder: Path, port: int, rounds: int) -> tuple[list[Load], Load] | None:
    """litellm's proxy with one model: one chat at a time, and sixteen."""
    python = os.environ.get("BENCH_LITELLM")
    if not python:
        return None
    (folder / "litellm.yaml").write_text(LITELLM % port)
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as one:
        own = one.getsockname()[1]
    tool = str(Path(python).with_name("litellm"))
    command = [python, tool, "--config", str(folder / "litellm.yaml"), "--port", str(own), "--host", "127.0.0.1"]
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= {"LITELLM_LOG": "ERROR", "LITELLM_LOCAL_MODEL_COST_MAP": "True", "NO_PROXY": "127.0.0.1"}
    environment["LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY"] = "true"  # without keys, as our router on loopback
    process = subprocess.Popen(_on(0, command), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{own}/health/liveliness", timeout=2).read()
                break
            except OSError:
                if time.monotonic() > end or process.poll() is not None:
                    return None
                time.sleep(0.3)
        url = f"http://127.0.0.1:{own}/v1/chat/completions"
        _wrk(url, folder, 1, 1)
        return [_wrk(url, folder, 1) for _ in range(rounds)], _wrk(url, folder, 16)
    finally:
        process.terminate()
        process.wait()


def _weight_change(folder: Path, port: int, database: str | None = None) -> tuple[float, int]:
    """Seconds from the rollback's call to the start of the last chat that the candidate answered, over both workers; failures."""
    import httpx

    from finetune_assets.serving import control

    answers: list[tuple[float, int, str]] = []
    with _served(folder, port, "50", "--workers", "2", database=database) as (url, shop):
        ended = threading.Event()

        def ask(number: int) -> None:
            with httpx.Client(trust_env=False, timeout=10) as client:
                n = 0
                while not ended.is_set():
                    n += 1
                    start = time.monotonic()
                    body = {"model": "aurora", "user": f"w{number}-{n}", "messages": [{"role": "user", "content": "Hola"}]}
                    answer = client.post(url, json=body)
                    answers.append((start, answer.status_code, answer.headers.get("x-model-version", "")))

        threads = [threading.Thread(target=ask, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(1.0)
        start = time.monotonic()
        with shop.ledger() as book:
            control.rollback(book, "aurora", "benchmark", "benchmark")
        time.sleep(1.5)
        ended.set()
        for thread in threads:
            thread.join()
    late = [at - start for at, status, model in answers if status == 200 and "v2-" in model]
    assert late, "the candidate answered nobody"
    return max(0.0, *late), sum(status != 200 for _, status, _ in answers)


def _memory(folder: Path, port: int, tenants: int = 50, chats: int = 96_000) -> Row:
    """An hour of 50 tenants at 32 chats a minute each, as fast as it goes: memory of two workers and the writer together. Each
    tenant has three arms: champion, candidate at 50 %, and a version in an experiment."""
    import datetime

    async def drive(url: str, first: int, count: int) -> None:
        import aiohttp

        begin = datetime.datetime(2026, 11, 2, 9, tzinfo=datetime.UTC)
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=8)) as session:

            async def ask(n: int) -> None:
                name = "aurora" if n % tenants == 0 else f"clinic{n % tenants}"
                at = begin + datetime.timedelta(seconds=3600 * n / chats)
                body = {"model": name, "user": f"u{n % 997}", "messages": [{"role": "user", "content": f"Hola {n}"}]}
                async with session.post(url, json=body, headers={"x-simulated-time": at.isoformat()}) as answer:
                    assert answer.status == 200, await answer.text()

            for start in range(first, first + count, 8):
                await asyncio.gather(*(ask(n) for n in range(start, min(start + 8, first + count))))

    with _served(folder, port, "50", "--simulation", "--workers", "2", tenants=tenants) as (url, shop):
        processes = [*shop.running.children("worker"), *shop.running.children("writer")]
        resident: list[int] = []
        for part in range(4):
            asyncio.run(drive(url, part * chats // 4, chats // 4))
            resident.append(sum(map(_resident, processes)))
        _kept(shop)
        with shop.ledger() as book, book.engine.connect() as connection:
            arms = connection.exec_driver_sql("SELECT count(*) FROM (SELECT DISTINCT assistant, version FROM requests)").scalar()
    growth = resident[3] / resident[1] - 1
    return Row(
        f"router: an hour of {tenants} tenants, three arms each, memory of two workers and the writer",
        0.0,
        peak_mb=resident[3],
        bar="flat: ≤ 5 % more in the second half",
        met=growth <= 0.05,
        note=f"{', '.join(map(str, resident))} MB after each quarter of {chats:,} chats; {arms} versions answered",
    )


def _resident(pid: int) -> int:
    """MB of a process."""
    return int(Path(f"/proc/{pid}/status").read_text().split("VmRSS:")[1].split()[0]) // 1024


# --- the engine


def _engine() -> list[Row]:
    """CPU seconds of a thousand tokens, one thread: 1, 8 and 32 chats at a time, then 8 with an adapter each."""
    import torch

    from finetune_assets.serving.batching import NO_ADAPTER, Chat, Lane
    from finetune_assets.worker.generate import Generator
    from finetune_assets.worker.models import encode_prompt

    torch.set_num_threads(1)
    base = str(ROOT / "data" / "base_model")
    lane, generator = Lane(base), Generator(base, 64)
    questions = [json.loads(line)["messages"] for line in _questions()]
    prompts = [encode_prompt(lane.tokenizer, chat, 1024)[0] for chat in questions]

    def batched(most: int, adapters: list[str]) -> float:
        todo, made, going = list(enumerate(prompts)), [0], [0]

        def deliver(token: int | None, reason: str | None) -> None:
            going[0] -= token is None
            made[0] += token is not None or reason == "stop"

        start = time.process_time()
        while todo or lane.busy:
            while todo and going[0] < most:
                n, prompt = todo.pop()
                lane.add(Chat(prompt, 64, deliver, adapter=adapters[n % len(adapters)]))
                going[0] += 1
            lane.step()
        return 1000 * (time.process_time() - start) / made[0]

    def one_at_a_time(model: Any, adapters: list[str]) -> float:
        start, made = time.process_time(), 0
        for n, prompt in enumerate(prompts[:32]):
            if adapters:
                model.set_adapter(adapters[n % len(adapters)])
            ids = torch.tensor([prompt])
            settings = {"max_new_tokens": 64, "do_sample": False, "eos_token_id": sorted(lane.ends), "pad_token_id": 0}
            with torch.inference_mode():
                made += model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings).shape[1] - len(prompt)
        return 1000 * (time.process_time() - start) / made

    batched(8, [NO_ADAPTER])
    peer = one_at_a_time(generator.model, [])
    found = [
        _tokens(f"engine: 1,000 tokens, {most} at a time, 3M model", batched(most, [NO_ADAPTER]), peer) for most in (1, 8, 32)
    ]
    with tempfile.TemporaryDirectory() as folder:
        names, peft = _adapters(Path(folder), lane, base)
        peer = one_at_a_time(peft, names)
        found.append(_tokens("engine: 1,000 tokens, 8 at a time, 8 LoRA adapters", batched(8, names), peer))
    return [*found, *(_prefix(lane, words) for words in (12, 300))]


def _prefix(lane: Any, words: int) -> Row:
    """CPU seconds to the first token of a chat behind a system prompt, remembered and computed anew."""
    from finetune_assets.serving.batching import Chat
    from finetune_assets.worker.models import encode_prompt

    said = "Eres el asistente de una clínica dental en Madrid y respondes breve. " * 30
    system = {"role": "system", "content": " ".join(said.split()[:words])}
    chats = [[system, json.loads(line)["messages"][1]] for line in _questions()]
    prompts = [encode_prompt(lane.tokenizer, chat, 1000)[0] for chat in chats]
    shared = lane.shared(prompts[0], chats[0])

    def first_tokens(remembered: int) -> float:
        start = time.process_time()
        for prompt in prompts:
            lane.add(Chat(prompt, 1, lambda _token, _reason: None, shared=remembered))
            lane.step()
        return (time.process_time() - start) / len(prompts)

    first_tokens(shared)
    ours, peer = first_tokens(shared), first_tokens(0)
    note = f"{1e3 * ours:.1f} and {1e3 * peer:.1f} ms; {shared} of {statistics.median(map(len, prompts)):.0f} tokens are shared"
    return Row(f"engine: a first token behind a system prompt of {words} words", ours, "computed for every chat", peer, note=note)


def _tokens(what: str, ours: float, peer: float) -> Row:
    bar = "≥ 3×" if "8 at" in what else ""
    note = f"{1000 / ours:,.0f} and {1000 / peer:,.0f} tokens a CPU second; one thread"
    return Row(what, ours, "model.generate, one at a time", peer, bar=bar, met=peer >= 3 * ours if bar else None, note=note)


def _questions() -> list[str]:
    import polars as pl

    said = pl.read_parquet(SAMPLE / "messages.parquet").filter(pl.col("role") == "user")["content"].drop_nulls()
    system = {"role": "system", "content": "Eres el asistente de una clínica dental. Responde en español, breve y amable."}
    return [json.dumps({"messages": [system, {"role": "user", "content": text}]}) for text in said if text.strip()][:96]


def _adapters(folder: Path, lane: Any, base: str) -> tuple[list[str], Any]:
    """Eight adapters on the lane, and on a PEFT model."""
    import warnings

    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    warnings.simplefilter("ignore")
    config = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype="float32"), config, adapter_name="a0")
    names = [f"a{n}" for n in range(8)]
    for name in names[1:]:
        model.add_adapter(name, config)
    model.save_pretrained(str(folder))
    for name in names:
        lane.add_adapter(name, folder / name)
    return names, model.eval()
