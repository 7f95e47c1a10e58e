"""The inputs of alerts on disk, exactly as they were received, within a budget of bytes and an age."""

import os
import re
import threading
from collections import deque
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

from service.alerts.errors import ImageNotKept
from service.alerts.ids import alert_id_time, check_alert_id, is_alert_id
from service.alerts.models import INPUT_SUFFIXES, input_suffix

_DAY = re.compile(r"\d{4}-\d\d-\d\d")
_TEMPORARY = ".tmp"


class _KeptInput(NamedTuple):
    name: str
    size: int


class Vault:
    """Inputs as files `folder/YYYY-MM-DD/<id><suffix>`, by the day (UTC) their alert was created.

    Every method blocks on the disk: call it in a thread; any thread will do. What the folder holds is counted once,
    before the first store or prune, and kept up from there, so one service at a time may use a folder.
    Files that the vault did not write are neither counted nor pruned.
    `max_bytes` is the budget, 0 to keep nothing; `max_age` is counted from the time in an alert's id.
    """

    def __init__(self, folder: Path, max_bytes: int, max_age: timedelta) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._max_age = max_age
        self._lock = threading.RLock()
        self._bytes_of_day: dict[str, int] | None = None
        # What is left of one listing of the oldest day: a prune need not list a folder again for every file it deletes.
        self._oldest: deque[_KeptInput] = deque()
        self._oldest_day = ""

    @property
    def used_bytes(self) -> int:
        """How many bytes of inputs are kept."""
        with self._lock:
            return sum(self._accounts().values())

    def store(self, alert_id: str, created: datetime, media_type: str, data: bytes) -> bool:
        """Store an input; a reader sees all of it or nothing, even after a crash. Storing it again replaces it.

        Returns whether it is kept: an input above the whole budget is not. The budget may be passed until the next
        prune. Raises AlertIdInvalid, MediaTypeUnsupported, and OSError when the disk does not take it.
        """
        path = self._locate(alert_id, created, media_type)
        if self._max_bytes == 0 or len(data) > self._max_bytes:
            return False
        with self._lock:
            accounts = self._accounts()
            day = path.parent.name
            path.parent.mkdir(parents=True, exist_ok=True)
            replaced = path.stat().st_size if path.exists() else 0
            _write_atomically(path, data)
            accounts[day] = accounts.get(day, 0) + len(data) - replaced
        return True

    def path(self, alert_id: str, created: datetime, media_type: str) -> Path:
        """Return the file of a kept input. Raises AlertIdInvalid, MediaTypeUnsupported, ImageNotKept."""
        path = self._locate(alert_id, created, media_type)
        if not path.is_file():
            raise ImageNotKept(alert_id)
        return path

    def prune(self) -> int:
        """Delete the oldest inputs until the rest is within the age and the budget; return how many were deleted.

        Raises OSError when a file cannot be deleted.
        """
        pruned = 0
        oldest_kept = datetime.now(UTC) - self._max_age
        with self._lock:
            accounts = self._accounts()
            while (oldest := self._peek_oldest()) is not None:
                if alert_id_time(Path(oldest.name).stem) >= oldest_kept and self.used_bytes <= self._max_bytes:
                    break
                (self._folder / self._oldest_day / oldest.name).unlink(missing_ok=True)
                self._oldest.popleft()
                accounts[self._oldest_day] -= oldest.size
                pruned += 1
        return pruned

    def _locate(self, alert_id: str, created: datetime, media_type: str) -> Path:
        # The id is checked and the suffix is looked up, so that no part of the path can lead out of the folder.
        name = check_alert_id(alert_id) + input_suffix(media_type)
        return self._folder / created.astimezone(UTC).strftime("%Y-%m-%d") / name

    def _accounts(self) -> dict[str, int]:
        if self._bytes_of_day is None:
            accounts = {}
            for day in _days(self._folder):
                for leftover in day.glob(f".*{_TEMPORARY}"):
                    leftover.unlink(missing_ok=True)
                accounts[day.name] = sum(kept.size for kept in _kept_inputs(day))
            self._bytes_of_day = accounts
        return self._bytes_of_day

    def _peek_oldest(self) -> _KeptInput | None:
        accounts = self._accounts()
        while accounts:
            day = min(accounts)
            if day != self._oldest_day or not self._oldest:
                listing = sorted(_kept_inputs(self._folder / day))
                self._oldest, self._oldest_day = deque(listing), day
                accounts[day] = sum(kept.size for kept in listing)
            if self._oldest:
                return self._oldest[0]
            del accounts[day]
            _remove_if_empty(self._folder / day)
        return None


def _days(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return [day for day in folder.iterdir() if _DAY.fullmatch(day.name) and day.is_dir()]


def _kept_inputs(day: Path) -> list[_KeptInput]:
    if not day.is_dir():
        return []
    with os.scandir(day) as entries:
        return [_KeptInput(entry.name, entry.stat().st_size) for entry in entries if _is_kept_input(entry)]


def _is_kept_input(entry: os.DirEntry[str]) -> bool:
    name = Path(entry.name)
    return is_alert_id(name.stem) and name.suffix in INPUT_SUFFIXES.values() and entry.is_file(follow_symlinks=False)


def _write_atomically(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}{_TEMPORARY}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _remove_if_empty(day: Path) -> None:
    # Files that are not the vault's keep their folder.
    with suppress(OSError):
        day.rmdir()
