"""A business of the sample: its region, hours, address and contacts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tenant:
    """Facts of one business; `rate` turns the euro prices of the tables into its currency."""

    tenant_id: str
    place: str
    vertical: str
    country: str
    voseo: bool
    street: str
    near: str
    opens: int
    closes: int
    closed: frozenset[int]
    hours: str
    closed_days: str
    rate: float
    staff: tuple[str, ...]
    phone: str
    email: str


def money(value: float, country: str) -> str:
    """A price as it is written in that country."""
    step = {"ES": 1 if value < 40 else 5, "BO": 5, "MX": 10, "AR": 500}[country]
    if country == "ES" and value < 40 and value != int(value):
        return f"{value:.2f} €".replace(".", ",")
    amount = f"{max(step, round(value / step) * step):,}".replace(",", ".")
    return {"ES": f"{amount} €", "BO": f"{amount} Bs", "MX": f"$ {amount}", "AR": f"$ {amount}"}[country]
