"""Brings the workers' journal to the ledger: `python -m finetune_assets.serving.writer`, one process. Started by `server`.

A closed segment is one transaction; rows that are there already are left alone, which makes every step repeatable. A row that
the ledger refuses for what it says goes to `journal/refused/`, so that it does not hold up the others; whatever else the ledger
says (it is locked, restarts, takes no writes, gives no rights) is no row's fault, and is tried again.
"""

from __future__ import annotations

import datetime
import json
import logging
import os
import signal
import threading
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import CompileError, DataError, IntegrityError, ProgrammingError, SQLAlchemyError

from finetune_assets.environment import Environment
from finetune_assets.registry import Ledger
from finetune_assets.registry.traffic import ROUTER_TABLES
from finetune_assets.serving.journal import Row, closed
from finetune_assets.worker.__main__ import die_with_parent

log = logging.getLogger(__name__)
INTERVAL = 0.05
"""Seconds between two looks at the journal."""
AGAIN = 1.0
"""Seconds until a ledger that could not be written is tried again."""
WRONG = (CompileError, DataError, IntegrityError, ProgrammingError, ValueError, TypeError, KeyError)
"""What is raised for what a row says."""
TIMES = {"created_at", "started_at", "ended_at"}


def transfer(folder: Path, engine: sa.Engine) -> None:
    """Writes every closed segment of a journal. Raises SQLAlchemyError, OSError; what was not written stays where it is."""
    for path, rows in closed(folder):
        try:
            store(engine, rows)
        except WRONG as error:
            if not _is_a_rows_fault(error):
                raise
            _one_by_one(engine, rows, folder / "refused" / path.name)


def store(engine: sa.Engine, rows: list[Row]) -> None:
    """Writes rows in one transaction; what is there already stays."""
    by_table: dict[str, list[dict[str, Any]]] = {}
    for table, values in rows:
        by_table.setdefault(table, []).append({k: _time(k, v, table) for k, v in values.items()})
    insert = postgresql.insert if engine.dialect.name == "postgresql" else sqlite.insert
    with engine.begin() as connection:
        for name, table in ROUTER_TABLES.items():
            values = by_table.get(name)
            if values:
                connection.execute(insert(table).on_conflict_do_nothing(), values)


def _one_by_one(engine: sa.Engine, rows: list[Row], aside: Path) -> None:
    for row in rows:
        try:
            store(engine, [row])
        except WRONG as error:
            if not _is_a_rows_fault(error):
                raise
            aside.parent.mkdir(mode=0o700, exist_ok=True)
            with open(aside, "a", encoding="utf-8", opener=_for_us_alone) as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            log.error("The ledger refuses a row of %s (%s); it is in %s.", row[0], type(error).__name__, aside)


def _is_a_rows_fault(error: Exception) -> bool:
    """Not what Postgres says of rights and tables (SQLSTATE 42…, but 42804: a value of another type), which is of every row."""
    said = str(getattr(getattr(error, "orig", None), "pgcode", None) or "")
    return not said.startswith("42") or said == "42804"


def _for_us_alone(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _time(name: str, value: Any, table: str) -> Any:
    if name not in TIMES or value is None:
        return value
    time_ = datetime.datetime.fromisoformat(value)
    return time_.astimezone(datetime.UTC).replace(tzinfo=None) if table in ("requests", "shadow_replies") else time_


def _line(error: BaseException) -> str:
    """The first line of what an error says: a driver's others hold the statement."""
    return (str(error).strip().splitlines() or [""])[0][:200]


def main() -> None:
    """Writes until SIGTERM, then what is left."""
    die_with_parent()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda _signal, _frame: ended.set())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the supervisor says when to end
    os.nice(5)  # chats first
    environment = Environment.read()
    folder = environment.home / "serving" / "journal"
    folder.mkdir(parents=True, exist_ok=True)
    ledger = Ledger(environment.database_url)
    while True:
        last = ended.wait(INTERVAL)
        try:
            transfer(folder, ledger.engine)
        except (SQLAlchemyError, OSError) as error:
            cause = getattr(error, "orig", None) or error
            log.warning("The ledger cannot be written (%s: %s); rows wait in %s.", type(cause).__name__, _line(cause), folder)
            if not last:
                ended.wait(AGAIN)
        if last:
            break
    ledger.close()


if __name__ == "__main__":
    main()
