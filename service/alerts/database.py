"""The alert log's database: how to reach it, and how to bring its tables up to date."""

from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from sqlalchemy import event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from service.alerts.errors import DatabaseUnsuitable

# Waiting for another connection's lock is SQLite's own business up to here; after that the statement fails.
_SQLITE_BUSY_MILLISECONDS = 5000


def build_engine(database_url: str) -> AsyncEngine:
    """Build the engine for a database; nothing is connected yet.

    In SQLite every connection writes ahead (readers and the writer do not stop each other), waits for locks and
    checks foreign keys.
    """
    engine = create_async_engine(database_url, pool_pre_ping=True)
    if engine.dialect.name == "sqlite":
        event.listen(engine.sync_engine, "connect", _set_pragmas)
    return engine


def _set_pragmas(connection: Any, _record: Any) -> None:
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout = {_SQLITE_BUSY_MILLISECONDS}")
    cursor.execute("PRAGMA journal_mode = WAL")
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.close()


def check_database_url(database_url: str) -> URL:
    """Return the parsed URL of a lasting database with an async driver that is installed. Raises DatabaseUnsuitable."""
    try:
        url = make_url(database_url)
    except ArgumentError:
        # Not shown: there may be a password anywhere in it.
        raise DatabaseUnsuitable("the database given", "its URL cannot be read") from None
    try:
        dialect = url.get_dialect()
        if not dialect.is_async:
            reason = "an async driver is needed, such as sqlite+aiosqlite or postgresql+asyncpg"
            raise DatabaseUnsuitable(str(url), reason)
        dialect.import_dbapi()
    except NoSuchModuleError:
        raise DatabaseUnsuitable(str(url), f"{url.drivername} is not a known kind of database") from None
    except ImportError as error:
        raise DatabaseUnsuitable(str(url), f"the Python package {error.name} is not installed") from None
    if url.get_backend_name() == "sqlite" and url.database in (None, "", ":memory:"):
        raise DatabaseUnsuitable(str(url), "a database in memory would lose every alert with the service")
    return url


def upgrade_schema(database_url: str) -> None:
    """Bring the tables to the latest migration; a no-op where they are. Blocks: call it in a thread.

    Creates the folder of an SQLite file. Raises DatabaseUnsuitable, and what Alembic, SQLAlchemy and the driver raise.
    """
    url = check_database_url(database_url)
    if url.get_backend_name() == "sqlite" and url.database is not None:
        Path(url.database).parent.mkdir(parents=True, exist_ok=True)
    command.upgrade(migration_config(database_url), "head")


def migration_config(database_url: str) -> Config:
    """Return Alembic's configuration for a database, with the migrations that come with this package."""
    config = Config()
    # "%" starts an interpolation in Alembic's options.
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    config.attributes["database_url"] = database_url
    return config
