"""Run by Alembic, never imported: connects to the database and runs the migrations in one transaction."""

import asyncio
from typing import Any

from alembic import context
from sqlalchemy import Connection, event, text

from service.alerts.database import build_engine
from service.alerts.table import metadata

# Any number, the same for every replica: only one of them migrates at a time.
_POSTGRESQL_LOCK = 7_021_764_552


def _migrate(connection: Connection) -> None:
    context.configure(
        connection=connection,
        target_metadata=metadata,
        render_as_batch=connection.dialect.name == "sqlite",
        transactional_ddl=True,
    )
    with context.begin_transaction():
        if connection.dialect.name == "postgresql":
            connection.execute(text(f"SELECT pg_advisory_xact_lock({_POSTGRESQL_LOCK})"))
        context.run_migrations()


def _leave_transactions_to_us(connection: Any, _record: Any) -> None:
    connection.isolation_level = None


def _begin_immediately(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")


async def _run() -> None:
    attributes = context.config.attributes
    database_url = attributes.get("database_url") or context.get_x_argument(as_dictionary=True)["database_url"]
    engine = build_engine(database_url)
    if engine.dialect.name == "sqlite":
        # Python's driver would run DDL outside any transaction, and let two services migrate the same file at once.
        event.listen(engine.sync_engine, "connect", _leave_transactions_to_us)
        event.listen(engine.sync_engine, "begin", _begin_immediately)
    try:
        async with engine.connect() as connection:
            await connection.run_sync(_migrate)
    finally:
        await engine.dispose()


asyncio.run(_run())
