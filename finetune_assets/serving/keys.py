"""API keys: made once, shown once, stored as a hash, revoked by it."""

from __future__ import annotations

import secrets
from typing import Any

import sqlalchemy as sa

from finetune_assets.errors import ServingError
from finetune_assets.registry import Ledger
from finetune_assets.registry.tables import now
from finetune_assets.registry.traffic import api_keys
from finetune_assets.serving.directory import hash_key


def add(ledger: Ledger, tenant: str, name: str = "") -> str:
    """A new key of a tenant."""
    key = f"ft-{secrets.token_urlsafe(32)}"
    row = {"key_hash": hash_key(key), "tenant_id": tenant, "name": name or tenant, "created_at": now()}
    with ledger.engine.begin() as connection:
        connection.execute(sa.insert(api_keys).values(row))
    return key


def listed(ledger: Ledger) -> list[dict[str, Any]]:
    """All keys, oldest first; the keys themselves are nowhere."""
    with ledger.engine.connect() as connection:
        return [dict(row) for row in connection.execute(sa.select(api_keys).order_by(api_keys.c.created_at)).mappings()]


def revoke(ledger: Ledger, beginning: str) -> str:
    """Takes back the one key whose hash begins so; its hash. Raises ServingError for none or several."""
    found = [row["key_hash"] for row in listed(ledger) if row["key_hash"].startswith(beginning) and row["revoked_at"] is None]
    if len(found) != 1 or len(beginning) < 6:
        raise ServingError(
            f"{beginning!r} names {len(found)} valid keys; give at least six letters of one: `finetune keys list`."
        )
    with ledger.engine.begin() as connection:
        connection.execute(sa.update(api_keys).where(api_keys.c.key_hash == found[0]).values(revoked_at=now()))
    return found[0]
