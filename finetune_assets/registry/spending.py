"""What was spent at providers: reserved before, settled after; a month's sum is what budgets are held against.

Months are calendar months in UTC by this machine's clock. A reference (a job's id, a piece of work) is counted once.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from finetune_assets.errors import BudgetExceeded, SettingsError
from finetune_assets.registry.ledger import Ledger
from finetune_assets.registry.tables import now, spending


@dataclass(frozen=True)
class Limits:
    """Most US dollars of a calendar month; null: no limit."""

    assistant: float | None = None
    """`budget.monthly_usd`."""
    project: float | None = None
    """FINETUNE_MONTHLY_USD."""


@dataclass(frozen=True)
class Purchase:
    """Something that is going to cost."""

    reference: str
    assistant: str
    provider: str
    kind: str
    """`training` or `replies`."""
    usd: float | None
    """Estimate; null where no price is known."""
    tokens: int | None = None
    mend: str = ""
    """What to do where a limit is set and no price is known."""


def reserve(ledger: Ledger, purchase: Purchase, limits: Limits) -> None:
    """Writes the estimate down if it fits into what is left of the month, and changes nothing where it is there already.

    Raises BudgetExceeded, which says by how much, and SettingsError where a limit is set and no price is known.
    """
    row = {**{key: value for key, value in vars(purchase).items() if key != "mend"}, "final": False, "created_at": now()}
    with ledger.engine.begin() as connection:
        if connection.dialect.name == "postgresql":
            connection.execute(sa.text("LOCK TABLE spending IN SHARE ROW EXCLUSIVE MODE"))
        known = spending.c.reference == purchase.reference
        # The write comes first: it takes the lock under which the sum is read.
        if connection.execute(sa.update(spending).where(known).values(reference=purchase.reference)).rowcount:
            return
        connection.execute(sa.insert(spending).values(row))
        month = connection.execute(_month(now())).mappings().all()
        check([dict(row) for row in month if row["reference"] != purchase.reference], purchase, limits)


def extend(ledger: Ledger, reference: str, usd: float, limits: Limits) -> bool:
    """Raises a reservation to `usd`, never lowers it, if that fits into what is left of its month; whether it does."""
    own = spending.c.reference == reference
    with ledger.engine.begin() as connection:
        if connection.dialect.name == "postgresql":
            connection.execute(sa.text("LOCK TABLE spending IN SHARE ROW EXCLUSIVE MODE"))
        connection.execute(sa.update(spending).where(own).values(reference=reference))  # takes the lock, as in `reserve`
        row = connection.execute(sa.select(spending).where(own)).mappings().one()
        others = [dict(one) for one in connection.execute(_month(row["created_at"])).mappings() if one["reference"] != reference]
        try:
            check(others, Purchase(reference, row["assistant"], row["provider"], row["kind"], usd), limits)
        except BudgetExceeded:
            return False
        connection.execute(sa.update(spending).where(own).values(usd=max(row["usd"] or 0.0, usd)))
    return True


def check(spent: list[Mapping[str, Any]] | list[dict[str, Any]], purchase: Purchase, limits: Limits) -> None:
    """Holds a purchase against the rows of this month. Raises as `reserve` does."""
    own = sum(row["usd"] or 0.0 for row in spent if row["assistant"] == purchase.assistant)
    everyone = sum(row["usd"] or 0.0 for row in spent)
    limited = (
        (limits.assistant, own, f"{purchase.assistant} has", "budget.monthly_usd"),
        (limits.project, everyone, "all assistants have", "FINETUNE_MONTHLY_USD"),
    )
    for limit, before, who, setting in limited:
        if limit is None:
            continue
        if purchase.usd is None:
            raise SettingsError(f"{setting} is {limit:g}, but nothing says what this costs. {purchase.mend}".rstrip())
        if before + purchase.usd > limit:
            raise BudgetExceeded(
                f"{purchase.assistant}: this would cost about ${purchase.usd:.2f}; {who} spent or reserved ${before:.2f} this "
                f"month, so it is ${before + purchase.usd - limit:.2f} above {setting} (${limit:.2f}). Raise it, or wait."
            )


def settle(ledger: Ledger, reference: str, usd: float | None, tokens: int | None = None) -> None:
    """Replaces the estimate by what it came to; null keeps the estimate as the last word."""
    values: dict[str, Any] = {
        "final": True,
        **({"usd": usd} if usd is not None else {}),
        **({"tokens": tokens} if tokens else {}),
    }
    with ledger.engine.begin() as connection:
        connection.execute(sa.update(spending).where(spending.c.reference == reference).values(values))


def release(ledger: Ledger, reference: str) -> None:
    """Gives a reservation back: nothing was bought."""
    with ledger.engine.begin() as connection:
        connection.execute(sa.delete(spending).where((spending.c.reference == reference) & ~spending.c.final))


def unsettled(ledger: Ledger, assistant: str, beginning: str) -> list[str]:
    """References of an assistant's reservations that begin so and were neither settled nor given back."""
    own = (spending.c.assistant == assistant) & ~spending.c.final & spending.c.reference.startswith(beginning, autoescape=True)
    with ledger.engine.connect() as connection:
        return list(connection.execute(sa.select(spending.c.reference).where(own)).scalars())


def spent(ledger: Ledger, reference: str) -> dict[str, Any] | None:
    """One row, or null."""
    with ledger.engine.connect() as connection:
        row = connection.execute(sa.select(spending).where(spending.c.reference == reference)).mappings().first()
    return dict(row) if row else None


def month(ledger: Ledger, moment: datetime.datetime | None = None) -> list[dict[str, Any]]:
    """All rows of the calendar month."""
    with ledger.engine.connect() as connection:
        return [dict(row) for row in connection.execute(_month(moment or now())).mappings()]


def between(ledger: Ledger, assistant: str, since: datetime.datetime, until: datetime.datetime) -> float | None:
    """Dollars of an assistant between two times (UTC, naive), unsettled estimates included; null: nothing was bought."""
    mine = (spending.c.assistant == assistant) & (spending.c.created_at >= since) & (spending.c.created_at < until)
    with ledger.engine.connect() as connection:
        return connection.execute(sa.select(sa.func.sum(spending.c.usd)).where(mine)).scalar()


def _month(moment: datetime.datetime) -> sa.Select[Any]:
    start = moment.replace(day=1, hour=0, minute=0, second=0, microsecond=0, tzinfo=None)
    end = (start + datetime.timedelta(days=32)).replace(day=1)
    return sa.select(spending).where((spending.c.created_at >= start) & (spending.c.created_at < end))
