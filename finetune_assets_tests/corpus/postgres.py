"""A real Postgres for tests: started once a process, without root or network; databases filled from folders of exports."""

from __future__ import annotations

import shutil
import tempfile
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from finetune_assets.corpus.schema import SOURCE, TABLES

TYPES = {"text": "text", "time": "timestamptz", "score": "int", "flag": "boolean"}
NAMES = {"feedback": "ai_rlhf_feedback"}
PASSWORD = "s3cret-hunter2"


@dataclass(frozen=True)
class Server:
    """One Postgres; its databases are made and dropped by the tests."""

    host: str

    def url(self, database: str, user: str = "reader") -> str:
        """Of the read-only role, or of the owner `postgres`."""
        login = f"{user}:{PASSWORD}" if user == "reader" else f"{user}:"
        return f"postgresql://{login}@/{database}?host={self.host}"

    def execute(self, database: str, *statements: str) -> list[Any]:
        """Runs statements as the owner; the rows of the last."""
        import psycopg2

        connection = psycopg2.connect(self.url(database, "postgres"))
        connection.autocommit = True
        try:
            with connection.cursor() as cursor:
                for statement in statements:
                    cursor.execute(statement)
                return cursor.fetchall() if cursor.description else []
        finally:
            connection.close()

    def fill(self, database: str, folder: Path) -> str:
        """A new database with the tables of a folder of exports; the URL of a role that may only SELECT.

        Postgres holds no NUL: the undecodable character takes its place, which is as broken.
        """
        from adbc_driver_postgresql import dbapi

        self.execute("postgres", f'DROP DATABASE IF EXISTS "{database}" WITH (FORCE)', f'CREATE DATABASE "{database}"')
        for table in TABLES:
            name = NAMES.get(table, table)
            frame = pl.concat(
                [pl.read_parquet(file) for file in sorted([*folder.glob(f"{table}.parquet"), *folder.glob(f"{table}/*")])]
            )
            frame = frame.with_columns(pl.col(pl.String).str.replace_all("\x00", "\ufffd", literal=True))
            kinds = {column: SOURCE[table][column].kind if column in SOURCE[table] else "text" for column in frame.columns}
            columns = [f'"{column}" {TYPES[kind]}' for column, kind in kinds.items()]
            self.execute(database, f"CREATE TABLE {name} ({', '.join(columns)})")
            scores = [column for column, kind in kinds.items() if kind == "score"]
            with dbapi.connect(self.url(database, "postgres")) as connection:
                with connection.cursor() as cursor:
                    cursor.adbc_ingest(name, frame.cast(dict.fromkeys(scores, pl.Int32)).to_arrow(), mode="append")
                connection.commit()
        self.execute(
            database,
            "DO $$ BEGIN IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'reader') THEN "
            f"CREATE ROLE reader LOGIN PASSWORD '{PASSWORD}'; END IF; END $$",
            "REVOKE CREATE ON SCHEMA public FROM PUBLIC",
            "GRANT SELECT ON ALL TABLES IN SCHEMA public TO reader",
        )
        return self.url(database)


@contextmanager
def server() -> Generator[Server]:
    """Starts Postgres in a temporary folder with a short path (a socket's name is limited), and stops it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import pgserver

        folder = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))
        started = pgserver.get_server(folder)
        try:
            made = Server(str(folder))
            made.execute("postgres", "ALTER SYSTEM SET fsync = off", "SELECT pg_reload_conf()")
            yield made
        finally:
            started.cleanup()
            shutil.rmtree(folder, ignore_errors=True)
