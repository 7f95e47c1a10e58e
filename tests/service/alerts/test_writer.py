import asyncio
import sqlite3
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from service.alerts import (
    Alert,
    AlertFilter,
    AlertLog,
    AlertLogUnavailable,
    AlertQueueFull,
    AlertsNotWritten,
    AlertWriter,
    AlertWriterStopped,
    ImageNotKept,
    PendingAlert,
    Vault,
    new_alert_id,
)
from service.alerts.database import build_engine

MakePending = Callable[..., PendingAlert]
IMAGE = b"\x89PNG\r\n\x1a\n" + bytes(92)


@pytest.fixture
def vault(tmp_path: Path) -> Vault:
    return Vault(tmp_path / "inputs", 10_000_000, timedelta(days=30))


@asynccontextmanager
async def _running(log: AlertLog, vault: Vault, capacity: int, **options: Any) -> AsyncIterator[AlertWriter]:
    writer = AlertWriter(log, vault, capacity, **options)
    await writer.start()
    try:
        yield writer
    except BaseException:
        with suppress(AlertsNotWritten):
            await writer.stop(timeout=0)
        raise
    await writer.stop()


@asynccontextmanager
async def _table_away(database_url: str) -> AsyncIterator[Callable[[], Awaitable[None]]]:
    """Break the database: the table is gone, until what this gives is called."""
    engine = build_engine(database_url)

    async def rename(old: str, new: str) -> None:
        async with engine.begin() as connection:
            await connection.execute(text(f"ALTER TABLE {old} RENAME TO {new}"))

    await rename("alerts", "alerts_away")
    try:
        yield lambda: rename("alerts_away", "alerts")
    finally:
        await engine.dispose()


@contextmanager
def _write_lock(file: Path) -> Iterator[Callable[[], None]]:
    """Lock the database against every other writer, until what this gives is called."""
    connection = sqlite3.connect(file, isolation_level=None, timeout=30)
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield lambda: connection.execute("ROLLBACK").close()
    finally:
        connection.close()


async def _written(log: AlertLog) -> list[Alert]:
    """Every alert, the first written first."""
    return list((await log.page(AlertFilter(), None, 100_000)).alerts)[::-1]


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def test_stopping_writes_every_accepted_alert_in_order_with_its_input(
    log: AlertLog, vault: Vault, make_pending: MakePending
) -> None:
    alerts = [make_pending(image=IMAGE + bytes([number]), index=number) for number in range(150)]
    written: list[int] = []
    async with _running(log, vault, 1000, batch_size=40, on_written=written.append) as writer:
        await writer.submit(alerts[:100], timeout=1)
        await writer.submit(alerts[100:], timeout=1)
        assert writer.depth == 150
    assert writer.depth == 0
    assert written == [40, 40, 40, 30]
    found = await _written(log)
    expected = [
        pending.alert.model_copy(update={"image_kept": True, "seq": seq}) for seq, pending in enumerate(alerts, 1)
    ]
    assert found == expected
    for pending in alerts:
        alert = pending.alert
        assert vault.path(alert.id, alert.created, alert.media_type).read_bytes() == pending.image


async def test_alerts_are_written_without_waiting_for_the_stop(
    log: AlertLog, vault: Vault, make_pending: MakePending
) -> None:
    async with _running(log, vault, 10) as writer:
        for _ in range(3):
            await writer.submit([make_pending()], timeout=1)
            await _until(lambda: writer.depth == 0)
        assert len(await _written(log)) == 3


async def test_a_full_queue_refuses_after_the_timeout_and_goes_on_once_the_database_answers(
    log: AlertLog, database_url: str, vault: Vault, make_pending: MakePending
) -> None:
    async with _running(log, vault, 10) as writer:
        async with _table_away(database_url) as bring_back:
            await writer.submit([make_pending(request_id="first") for _ in range(8)], timeout=1)
            began = time.monotonic()
            with pytest.raises(AlertQueueFull) as refusal:
                await writer.submit([make_pending(request_id="refused") for _ in range(3)], timeout=0.2)
            assert 0.15 < time.monotonic() - began < 2
            assert (refusal.value.count, refusal.value.depth, refusal.value.capacity) == (3, 8, 10)
            await writer.submit([make_pending(request_id="fits") for _ in range(2)], timeout=0)
            with pytest.raises(AlertQueueFull):
                await writer.submit([make_pending(request_id="refused")], timeout=0)
            await bring_back()
        await writer.submit([make_pending(request_id="later") for _ in range(10)], timeout=10)
    assert [alert.request_id for alert in await _written(log)] == ["first"] * 8 + ["fits"] * 2 + ["later"] * 10


async def test_the_queue_is_bounded_in_bytes_too(
    log: AlertLog, database_url: str, vault: Vault, make_pending: MakePending
) -> None:
    async with _running(log, vault, 1000, capacity_bytes=1000) as writer:
        for _ in range(2):
            async with _table_away(database_url) as bring_back:
                await writer.submit([make_pending(image=bytes(600))], timeout=0)
                with pytest.raises(AlertQueueFull):
                    await writer.submit([make_pending(image=bytes(401))], timeout=0.05)
                await writer.submit([make_pending(image=bytes(400))], timeout=0)
                await bring_back()
            await _until(lambda: writer.depth == 0)
    assert len(await _written(log)) == 4


async def test_more_alerts_than_the_queue_holds_are_accepted_once_it_is_empty(
    log: AlertLog, database_url: str, vault: Vault, make_pending: MakePending
) -> None:
    async with _running(log, vault, 4, capacity_bytes=1000) as writer:
        await writer.submit([make_pending() for _ in range(9)], timeout=0)
        await writer.submit([make_pending(image=bytes(5000))], timeout=10)
        await _until(lambda: writer.depth == 0)
        async with _table_away(database_url) as bring_back:
            await writer.submit([make_pending()], timeout=10)
            with pytest.raises(AlertQueueFull):
                await writer.submit([make_pending() for _ in range(9)], timeout=0.05)
            await bring_back()
    assert len(await _written(log)) == 11


async def test_those_who_wait_are_served_in_turn_and_all_or_none(
    log: AlertLog, database_url: str, vault: Vault, make_pending: MakePending
) -> None:
    async with _running(log, vault, 10) as writer:
        async with _table_away(database_url) as bring_back:
            await writer.submit([make_pending(request_id="0") for _ in range(9)], timeout=1)
            large = [make_pending(request_id="1") for _ in range(10)]
            waiting = [
                asyncio.create_task(writer.submit(alerts, 10)) for alerts in (large, [make_pending(request_id="2")])
            ]
            await asyncio.sleep(0.05)
            assert writer.depth == 9
            await bring_back()
        await asyncio.gather(*waiting)
    assert [alert.request_id for alert in await _written(log)] == ["0"] * 9 + ["1"] * 10 + ["2"]


async def test_a_request_that_is_given_up_while_it_waits_leaves_no_alert_and_no_lock(
    log: AlertLog, database_url: str, vault: Vault, make_pending: MakePending
) -> None:
    async with _running(log, vault, 1) as writer:
        async with _table_away(database_url) as bring_back:
            await writer.submit([make_pending(request_id="first")], timeout=1)
            waiting = asyncio.create_task(writer.submit([make_pending(request_id="given up")], timeout=10))
            await asyncio.sleep(0.02)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            await bring_back()
        await writer.submit([make_pending(request_id="second")], timeout=10)
    assert [alert.request_id for alert in await _written(log)] == ["first", "second"]


async def test_many_requests_at_once_lose_and_double_nothing(
    log: AlertLog, vault: Vault, make_pending: MakePending
) -> None:
    accepted: set[str] = set()
    refused = 0

    async def request(number: int) -> None:
        nonlocal refused
        alerts = [make_pending(request_id=str(number)) for _ in range(number % 7 + 1)]
        try:
            await writer.submit(alerts, timeout=0.02 if number % 3 == 0 else 20)
            accepted.update(pending.alert.id for pending in alerts)
        except AlertQueueFull:
            refused += 1

    async with _running(log, vault, 20, batch_size=8) as writer:
        await asyncio.gather(*(request(number) for number in range(200)))
    found = await _written(log)
    assert refused > 0
    assert len(found) == len(accepted)
    assert {alert.id for alert in found} == accepted


async def test_a_database_locked_for_a_while_loses_nothing(
    impatient_log: AlertLog,
    sqlite_file: Path,
    vault: Vault,
    make_pending: MakePending,
    caplog: pytest.LogCaptureFixture,
) -> None:
    errors: list[Exception] = []
    async with _running(impatient_log, vault, 100, batch_size=5, on_error=errors.append) as writer:
        with _write_lock(sqlite_file) as release:
            alerts = [make_pending() for _ in range(20)]
            await writer.submit(alerts, timeout=1)
            await _until(lambda: len(errors) >= 2)
            assert writer.depth == 20
            release()
    assert [alert.id for alert in await _written(impatient_log)] == [pending.alert.id for pending in alerts]
    assert all(isinstance(error, AlertLogUnavailable) for error in errors)
    assert "20 alerts are not written yet" in caplog.text
    assert "database is locked" in caplog.text


async def test_a_database_that_fails_and_recovers_loses_nothing(
    log: AlertLog, database_url: str, vault: Vault, make_pending: MakePending
) -> None:
    errors: list[Exception] = []
    alerts = [make_pending() for _ in range(12)]
    async with _running(log, vault, 100, batch_size=5, on_error=errors.append) as writer:
        for outage in range(3):
            async with _table_away(database_url) as bring_back:
                await writer.submit(alerts[4 * outage : 4 * outage + 4], timeout=1)
                seen = len(errors)
                await _until(lambda seen=seen: len(errors) > seen)  # type: ignore[misc]
                await bring_back()
            await _until(lambda: writer.depth == 0)
    assert [alert.id for alert in await _written(log)] == [pending.alert.id for pending in alerts]


async def test_a_stop_that_comes_too_early_says_how_many_alerts_are_missing(
    impatient_log: AlertLog,
    sqlite_file: Path,
    vault: Vault,
    make_pending: MakePending,
    caplog: pytest.LogCaptureFixture,
) -> None:
    writer = AlertWriter(impatient_log, vault, 100, batch_size=2)
    await writer.start()
    with _write_lock(sqlite_file) as release:
        alerts = [make_pending() for _ in range(5)]
        await writer.submit(alerts, timeout=1)
        began = time.monotonic()
        with pytest.raises(AlertsNotWritten, match="5 accepted alerts were not confirmed") as error:
            await writer.stop(timeout=0.2)
        assert time.monotonic() - began < 2
        release()
    assert error.value.count == 5
    assert all(pending.alert.id in caplog.text for pending in alerts)


async def test_a_stop_refuses_those_who_come_or_wait(
    log: AlertLog, database_url: str, vault: Vault, make_pending: MakePending
) -> None:
    writer = AlertWriter(log, vault, 1)
    with pytest.raises(AlertWriterStopped):
        await writer.submit([make_pending()], timeout=1)
    await writer.start()
    async with _table_away(database_url) as bring_back:
        await writer.submit([make_pending()], timeout=1)
        waiting = [asyncio.create_task(writer.submit([make_pending()], timeout=10)) for _ in range(3)]
        await asyncio.sleep(0.02)
        stopping = asyncio.create_task(writer.stop())
        results = await asyncio.gather(*waiting, return_exceptions=True)
        await bring_back()
        await stopping
    assert [type(result) for result in results] == [AlertWriterStopped] * 3
    with pytest.raises(AlertWriterStopped):
        await writer.submit([make_pending()], timeout=1)
    assert len(await _written(log)) == 1


async def test_an_alert_is_written_without_its_input_when_the_disk_is_full(
    log: AlertLog, tmp_path: Path, vault: Vault, make_pending: MakePending, caplog: pytest.LogCaptureFixture
) -> None:
    lost, kept = make_pending(), make_pending()
    assert vault.prune() == 0  # has counted its folder, where the disk "fills" now
    day = tmp_path / "inputs" / f"{lost.alert.created:%Y-%m-%d}"
    day.mkdir(parents=True)
    (day / f".{lost.alert.id}.png.tmp").symlink_to("/dev/full")
    errors: list[Exception] = []
    async with _running(log, vault, 10, on_error=errors.append) as writer:
        await writer.submit([lost, kept], timeout=1)
    assert [(alert.id, alert.image_kept) for alert in await _written(log)] == [
        (lost.alert.id, False),
        (kept.alert.id, True),
    ]
    with pytest.raises(ImageNotKept):
        vault.path(lost.alert.id, lost.alert.created, "image/png")
    assert f"The input of the alert {lost.alert.id} is not kept: [Errno 28] No space left" in caplog.text
    assert len(errors) == 1


async def test_a_disk_that_recovers_keeps_the_input(
    log: AlertLog, tmp_path: Path, vault: Vault, make_pending: MakePending, caplog: pytest.LogCaptureFixture
) -> None:
    pending = make_pending()
    (tmp_path / "inputs").mkdir()
    in_the_way = tmp_path / "inputs" / f"{pending.alert.created:%Y-%m-%d}"
    in_the_way.write_bytes(b"a file where the day's folder belongs")
    async with _running(log, vault, 10) as writer:
        await writer.submit([pending], timeout=1)
        await asyncio.sleep(0.05)
        in_the_way.unlink()
    assert [alert.image_kept for alert in await _written(log)] == [True]
    assert caplog.records == []


async def test_a_disk_that_stays_broken_costs_the_input_but_not_the_alert(
    log: AlertLog, tmp_path: Path, vault: Vault, make_pending: MakePending
) -> None:
    (tmp_path / "inputs").write_bytes(b"a file where the folder belongs")
    async with _running(log, vault, 10) as writer:
        await writer.submit([make_pending() for _ in range(3)], timeout=1)
    assert [alert.image_kept for alert in await _written(log)] == [False] * 3


async def test_a_vault_with_no_budget_writes_alerts_without_inputs(
    log: AlertLog, tmp_path: Path, make_pending: MakePending, caplog: pytest.LogCaptureFixture
) -> None:
    async with _running(log, Vault(tmp_path / "inputs", 0, timedelta(days=1)), 10) as writer:
        await writer.submit([make_pending()], timeout=1)
    assert [alert.image_kept for alert in await _written(log)] == [False]
    assert caplog.records == []


async def test_the_vault_is_pruned_at_the_start_and_after_batches_that_pass_the_budget(
    log: AlertLog, tmp_path: Path, make_pending: MakePending
) -> None:
    folder = tmp_path / "inputs"
    Vault(folder, 10_000, timedelta(days=30)).store(new_alert_id(), datetime.now(UTC), "image/png", bytes(900))
    vault = Vault(folder, 500, timedelta(days=30))
    async with _running(log, vault, 1000, batch_size=10) as writer:
        await _until(lambda: vault.used_bytes == 0)
        alerts = [make_pending(image=bytes(100)) for _ in range(60)]
        await writer.submit(alerts, timeout=1)
    assert vault.used_bytes == 500
    kept = {path.stem for path in folder.rglob("*.png")}
    assert kept == {pending.alert.id for pending in alerts[-5:]}
    assert len(await _written(log)) == 60


async def test_neither_files_nor_pruning_run_on_the_event_loop(
    log: AlertLog, tmp_path: Path, make_pending: MakePending, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: set[str] = set()
    for name in ("replace", "unlink", "mkdir"):
        original = getattr(Path, name)

        def noted(self: Path, *args: Any, _original: Any = original, **options: Any) -> Any:
            threads.add(threading.current_thread().name)
            return _original(self, *args, **options)

        monkeypatch.setattr(Path, name, noted)
    async with _running(log, Vault(tmp_path / "inputs", 200, timedelta(days=1)), 100) as writer:
        await writer.submit([make_pending(image=bytes(100)) for _ in range(10)], timeout=1)
    assert threads
    assert threading.main_thread().name not in threads


async def test_a_listener_that_fails_does_not_stop_the_writer(
    log: AlertLog, database_url: str, vault: Vault, make_pending: MakePending, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_news: object) -> None:
        raise RuntimeError("the listener is broken")

    async with _running(log, vault, 10, on_written=fail, on_error=fail) as writer:
        async with _table_away(database_url) as bring_back:
            await writer.submit([make_pending()], timeout=1)
            await _until(lambda: "the listener is broken" in caplog.text)
            await bring_back()
        await _until(lambda: writer.depth == 0)
        await writer.submit([make_pending()], timeout=1)
    assert len(await _written(log)) == 2


async def test_a_writer_starts_once(log: AlertLog, vault: Vault) -> None:
    async with _running(log, vault, 10) as writer:
        with pytest.raises(RuntimeError, match="starts once"):
            await writer.start()
