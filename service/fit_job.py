"""Fits that can be interrupted: one folder and one lock for each, under ``fits`` in the store's folder.

``fits/KEY/`` holds ``job.json`` (what the fit is), ``stages/`` (what is done of it), ``lock`` and ``pid`` (who is at
it); the key is a digest of all that the result depends on. The lock is the operating system's (flock), so it goes
with its process however that ends. Whoever makes, locks or removes one of these folders holds ``fits/.lock``.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, ValidationError

from defenses.stages import Stages
from model_store.files import sync_folder, write_anew

FITS = "fits"
"""The folder of the store that keeps unfinished fits, beside the models."""

FORMAT = 5
"""Part of every fit's identity: counts up when a stage no longer keeps what it kept, or computes it otherwise."""

_KEY = re.compile(r"[0-9a-f]{16}")
_RECORD = "job.json"
_STAGES = "stages"
_LOCK = "lock"
_PID = "pid"
_GATE = ".lock"
_REMOVED = ".removed-"


class FitRunning(RuntimeError):
    """Another process is at this fit; `pid` is None where it is not known."""

    def __init__(self, folder: Path, pid: int | None) -> None:
        runner = "another process" if pid is None else f"process {pid}"
        super().__init__(f"This fit is being run by {runner}, in {folder}: wait for it, or stop it and try again.")
        self.folder = folder
        self.pid = pid


class FitNotFound(KeyError):
    """No unfinished fit has this key."""

    def __init__(self, key: str, present: list[str]) -> None:
        self.message = f"There is no unfinished fit {key!r}; there are: {', '.join(present) or 'none'}."
        super().__init__(self.message)
        self.key = key

    def __str__(self) -> str:
        return self.message


class JobRecord(BaseModel):
    """Say what a fit is: ``identity`` is all that its result depends on, and ``key`` the digest of that.

    ``id`` tells this fit from an earlier one of the same identity, which was finished or dropped.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    key: str
    model: str
    dataset: str
    started: datetime
    command: str
    identity: dict[str, Any]


@dataclass(frozen=True)
class FitJob:
    """A fit under its lock; `killed` is the process that was last at it, where that did not end by itself."""

    folder: Path
    record: JobRecord
    killed: int | None

    @property
    def stages(self) -> Stages:
        """What is done of the fit."""
        return Stages(self.folder / _STAGES)

    @property
    def size(self) -> int:
        """The bytes that are kept of the fit."""
        return _size(self.folder)

    def told(self) -> str | None:
        """Return a sentence that says what the fit resumes from, or None where nothing is kept."""
        names = self.stages.names()
        if not names:
            return None
        seconds = sum(self.stages.seconds(name) or 0.0 for name in names)
        killed = f" Process {self.killed}, which was last at it, was killed." if self.killed else ""
        return (
            f"Resuming the fit {self.record.key}, begun {self.record.started:%Y-%m-%d %H:%M} UTC.{killed} "
            f"Kept, after {seconds:.0f} s of work: {', '.join(names)}."
        )


class Unfinished(BaseModel):
    """A fit as it lies there; `record` is None where it cannot be read, and `pid` where no process is at it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str
    record: JobRecord | None
    stages: tuple[str, ...]
    size: int
    pid: int | None


def job_key(identity: dict[str, Any]) -> str:
    """Return the key of a fit: the first 16 digits of the SHA-256 over its identity as canonical JSON."""
    canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


class FitJobs:
    """The unfinished fits in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @contextmanager
    def open(
        self, identity: dict[str, Any], *, model: str, dataset: str, command: str, fresh: bool = False
    ) -> Iterator[FitJob]:
        """Yield the fit of this identity under its lock, with what is kept of it; nothing when ``fresh``.

        ``identity`` is of values that JSON can hold. When the context ends well, the fit is finished and its folder
        removed; when it ends with an exception the folder stays, unless nothing was kept. Raises ``FitRunning`` at
        once where another process is at the fit.
        """
        key = job_key(identity)
        folder = self._folder / key
        lock, killed = self._acquire(folder)
        try:
            record = None if fresh else _record(folder)
            if record is None:
                shutil.rmtree(folder / _STAGES, ignore_errors=True)
                record = JobRecord(
                    id=uuid4().hex,
                    key=key,
                    model=model,
                    dataset=dataset,
                    started=datetime.now(UTC),
                    command=command,
                    identity=identity,
                )
                _write(folder / _RECORD, record.model_dump_json(indent=2))
            yield FitJob(folder, record, killed)
        except BaseException:
            self._release(folder, lock, keep=bool(Stages(folder / _STAGES).names()))
            raise
        self._release(folder, lock, keep=False)

    def unfinished(self) -> list[Unfinished]:
        """List the fits that lie there, the oldest first; those whose record cannot be read come last."""
        found = []
        for key in self._keys():
            with suppress(FileNotFoundError):  # it may be finished meanwhile
                found.append(self._unfinished(key))
        latest = datetime.max.replace(tzinfo=UTC)
        return sorted(found, key=lambda fit: fit.record.started if fit.record else latest)

    def discard(self, key: str) -> None:
        """Remove what is kept of a fit. Raises ``FitNotFound``, and ``FitRunning`` where a process is at it."""
        if key not in self._keys():
            raise FitNotFound(key, self._keys())
        folder = self._folder / key
        lock, _ = self._acquire(folder)
        self._release(folder, lock, keep=False)

    def _keys(self) -> list[str]:
        if not self._folder.is_dir():
            return []
        return sorted(path.name for path in self._folder.iterdir() if _KEY.fullmatch(path.name))

    def _unfinished(self, key: str) -> Unfinished:
        folder = self._folder / key
        names = tuple(Stages(folder / _STAGES).names())
        pid = _pid(folder) if self._is_running(folder) else None
        return Unfinished(key=key, record=_record(folder), stages=names, size=_size(folder), pid=pid)

    def _is_running(self, folder: Path) -> bool:
        with self._gate():
            lock = _lock(folder)
            try:
                lock.acquire()
            except Timeout:
                return True
            lock.release()
            return False

    def _acquire(self, folder: Path) -> tuple[FileLock, int | None]:
        """Lock a fit's folder, made if need be; return the lock, and the process that was killed holding it."""
        self._folder.mkdir(parents=True, exist_ok=True)
        lock = _lock(folder)
        with self._gate():
            for removed in self._folder.glob(f"{_REMOVED}*"):
                shutil.rmtree(removed, ignore_errors=True)
            folder.mkdir(exist_ok=True)
            sync_folder(self._folder)
            try:
                lock.acquire()
            except Timeout as error:
                raise FitRunning(folder, _pid(folder)) from error
            killed = _pid(folder)
            _write(folder / _PID, str(os.getpid()))
        return lock, killed

    def _release(self, folder: Path, lock: FileLock, *, keep: bool) -> None:
        removed = self._folder / f"{_REMOVED}{uuid4().hex}"
        with self._gate():
            if keep:
                (folder / _PID).unlink(missing_ok=True)
            else:
                # Renamed first, so that no fit comes back with stages and without its record.
                folder.rename(removed)
            lock.release()
        shutil.rmtree(removed, ignore_errors=True)

    def _gate(self) -> FileLock:
        return FileLock(self._folder / _GATE, fallback_to_soft=False)


def _lock(folder: Path) -> FileLock:
    # Never a lock that is but a file's presence: a killed process would leave it locked.
    return FileLock(folder / _LOCK, timeout=0, fallback_to_soft=False)


def _record(folder: Path) -> JobRecord | None:
    try:
        return JobRecord.model_validate_json((folder / _RECORD).read_bytes())
    except (FileNotFoundError, ValidationError):
        return None


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _pid(folder: Path) -> int | None:
    with suppress(FileNotFoundError, ValueError):
        return int((folder / _PID).read_text())
    return None


def _write(path: Path, content: str) -> None:
    new = path.with_name(f".{path.name}.new")
    write_anew(new, content.encode(), 0o644)
    new.replace(path)
    sync_folder(path.parent)
