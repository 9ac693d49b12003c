"""What a training costs. The local machine has an hourly rate, from the assistant's `budget.usd_per_hour`."""

from __future__ import annotations


def machine_usd(seconds: float, usd_per_hour: float | None) -> float | None:
    """US dollars of `seconds` on a machine; None where it has no rate."""
    return None if usd_per_hour is None else seconds / 3600 * usd_per_hour
