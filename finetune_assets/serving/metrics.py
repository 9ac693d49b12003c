"""What Prometheus reads. Labels are assistants, arms and outcomes, which are few; tenants are in the ledger, where SQL asks."""

from __future__ import annotations

import os

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from finetune_assets.registry import Rollout
from finetune_assets.serving.exchange import Exchange

CONTENT_TYPE = CONTENT_TYPE_LATEST
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Metrics:
    """Counters of one worker; with PROMETHEUS_MULTIPROC_DIR all workers' numbers come out of any of them."""

    def __init__(self) -> None:
        self.shared = "PROMETHEUS_MULTIPROC_DIR" in os.environ
        self.registry = CollectorRegistry()
        here = self.registry
        self.requests = Counter(
            "finetune_requests",
            "Chats by arm and outcome of the assigned arm.",
            ["assistant", "arm", "kind", "outcome"],
            registry=here,
        )
        self.fallbacks = Counter("finetune_fallbacks", "Chats that the champion took over.", ["assistant"], registry=here)
        self.seconds = Histogram(
            "finetune_reply_seconds", "Seconds of a reply.", ["assistant", "arm", "kind"], buckets=SECONDS, registry=here
        )
        self.first_token = Histogram(
            "finetune_first_token_seconds", "Seconds to the first token.", ["assistant", "arm"], buckets=SECONDS, registry=here
        )
        self.tokens = Counter("finetune_completion_tokens", "Tokens of replies.", ["assistant", "arm", "kind"], registry=here)
        self.usd = Counter(
            "finetune_usd",
            "Cost: a provider's tokens, else the machine's hourly rate.",
            ["assistant", "arm", "kind"],
            registry=here,
        )
        self.feedback = Counter("finetune_feedback", "Feedback by type.", ["assistant", "type"], registry=here)
        self.refused = Counter("finetune_refused", "Requests that got no chat, by status.", ["status"], registry=here)
        self.upstream_failures = Counter(
            "finetune_upstream_failures", "Calls of an upstream that failed.", ["assistant", "arm", "outcome"], registry=here
        )
        self.shadows_left_out = Counter("finetune_shadows_left_out", "Shadow chats over their limit.", registry=here)
        self.lost_rows = Counter("finetune_lost_rows", "Rows that the disk did not take.", registry=here)

    def observe(self, exchange: Exchange, kind: str = "live") -> None:
        """Counts an ended chat."""
        name, arm = exchange.ask.assistant.name, exchange.assigned.name
        self.requests.labels(name, arm, kind, exchange.outcome).inc()
        if exchange.status == 200:
            self.fallbacks.labels(name).inc(exchange.served.name != arm)
            self.seconds.labels(name, arm, kind).observe(exchange.seconds)
        if exchange.first_token is not None:
            self.first_token.labels(name, arm).observe(exchange.first_token)
        self.tokens.labels(name, arm, kind).inc(exchange.reply.usage.get("completion_tokens") or 0)
        if exchange.usd:
            self.usd.labels(name, arm, kind).inc(exchange.usd)

    def text(self, rollouts: list[Rollout], ledger_seconds: float, backlog: int) -> bytes:
        """The exposition; rollouts, and how the worker that answers stands with the ledger, come as gauges."""
        registry = self.registry
        if self.shared:
            registry = CollectorRegistry()
            MultiProcessCollector(registry)
        lines = [
            "# HELP finetune_rollout_share Share of the users that get the candidate.",
            "# TYPE finetune_rollout_share gauge",
            *(f'finetune_rollout_share{{assistant="{state.assistant}"}} {state.share}' for state in rollouts),
            "# HELP finetune_rollout_open 1 while a candidate is rolled out.",
            "# TYPE finetune_rollout_open gauge",
            *(f'finetune_rollout_open{{assistant="{state.assistant}"}} {int(state.is_open)}' for state in rollouts),
            "# HELP finetune_rollout_waits 1 while a rollout waits for a person.",
            "# TYPE finetune_rollout_waits gauge",
            *(
                f'finetune_rollout_waits{{assistant="{state.assistant}"}} {int(state.status in ("held", "awaiting_approval"))}'
                for state in rollouts
            ),
            "# HELP finetune_rollout_generation Changes of the rollout so far.",
            "# TYPE finetune_rollout_generation gauge",
            *(f'finetune_rollout_generation{{assistant="{state.assistant}"}} {state.generation}' for state in rollouts),
            "# HELP finetune_ledger_age_seconds Seconds since the worker that answers last reached the ledger.",
            "# TYPE finetune_ledger_age_seconds gauge",
            f"finetune_ledger_age_seconds {ledger_seconds:.3f}",
            "# HELP finetune_journal_backlog Segments that wait to be written to the ledger.",
            "# TYPE finetune_journal_backlog gauge",
            f"finetune_journal_backlog {backlog}",
        ]
        return generate_latest(registry) + ("\n".join(lines) + "\n").encode()
