"""What a fit takes of memory and disk, and what is left of them."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

GIB = 2**30


class MemoryTooSmall(MemoryError):
    """A fit would not fit in memory; `needed` and `available` are bytes."""

    def __init__(self, needed: int, available: int, where: str, largest: "Part") -> None:
        super().__init__(_refusal(needed, available, where, largest))
        self.needed = needed
        self.available = available


class DiskTooSmall(OSError):
    """What a fit keeps and publishes would not fit on the disk; `needed` and `available` are bytes."""

    def __init__(self, needed: int, available: int, folder: Path, largest: "Part") -> None:
        super().__init__(_refusal(needed, available, f"disk under {folder}", largest))
        self.needed = needed
        self.available = available


@dataclass(frozen=True)
class Part:
    """One part of what is needed: what it is, its bytes, and what to do about it."""

    what: str
    size: int
    advice: str


class FitSize(Protocol):
    """What a fit takes, in parts.

    ``held`` are in memory throughout, on top of them the largest of the ``turns``, one after the other. The largest of
    the ``batches`` is another turn, or on the accelerator where there is one. ``stored`` are written to disk.
    """

    @property
    def held(self) -> Sequence[Part]: ...

    @property
    def turns(self) -> Sequence[Part]: ...

    @property
    def batches(self) -> Sequence[Part]: ...

    @property
    def stored(self) -> Sequence[Part]: ...


def check_memory(size: FitSize, *, available: int | None, device_available: int | None = None) -> None:
    """Refuse a fit that the memory left does not hold; None where it is unknown.

    With ``device_available``, the batches are on the accelerator, and are held against its memory. The images
    themselves are in memory already. Raises ``MemoryTooSmall``.
    """
    turns = list(size.turns)
    if device_available is None:
        turns += size.batches
    else:
        _check_memory([max(size.batches, key=_size)], device_available, "memory on the GPU")
    _check_memory([*size.held, max(turns, key=_size)], available, "memory")


def _check_memory(parts: Sequence[Part], available: int | None, where: str) -> None:
    needed = sum(part.size for part in parts)
    if available is not None and needed > available:
        raise MemoryTooSmall(needed, available, where, max(parts, key=_size))


def check_disk(size: FitSize, folder: Path, *, kept: int) -> None:
    """Refuse a fit whose stages and versions the disk under ``folder`` does not hold.

    ``kept`` bytes of it are there already, from an earlier run. Raises ``DiskTooSmall``.
    """
    parts = size.stored
    needed = max(0, sum(part.size for part in parts) - kept)
    available = shutil.disk_usage(folder).free
    if needed > available:
        raise DiskTooSmall(needed, available, folder, max(parts, key=_size))


def memory_available() -> int | None:
    """Tell the bytes left on this machine and in the control group of this process; None where it is unknown."""
    left = []
    meminfo, group = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
    if meminfo.exists():
        left += [int(line.split()[1]) * 1024 for line in meminfo.read_text().splitlines() if "MemAvailable" in line]
    limit = group / "memory.max"
    if limit.exists() and (most := limit.read_text().strip()) != "max":
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used = int((group / "memory.current").read_text()) - int(stat["inactive_file"])
        left.append(int(most) - used)
    return min(left, default=None)


def _size(part: Part) -> int:
    return part.size


def _refusal(needed: int, available: int, where: str, largest: Part) -> str:
    return (
        f"This fit needs about {_told(needed)} of {where}, but only {_told(available)} are available. "
        f"The most of it, {_told(largest.size)}, is for {largest.what}: {largest.advice}."
    )


def _told(size: int) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / 2**20:.1f} MiB"
