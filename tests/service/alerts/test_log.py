import asyncio
import random
import sqlite3
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest

from service.alerts import (
    Alert,
    AlertFilter,
    AlertLog,
    AlertLogUnavailable,
    AlertNotFound,
    PageInvalid,
    new_alert_id,
)
from service.alerts.database import build_engine

MakeAlert = Callable[..., Alert]
EVERYTHING = AlertFilter()


async def _read_all(log: AlertLog, filters: AlertFilter, limit: int) -> list[Alert]:
    found: list[Alert] = []
    after = None
    while True:
        page = await log.page(filters, after, limit)
        assert len(page.alerts) <= limit
        found += page.alerts
        after = page.next_cursor
        if after is None:
            return found
        assert len(page.alerts) == limit


async def test_an_alert_is_read_back_as_it_was_written(log: AlertLog, make_alert: MakeAlert) -> None:
    alert = make_alert(
        label="größer 🦊",
        undefended_class_index=None,
        score=0.1 + 0.2,
        created=datetime(2026, 11, 20, 23, 59, 59, 999999, tzinfo=UTC),
        image_kept=True,
        mode="shadow",
    )
    await log.add([alert])
    assert await log.get(alert.id) == alert.model_copy(update={"seq": 1})


async def test_an_unknown_id_is_not_found(log: AlertLog, make_alert: MakeAlert) -> None:
    await log.add([make_alert()])
    missing = new_alert_id()
    with pytest.raises(AlertNotFound) as error:
        await log.get(missing)
    assert error.value.alert_id == missing
    assert str(error.value) == f"There is no alert with the id {missing!r}."


async def test_a_batch_written_again_doubles_no_row(log: AlertLog, make_alert: MakeAlert) -> None:
    first, second, third = make_alert(), make_alert(), make_alert()
    await log.add([first, second])
    await log.add([first, second, third, third])
    assert [alert.id for alert in await _read_all(log, EVERYTHING, 10)] == [third.id, second.id, first.id]
    assert await log.count(EVERYTHING) == 3


async def test_a_batch_that_cannot_be_written_whole_leaves_nothing(log: AlertLog, make_alert: MakeAlert) -> None:
    broken = make_alert().model_copy(update={"label": None})
    with pytest.raises(AlertLogUnavailable, match=r"(?i)null") as refusal:
        await log.add([make_alert(), broken])
    assert broken.client not in str(refusal.value)
    assert await log.count(EVERYTHING) == 0
    good = make_alert()
    await log.add([good])
    assert (await log.get(good.id)).seq == 1


async def test_writers_side_by_side_give_every_alert_a_place_of_its_own(
    log: AlertLog, database_url: str, make_alert: MakeAlert
) -> None:
    other = await AlertLog.open(database_url)
    batches = [[make_alert(request_id=str(number)) for _ in range(20)] for number in range(20)]
    await asyncio.gather(*(writer.add(batch) for batch, writer in zip(batches, (log, other) * 10, strict=True)))
    await other.close()
    written = await _read_all(log, EVERYTHING, 1000)
    assert [alert.seq for alert in written] == list(range(400, 0, -1))
    for batch in batches:
        places = [(await log.get(alert.id)).seq or 0 for alert in batch]
        assert places == list(range(places[0], places[0] + 20))


async def test_ten_thousand_alerts_are_paged_without_overlap_or_gap_while_new_ones_are_written(
    log: AlertLog, database_url: str, make_alert: MakeAlert
) -> None:
    chance = random.Random(7)
    written = [
        make_alert(
            model=chance.choice(["digits", "signs"]),
            client=f"10.0.0.{chance.randrange(5)}",
            score=chance.random(),
        )
        for _ in range(10_000)
    ]
    for start in range(0, len(written), 2500):
        await log.add(written[start : start + 2500])
    new: list[Alert] = []
    started, done = asyncio.Event(), asyncio.Event()

    async def keep_writing() -> None:
        writer = await AlertLog.open(database_url)
        while not done.is_set():
            batch = [make_alert(model="digits", client="10.0.0.1", score=0.99) for _ in range(7)]
            await writer.add(batch)
            new.extend(batch)
            started.set()
        await writer.close()

    writing = asyncio.create_task(keep_writing())
    await started.wait()
    filters = AlertFilter(model="digits", client="10.0.0.1", minimum_score=0.5)
    some = await _read_all(log, filters, 100)
    everything = await _read_all(log, EVERYTHING, 999)
    done.set()
    await writing

    old = {alert.id for alert in written}
    expected = [a.id for a in written if a.model == "digits" and a.client == "10.0.0.1" and a.score >= 0.5]
    assert [alert.id for alert in some if alert.id in old] == expected[::-1]
    assert [alert.id for alert in everything if alert.id in old] == [alert.id for alert in reversed(written)]
    for found in (some, everything):
        places = [alert.seq or 0 for alert in found]
        assert places == sorted(set(places), reverse=True)
    assert await log.count(EVERYTHING) == 10_000 + len(new)
    assert await log.count(filters) == len(expected) + len(new)


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({}, "abcd"),
        ({"model": "signs"}, "b"),
        ({"version": 3}, "c"),
        ({"label": "nine"}, "d"),
        ({"client": "evil"}, "bc"),
        ({"request_id": "req-9"}, "a"),
        ({"status": "closed"}, "d"),
        ({"minimum_score": 0.7}, "cd"),
        ({"since": 1}, "bcd"),
        ({"until": 2}, "ab"),
        ({"since": 1, "until": 3}, "bc"),
        ({"client": "evil", "version": 2}, "b"),
        ({"client": "nobody"}, ""),
    ],
)
async def test_a_filter_finds_what_matches_all_of_it(
    log: AlertLog, make_alert: MakeAlert, filters: dict[str, object], expected: str
) -> None:
    noon = datetime(2026, 11, 20, 12, tzinfo=UTC)
    changes: dict[str, dict[str, object]] = {
        "a": {"request_id": "req-9", "score": 0.5},
        "b": {"model": "signs", "client": "evil", "score": 0.6},
        "c": {"version": 3, "client": "evil", "score": 0.7},
        "d": {"label": "nine", "status": "closed", "score": 0.8},
    }
    alerts = {
        name: make_alert(created=noon + timedelta(hours=hour), **change)
        for hour, (name, change) in enumerate(changes.items())
    }
    await log.add(list(alerts.values()))
    times = {k: noon + timedelta(hours=int(str(v))) for k, v in filters.items() if k in ("since", "until")}
    matching = AlertFilter.model_validate(filters | times)
    found = await _read_all(log, matching, 3)
    assert [alert.id for alert in found] == [alerts[name].id for name in reversed(expected)]
    assert await log.count(matching) == len(expected)


async def test_a_filter_understands_times_of_other_zones(log: AlertLog, make_alert: MakeAlert) -> None:
    await log.add([make_alert(created=datetime(2026, 11, 20, 12, tzinfo=UTC))])
    for text, expected in (("2026-11-20T13:59+02:00", 1), ("2026-11-20T14:01+02:00", 0)):
        assert await log.count(AlertFilter.model_validate({"since": text})) == expected


@pytest.mark.parametrize(("after", "limit"), [(None, 0), (None, 2**63), (-1, 10), (2**63, 10)])
async def test_a_page_out_of_range_is_refused(log: AlertLog, after: int | None, limit: int) -> None:
    with pytest.raises(PageInvalid, match="needs a"):
        await log.page(EVERYTHING, after, limit)


async def test_an_empty_log_has_one_empty_page(log: AlertLog) -> None:
    page = await log.page(EVERYTHING, None, 10)
    assert (page.alerts, page.next_cursor) == ((), None)


async def test_a_page_that_is_exactly_full_is_the_last(log: AlertLog, make_alert: MakeAlert) -> None:
    await log.add([make_alert() for _ in range(5)])
    assert (await log.page(EVERYTHING, None, 5)).next_cursor is None
    assert (await log.page(EVERYTHING, None, 4)).next_cursor == 2


_SERVICE = """
import asyncio, sys
from datetime import UTC, datetime
from service.alerts import Alert, AlertLog, new_alert_id

async def main():
    log = await AlertLog.open(sys.argv[1])
    while True:
        batch = [Alert(id=new_alert_id(), created=datetime.now(UTC), model="digits", version=1, request_id="", index=0,
                       client="", class_index=0, label="", score=1, threshold=0, mode="flag", sha256="0" * 64,
                       media_type="image/png") for _ in range(5)]
        await log.add(batch)
        print(*(alert.id for alert in batch), flush=True)

asyncio.run(main())
"""


async def test_a_service_killed_while_writing_keeps_what_it_had_written_and_the_next_one_goes_on_from_there(
    database_url: str, make_alert: MakeAlert
) -> None:
    service = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _SERVICE, database_url, stdout=asyncio.subprocess.PIPE
    )
    assert service.stdout is not None
    confirmed = [(await service.stdout.readline()).decode().split() for _ in range(10)]
    service.kill()
    await service.communicate()

    log = await AlertLog.open(database_url)
    before = await _read_all(log, EVERYTHING, 1000)
    later = make_alert()
    await log.add([later])
    place = (await log.get(later.id)).seq
    await log.close()
    assert all(len(batch) == 5 for batch in confirmed)
    assert {id for batch in confirmed for id in batch} <= {alert.id for alert in before}
    assert len(before) % 5 == 0
    assert [alert.seq for alert in before] == list(range(len(before), 0, -1))
    assert place == len(before) + 1


async def test_a_write_waits_for_a_short_lock_and_readers_do_not(sqlite_file: Path, make_alert: MakeAlert) -> None:
    log = await AlertLog.open(f"sqlite+aiosqlite:///{sqlite_file}")
    await log.add([make_alert()])
    other = sqlite3.connect(sqlite_file, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    writing = asyncio.create_task(log.add([make_alert()]))
    await asyncio.sleep(0.2)
    assert await log.count(EVERYTHING) == 1
    assert not writing.done()
    other.execute("ROLLBACK")
    other.close()
    await writing
    assert await log.count(EVERYTHING) == 2
    await log.close()


async def test_a_lock_that_lasts_is_reported(impatient_log: AlertLog, sqlite_file: Path, make_alert: MakeAlert) -> None:
    other = sqlite3.connect(sqlite_file, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(AlertLogUnavailable, match=r"could not be written: database is locked\.$"):
        await impatient_log.add([make_alert()])
    other.execute("ROLLBACK")
    other.close()
    await impatient_log.add([make_alert()])
    assert await impatient_log.count(EVERYTHING) == 1


async def test_a_table_that_is_gone_is_reported_without_the_values_of_the_statement(
    sqlite_file: Path, make_alert: MakeAlert
) -> None:
    log = await AlertLog.open(f"sqlite+aiosqlite:///{sqlite_file}")
    other = sqlite3.connect(sqlite_file)
    other.execute("DROP TABLE alerts")
    other.close()
    with pytest.raises(AlertLogUnavailable, match=r"could not be written: no such table: alerts\.$"):
        await log.add([make_alert(client="a client's address")])
    with pytest.raises(AlertLogUnavailable, match="could not be read"):
        await log.count(EVERYTHING)
    await log.close()


async def test_sqlite_writes_ahead_and_checks_foreign_keys(sqlite_file: Path) -> None:
    sqlite_file.parent.mkdir(parents=True)
    engine = build_engine(f"sqlite+aiosqlite:///{sqlite_file}")
    async with engine.connect() as connection:
        pragmas = [
            (await connection.exec_driver_sql(f"PRAGMA {name}")).scalar_one()
            for name in ("journal_mode", "busy_timeout", "foreign_keys")
        ]
    await engine.dispose()
    assert pragmas == ["wal", 5000, 1]


def test_a_moment_beyond_the_calendar_is_refused() -> None:
    with pytest.raises(ValueError, match="years 1 to 9999"):
        AlertFilter(since=datetime(9999, 12, 31, 23, 59, tzinfo=timezone(timedelta(hours=-12))))
