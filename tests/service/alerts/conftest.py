"""Alerts to write, and databases to write them to: SQLite files, and PostgreSQL where a server is named."""

import asyncio
import hashlib
import os
import uuid
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event, make_url, text
from sqlalchemy.ext.asyncio import create_async_engine

from service.alerts import Alert, AlertLog, PendingAlert, new_alert_id
from service.alerts.database import build_engine, upgrade_schema

POSTGRESQL = "PORTCULLIS_TEST_POSTGRESQL"
"""Names a server to test on as well, postgresql+asyncpg://user@host:port/postgres; the user may create databases."""

MakeAlert = Callable[..., Alert]
MakePending = Callable[..., PendingAlert]


@pytest.fixture
def make_alert() -> MakeAlert:
    def make(**changes: Any) -> Alert:
        facts: dict[str, Any] = {
            "id": new_alert_id(),
            "created": datetime.now(UTC),
            "model": "digits",
            "version": 2,
            "request_id": "req-1",
            "index": 0,
            "client": "10.0.0.7",
            "class_index": 3,
            "label": "three",
            "undefended_class_index": 8,
            "score": 0.75,
            "threshold": 0.5,
            "p_value": 0.01,
            "mode": "flag",
            "sha256": hashlib.sha256(b"").hexdigest(),
            "media_type": "image/png",
        }
        return Alert(**(facts | changes))

    return make


@pytest.fixture
def make_pending(make_alert: MakeAlert) -> MakePending:
    def make(image: bytes = b"\x89PNG\r\n\x1a\n" + bytes(100), **changes: Any) -> PendingAlert:
        return PendingAlert(make_alert(sha256=hashlib.sha256(image).hexdigest(), **changes), image)

    return make


@pytest.fixture
def sqlite_file(tmp_path: Path) -> Path:
    return tmp_path / "not" / "there yet" / "alerts.db"


@pytest.fixture(params=["sqlite", "postgresql"] if POSTGRESQL in os.environ else ["sqlite"])
async def database_url(request: pytest.FixtureRequest, sqlite_file: Path) -> AsyncIterator[str]:
    if request.param == "sqlite":
        yield f"sqlite+aiosqlite:///{sqlite_file}"
        return
    server = make_url(os.environ[POSTGRESQL])
    name = f"alerts_{uuid.uuid4().hex}"
    engine = create_async_engine(server, isolation_level="AUTOCOMMIT")
    async with engine.connect() as connection:
        await connection.execute(text(f"CREATE DATABASE {name}"))
    yield server.set(database=name).render_as_string(hide_password=False)
    async with engine.connect() as connection:
        await connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
    await engine.dispose()


@pytest.fixture
async def log(database_url: str) -> AsyncIterator[AlertLog]:
    log = await AlertLog.open(database_url)
    yield log
    await log.close()


@pytest.fixture
async def impatient_log(sqlite_file: Path) -> AsyncIterator[AlertLog]:
    """A log on SQLite that gives up on a locked database after 0.05 s instead of 5."""
    url = f"sqlite+aiosqlite:///{sqlite_file}"
    await asyncio.to_thread(upgrade_schema, url)
    engine = build_engine(url)

    @event.listens_for(engine.sync_engine, "connect")
    def give_up_soon(connection: Any, _record: Any) -> None:
        connection.cursor().execute("PRAGMA busy_timeout = 50")

    log = AlertLog(engine)
    yield log
    await log.close()
