import threading
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone
from itertools import count
from pathlib import Path

import pytest

from service.alerts import AlertIdInvalid, ImageNotKept, MediaTypeUnsupported, Vault, new_alert_id

YEARS = timedelta(days=3650)


class _Clock:
    """Makes ids of chosen times: those of the vault's own order."""

    def __init__(self) -> None:
        self._numbers: Iterator[int] = count()

    def id_at(self, moment: datetime) -> str:
        milliseconds = int(moment.timestamp() * 1000)
        return str(uuid.UUID(int=milliseconds << 80 | 7 << 76 | 2 << 62 | next(self._numbers)))


def _store_days(vault: Vault, days_ago: list[int], size: int) -> list[tuple[str, datetime]]:
    clock, now = _Clock(), datetime.now(UTC)
    stored = []
    for days in days_ago:
        created = now - timedelta(days=days)
        alert_id = clock.id_at(created)
        assert vault.store(alert_id, created, "image/png", bytes(size))
        stored.append((alert_id, created))
    return stored


def _kept(vault: Vault, stored: list[tuple[str, datetime]]) -> list[bool]:
    kept = []
    for alert_id, created in stored:
        try:
            kept.append(vault.path(alert_id, created, "image/png").is_file())
        except ImageNotKept:
            kept.append(False)
    return kept


def _on_disk(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


@pytest.mark.parametrize(
    ("media_type", "suffix"),
    [("image/png", ".png"), ("image/jpeg", ".jpg"), ("image/webp", ".webp"), ("application/x-npy", ".npy")],
)
def test_an_input_is_kept_byte_for_byte_under_the_day_of_its_alert_in_utc(
    tmp_path: Path, media_type: str, suffix: str
) -> None:
    vault = Vault(tmp_path / "in" / "puts", 1000, YEARS)
    alert_id, data = new_alert_id(), bytes(range(256))
    created = datetime(2026, 11, 21, 1, 0, tzinfo=timezone(timedelta(hours=2)))
    assert vault.store(alert_id, created, media_type, data)
    path = vault.path(alert_id, created, media_type)
    assert path == tmp_path / "in" / "puts" / "2026-11-20" / f"{alert_id}{suffix}"
    assert path.read_bytes() == data
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    "alert_id", ["../../../etc/passwd", "..", "", "/etc/passwd", "f31d1a9d-e4a4-4e5e-9719-033a02a7c101", "a\0b"]
)
def test_an_id_cannot_lead_out_of_the_folder(tmp_path: Path, alert_id: str) -> None:
    vault = Vault(tmp_path / "inputs", 1000, YEARS)
    with pytest.raises(AlertIdInvalid):
        vault.store(alert_id, datetime.now(UTC), "image/png", b"data")
    with pytest.raises(AlertIdInvalid):
        vault.path(alert_id, datetime.now(UTC), "image/png")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_media_type_is_refused(tmp_path: Path) -> None:
    vault = Vault(tmp_path, 1000, YEARS)
    with pytest.raises(MediaTypeUnsupported, match="image/png, image/jpeg, image/webp, application/x-npy, not as"):
        vault.store(new_alert_id(), datetime.now(UTC), "image/../png", b"data")


def test_an_input_never_stored_is_not_kept(tmp_path: Path) -> None:
    alert_id = new_alert_id()
    with pytest.raises(ImageNotKept, match=alert_id):
        Vault(tmp_path, 1000, YEARS).path(alert_id, datetime.now(UTC), "image/png")


def test_a_budget_of_nothing_keeps_nothing(tmp_path: Path) -> None:
    vault = Vault(tmp_path / "inputs", 0, YEARS)
    assert not vault.store(new_alert_id(), datetime.now(UTC), "image/png", b"")
    assert not (tmp_path / "inputs").exists()
    assert vault.prune() == 0


def test_a_budget_turned_down_to_nothing_empties_the_folder(tmp_path: Path) -> None:
    _store_days(Vault(tmp_path, 1000, YEARS), [1, 0], size=100)
    assert Vault(tmp_path, 0, YEARS).prune() == 2
    assert list(tmp_path.iterdir()) == []


def test_an_input_above_the_whole_budget_is_not_kept_and_pushes_nothing_out(tmp_path: Path) -> None:
    vault = Vault(tmp_path, 100, YEARS)
    (small,) = _store_days(vault, [0], size=100)
    assert not vault.store(new_alert_id(), datetime.now(UTC), "image/png", bytes(101))
    assert vault.prune() == 0
    assert _kept(vault, [small]) == [True]


def test_pruning_deletes_the_oldest_until_the_rest_is_within_the_budget(tmp_path: Path) -> None:
    vault = Vault(tmp_path, 450, YEARS)
    stored = _store_days(vault, [0, 9, 2, 9, 5, 0], size=100)
    assert vault.used_bytes == 600
    assert vault.prune() == 2
    assert _kept(vault, stored) == [True, False, True, False, True, True]
    assert vault.used_bytes == 400 == _on_disk(tmp_path)
    assert vault.prune() == 0


def test_pruning_within_one_day_goes_by_the_order_of_the_ids(tmp_path: Path) -> None:
    vault = Vault(tmp_path, 500, YEARS)
    now = datetime.now(UTC)
    ids = [new_alert_id() for _ in range(20)]
    for alert_id in reversed(ids):
        vault.store(alert_id, now, "image/png", bytes(100))
    assert vault.prune() == 15
    more = [new_alert_id() for _ in range(7)]
    for alert_id in more:
        vault.store(alert_id, now, "image/png", bytes(100))
    assert vault.prune() == 7
    assert _kept(vault, [(alert_id, now) for alert_id in (ids + more)[-5:]]) == [True] * 5
    assert vault.used_bytes == 500 == _on_disk(tmp_path)


def test_pruning_deletes_what_is_too_old_and_the_folders_that_become_empty(tmp_path: Path) -> None:
    vault = Vault(tmp_path, 10_000, timedelta(days=7))
    stored = _store_days(vault, [30, 8, 6, 0], size=10)
    assert vault.prune() == 2
    assert _kept(vault, stored) == [False, False, True, True]
    assert len(list(tmp_path.iterdir())) == 2


def test_an_older_input_stored_late_is_still_the_first_to_go(tmp_path: Path) -> None:
    vault = Vault(tmp_path, 300, YEARS)
    stored = _store_days(vault, [2, 2, 2, 0], size=100)
    assert vault.prune() == 1
    late = _store_days(vault, [5], size=100)
    assert vault.prune() == 1
    assert _kept(vault, stored + late) == [False, True, True, True, False]


def test_a_restart_counts_what_is_there_and_clears_what_a_crash_left(tmp_path: Path) -> None:
    before = Vault(tmp_path, 1000, YEARS)
    stored = _store_days(before, [3, 1, 0], size=100)
    leftover = tmp_path / f"{stored[0][1]:%Y-%m-%d}" / f".{new_alert_id()}.png.tmp"
    leftover.write_bytes(bytes(70))
    after = Vault(tmp_path, 250, YEARS)
    assert after.used_bytes == 300
    assert not leftover.exists()
    assert after.prune() == 1
    assert _kept(after, stored) == [False, True, True]


def test_files_of_others_are_neither_counted_nor_pruned(tmp_path: Path) -> None:
    (day,) = [tmp_path / "2001-01-01"]
    day.mkdir()
    others = [day / "notes.txt", tmp_path / "README", day / "018f2f6e-0000-7000-8000-000000000000.exe"]
    for other in others:
        other.write_bytes(bytes(500))
    vault = Vault(tmp_path, 100, YEARS)
    assert vault.used_bytes == 0
    _store_days(vault, [2, 1], size=100)
    assert vault.prune() == 1
    assert all(other.exists() for other in others)


def test_storing_an_input_again_counts_it_once(tmp_path: Path) -> None:
    vault = Vault(tmp_path, 1000, YEARS)
    alert_id, now = new_alert_id(), datetime.now(UTC)
    for size in (100, 300, 200):
        vault.store(alert_id, now, "image/png", bytes(size))
    assert vault.used_bytes == 200 == _on_disk(tmp_path)


def test_a_failed_write_leaves_neither_a_file_nor_a_count(tmp_path: Path) -> None:
    vault = Vault(tmp_path, 1000, YEARS)
    alert_id, now = new_alert_id(), datetime.now(UTC)
    assert vault.used_bytes == 0
    temporary = tmp_path / f"{now:%Y-%m-%d}" / f".{alert_id}.png.tmp"
    temporary.parent.mkdir()
    temporary.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        vault.store(alert_id, now, "image/png", bytes(100))
    assert list(temporary.parent.iterdir()) == []
    assert vault.used_bytes == 0
    assert vault.store(alert_id, now, "image/png", bytes(100))


def test_storing_and_pruning_in_many_threads_keeps_the_accounts_right(tmp_path: Path) -> None:
    vault = Vault(tmp_path, 3000, YEARS)
    start = threading.Barrier(6)

    def store() -> None:
        start.wait()
        for _ in range(40):
            vault.store(new_alert_id(), datetime.now(UTC), "image/png", bytes(100))

    def prune() -> None:
        start.wait()
        for _ in range(40):
            vault.prune()

    threads = [threading.Thread(target=work) for work in (store, store, store, store, prune, prune)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    vault.prune()
    assert vault.used_bytes == 3000 == _on_disk(tmp_path)
