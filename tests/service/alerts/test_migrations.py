import asyncio
import sqlite3
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, bindparam, inspect, make_url, text

from service.alerts import AlertFilter, AlertLog, AlertLogUnavailable, DatabaseUnsuitable, new_alert_id
from service.alerts.database import build_engine, migration_config, upgrade_schema
from service.alerts.table import UtcDateTime, metadata


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


async def test_every_migration_can_be_taken_back(database_url: str) -> None:
    await asyncio.to_thread(upgrade_schema, database_url)
    await asyncio.to_thread(command.downgrade, migration_config(database_url), "base")
    engine = build_engine(database_url)
    async with engine.connect() as connection:
        assert await connection.run_sync(lambda sync: inspect(sync).get_table_names()) == ["alembic_version"]
    await engine.dispose()


_OLD_ROW = """
INSERT INTO alerts (seq, id, created, model, version, request_id, "index", client, class_index, label,
    undefended_class_index, score, threshold, mode, media_type, sha256, image_kept, status)
VALUES (:seq, :id, :created, 'digits', 1, 'r', 0, '10.0.0.7', 3, 'three', NULL, 0.75, 0.5, 'flag', 'image/png',
    :sha256, true, 'new')
"""


async def _write_rows_of_the_first_release(database_url: str, count: int) -> list[str]:
    """Fill a database at the first revision, as that release did; return the alerts' ids in order."""
    await asyncio.to_thread(_upgrade_to, database_url, "0001")
    ids = [new_alert_id() for _ in range(count)]
    engine = build_engine(database_url)
    created = bindparam("created", type_=UtcDateTime)
    async with engine.begin() as connection:
        for seq, alert_id in enumerate(ids, 1):
            row = {"seq": seq, "id": alert_id, "created": datetime.now(UTC), "sha256": "0" * 64}
            await connection.execute(text(_OLD_ROW).bindparams(created), row)
        await connection.execute(text("UPDATE alert_seq SET last = :last"), {"last": count})
    await engine.dispose()
    return ids


def _upgrade_to(database_url: str, revision: str) -> None:
    path = make_url(database_url).database
    if database_url.startswith("sqlite") and path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    command.upgrade(migration_config(database_url), revision)


async def test_alerts_of_the_first_release_are_kept_and_have_no_p_value(database_url: str, make_alert: Any) -> None:
    ids = await _write_rows_of_the_first_release(database_url, 50)
    log = await AlertLog.open(database_url)
    old = (await log.page(AlertFilter(), None, 100)).alerts
    assert [alert.id for alert in old] == ids[::-1]
    assert {(alert.p_value, alert.score, alert.threshold, alert.image_kept) for alert in old} == {
        (None, 0.75, 0.5, True)
    }
    new = make_alert(p_value=0.002)
    await log.add([new])
    assert await log.get(new.id) == new.model_copy(update={"seq": 51})
    assert [alert.id for alert in (await log.page(AlertFilter(maximum_p_value=0.5), None, 100)).alerts] == [new.id]
    await log.close()
    engine = build_engine(database_url)
    async with engine.connect() as connection:
        assert await connection.run_sync(_differences) == []
    await engine.dispose()


async def test_going_back_to_the_first_release_loses_p_values_and_nothing_else(
    database_url: str, make_alert: Any
) -> None:
    ids = await _write_rows_of_the_first_release(database_url, 5)
    log = await AlertLog.open(database_url)
    new = make_alert()
    await log.add([new])
    await log.close()
    await asyncio.to_thread(command.downgrade, migration_config(database_url), "0001")
    engine = build_engine(database_url)
    async with engine.connect() as connection:
        columns = await connection.run_sync(
            lambda sync: {column["name"] for column in inspect(sync).get_columns("alerts")}
        )
        indexes = await connection.run_sync(
            lambda sync: {index["name"] for index in inspect(sync).get_indexes("alerts")}
        )
        kept = (await connection.execute(text("SELECT id FROM alerts ORDER BY seq"))).scalars().all()
    await engine.dispose()
    assert "p_value" not in columns
    assert {"score", "threshold", "status"} <= columns
    assert {f"ix_alerts_{name}" for name in ("created", "request_id", "model", "label", "client", "status")} <= indexes
    assert kept == [*ids, new.id]
    log = await AlertLog.open(database_url)
    assert (await log.get(new.id)) == new.model_copy(update={"seq": 6, "p_value": None})
    await log.close()


def test_a_new_migration_is_written_from_the_template(database_url: str, tmp_path: Path) -> None:
    upgrade_schema(database_url)
    config = migration_config(database_url)
    shipped = Path(config.get_main_option("script_location") or "") / "versions"
    config.set_main_option("path_separator", "os")
    config.set_main_option("version_locations", f"{shipped}:{tmp_path}")
    command.revision(config, message="nothing to do", autogenerate=True, version_path=str(tmp_path), rev_id="0003")
    (script,) = tmp_path.glob("0003*.py")
    written = script.read_text()
    compile(written, "0003", "exec")
    assert "down_revision = '0002'" in written
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
