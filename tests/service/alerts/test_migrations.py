import asyncio
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, inspect, text

from service.alerts import AlertLog, AlertLogUnavailable, DatabaseUnsuitable
from service.alerts.database import build_engine, migration_config, upgrade_schema
from service.alerts.table import metadata


def _differences(connection: Connection) -> list[Any]:
    return list(compare_metadata(MigrationContext.configure(connection, opts={"compare_type": True}), metadata))


async def test_migrating_an_empty_database_twice_makes_the_tables_the_code_expects(database_url: str) -> None:
    for _ in range(2):
        log = await AlertLog.open(database_url)
        await log.close()
    engine = build_engine(database_url)
    async with engine.connect() as connection:
        assert await connection.run_sync(_differences) == []
        tables = await connection.run_sync(lambda sync: set(inspect(sync).get_table_names()))
        assert tables == {"alerts", "alert_seq", "alembic_version"}
        assert (await connection.execute(text("SELECT last FROM alert_seq"))).scalars().all() == [0]
    await engine.dispose()


async def test_a_difference_between_code_and_migrations_would_be_seen(database_url: str) -> None:
    await asyncio.to_thread(upgrade_schema, database_url)
    engine = build_engine(database_url)
    async with engine.begin() as connection:
        await connection.execute(text("DROP INDEX ix_alerts_client"))
        await connection.execute(text("ALTER TABLE alerts ADD COLUMN extra TEXT"))
        found = await connection.run_sync(_differences)
    await engine.dispose()
    assert sorted(difference[0] for difference in found) == ["add_index", "remove_column"]


def test_several_services_may_open_one_empty_database_at_once(database_url: str) -> None:
    opening = "import asyncio, sys; from service.alerts import AlertLog; asyncio.run(AlertLog.open(sys.argv[1]))"
    services = [
        subprocess.Popen([sys.executable, "-c", opening, database_url], stderr=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    assert [(service.communicate()[1], service.returncode) for service in services] == [("", 0)] * 4


async def test_the_first_migration_can_be_taken_back(database_url: str) -> None:
    await asyncio.to_thread(upgrade_schema, database_url)
    await asyncio.to_thread(command.downgrade, migration_config(database_url), "base")
    engine = build_engine(database_url)
    async with engine.connect() as connection:
        assert await connection.run_sync(lambda sync: inspect(sync).get_table_names()) == ["alembic_version"]
    await engine.dispose()


def test_a_new_migration_is_written_from_the_template(database_url: str, tmp_path: Path) -> None:
    upgrade_schema(database_url)
    config = migration_config(database_url)
    shipped = Path(config.get_main_option("script_location") or "") / "versions"
    config.set_main_option("path_separator", "os")
    config.set_main_option("version_locations", f"{shipped}:{tmp_path}")
    command.revision(config, message="nothing to do", autogenerate=True, version_path=str(tmp_path), rev_id="0002")
    (script,) = tmp_path.glob("0002*.py")
    written = script.read_text()
    compile(written, "0002", "exec")
    assert "down_revision = '0001'" in written
    assert "op.add_column" not in written


async def test_a_database_newer_than_the_code_is_refused(sqlite_file: Path) -> None:
    url = f"sqlite+aiosqlite:///{sqlite_file}"
    await asyncio.to_thread(upgrade_schema, url)
    with sqlite3.connect(sqlite_file) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.close()
    with pytest.raises(AlertLogUnavailable, match="9999"):
        await AlertLog.open(url)


def test_a_file_that_is_no_database_is_refused(sqlite_file: Path) -> None:
    sqlite_file.parent.mkdir(parents=True)
    sqlite_file.write_bytes(b"this is not a database" * 100)
    with pytest.raises(AlertLogUnavailable, match=r"could not be opened: file is not a database\."):
        asyncio.run(AlertLog.open(f"sqlite+aiosqlite:///{sqlite_file}"))


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("sqlite+aiosqlite://", "memory"),
        ("sqlite+aiosqlite:///:memory:", "memory"),
        ("sqlite:///alerts.db", "async driver"),
        ("postgresql://somebody:secret@db/alerts", "async driver"),
        ("postgresql+asynkpg://somebody:secret@db/alerts", "known kind"),
        ("mysql+aiomysql://somebody:secret@db/alerts", "package aiomysql is not installed"),
        ("alerts.db secret", "cannot be read"),
    ],
)
async def test_a_url_that_cannot_hold_the_log_is_refused_without_telling_its_password(url: str, reason: str) -> None:
    with pytest.raises(DatabaseUnsuitable, match=reason) as refusal:
        await AlertLog.open(url)
    assert "secret" not in str(refusal.value)


def test_a_migration_that_fails_half_way_leaves_the_database_as_it_was(sqlite_file: Path) -> None:
    sqlite_file.parent.mkdir(parents=True)
    with sqlite3.connect(sqlite_file) as connection:
        connection.execute("CREATE TABLE alert_seq (in_the_way INTEGER)")
    with pytest.raises(Exception, match="alert_seq already exists"):
        upgrade_schema(f"sqlite+aiosqlite:///{sqlite_file}")
    tables = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
    connection.close()
    assert tables == [("alert_seq",)]
