"""Requests that are paid for one by one: sent again only where it is certain that nobody has answered, and billed, the first.

Clients of such requests repeat nothing by themselves (`max_retries=0`): three tries of a request that times out are three bills
for one reply. Certain is a request that was turned away (429, or 503 with `Retry-After`), and one that found no connection. After
a time-out, a connection that broke or any other 5xx the reply may have been made: it counts as paid, and is missing.
"""

from __future__ import annotations

import time

TRIES = 4
LONGEST_WAIT = 30.0
"""Seconds between two tries."""
UNREACHED = ("ConnectError", "EndpointConnectionError")
"""What httpx and botocore raise where nobody took the connection."""


def turned_away(status: int | None, retry_after: str | None, cause: BaseException | None = None) -> bool:
    """Whether a request was certainly not answered. `status`: of HTTP, null where there was none, because of `cause`."""
    if status is None:
        return type(cause).__name__ in UNREACHED
    return status == 429 or (status == 503 and retry_after is not None)


def seconds(retry_after: str | None) -> float | None:
    """`Retry-After` where it is a number."""
    said = retry_after or ""
    return float(said) if said.isascii() and said.replace(".", "", 1).isdigit() else None


def wait(attempt: int, asked: float | None) -> None:
    """After try number `attempt`, from 0: what the server `asked` for, else 0.5, 1, 2 s; nothing after the last of TRIES."""
    if attempt + 1 < TRIES:
        time.sleep(min(0.5 * 2**attempt if asked is None else asked, LONGEST_WAIT))
