"""Databases of our own: how one is opened, and how its tables are brought up to date.

SQLite in WAL mode by default, anything that SQLAlchemy knows by URL; PostgreSQL is tested.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import ArgumentError, NoSuchModuleError
from sqlalchemy.pool import ConnectionPoolEntry, NullPool, QueuePool

from slmops.errors import ArtifactError, UsageError

BUSY_TIMEOUT_MS = 30_000


def sqlite_engine(
    path: Path, *, busy_timeout_ms: int = BUSY_TIMEOUT_MS, kept_open: bool = False, **pragmas: str
) -> sa.Engine:
    """An engine for the file at ``path``. ``kept_open``: connections live on, for a file that is written all the time;
    ``pragmas``: further settings of every connection."""
    pool = QueuePool if kept_open else NullPool
    engine = sa.create_engine(sa.URL.create("sqlite", database=str(path)), poolclass=pool)
    _configure(engine, {"busy_timeout": str(busy_timeout_ms), **pragmas})
    return engine


def engine_at(url: str, **pragmas: str) -> sa.Engine:
    """An engine for the database at ``url``; ``pragmas`` count where it is SQLite.

    Raises:
        UsageError: not a database URL, or its driver is not installed.
    """
    try:
        parsed = sa.make_url(url)
        engine = sa.create_engine(parsed, pool_pre_ping=True)
    except (ArgumentError, NoSuchModuleError) as error:
        raise UsageError(
            f"The database URL cannot be used: {error}.", remedy="For example: postgresql+psycopg://host/db"
        ) from None
    except ModuleNotFoundError as error:
        shown = parsed.render_as_string(hide_password=True)
        raise UsageError(
            f"The driver for {shown} is not installed: {error}.", remedy=f"Install it: pip install {error.name}"
        ) from None
    if engine.dialect.name == "sqlite":
        _configure(engine, {"busy_timeout": str(BUSY_TIMEOUT_MS), **pragmas})
    return engine


def place_of(engine: sa.Engine) -> str:
    """The database's address without its password."""
    return engine.url.render_as_string(hide_password=True)


def migrate(engine: sa.Engine, folder: Path, head: str, *, what: str) -> None:
    """Bring the tables up to date by alembic's migrations in ``folder``, of which ``head`` is the newest.

    ``head`` is told, so that opening a database that is up to date need not load alembic. ``what``: for errors.

    Raises:
        ArtifactError: a newer slmops wrote it.
    """
    with engine.begin() as connection:
        revision = None
        if sa.inspect(connection).has_table("alembic_version"):
            revision = connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar()
        if revision == head:
            return
        if revision is not None and revision > head:
            raise ArtifactError(
                f"{what} {place_of(engine)} has version {revision}; this slmops knows {head}.",
                remedy="Update slmops, or choose another --store.",
            )
        _upgrade(connection, folder)


def _upgrade(connection: sa.Connection, folder: Path) -> None:
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(folder).replace("%", "%%"))
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


def _configure(engine: sa.Engine, pragmas: Mapping[str, str]) -> None:
    def configure(connection: Any, _: ConnectionPoolEntry) -> None:
        # The timeout comes first: switching to WAL takes a lock itself.
        settings = {**pragmas, "journal_mode": "WAL", "synchronous": "NORMAL", "foreign_keys": "ON"}
        for name, value in settings.items():
            connection.execute(f"PRAGMA {name}={value}").close()

    event.listen(engine, "connect", configure)
