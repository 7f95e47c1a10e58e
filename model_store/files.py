"""Files as the store needs them: listed without following links, hashed while copied, on the disk when it says so."""

import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from model_store.errors import StorageFailed, StoreError
from model_store.manifest import FileRecord

_CHUNK = 1 << 20


@contextmanager
def storage_failures(attempt: str) -> Iterator[None]:
    """Raise StorageFailed, which begins with `attempt`, for what the operating system refuses."""
    try:
        yield
    except StoreError:  # some are an OSError too
        raise
    except OSError as error:
        raise StorageFailed(attempt, error) from error


def scan(folder: Path, prefix: str = "") -> dict[str, os.stat_result]:
    """List whatever is no folder below `folder`, by relative posix path, sorted; links are listed, not followed."""
    found: dict[str, os.stat_result] = {}
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.is_dir(follow_symlinks=False):
                found |= scan(Path(entry.path), f"{prefix}{entry.name}/")
            else:
                found[prefix + entry.name] = entry.stat(follow_symlinks=False)
    return found


def is_regular(status: os.stat_result) -> bool:
    """Tell a regular file from a link, a pipe, a socket or a device."""
    return stat.S_ISREG(status.st_mode)


def sha256_of(path: Path) -> str:
    """Hash a file's content, as 64 lower-case hexadecimal digits."""
    with path.open("rb") as reader:
        return hashlib.file_digest(reader, "sha256").hexdigest()


def _create(path: Path, mode: int) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)


def copy_hashed(source: Path, target: Path) -> FileRecord:
    """Copy a file to a new, read-only one on the disk; return the size and digest of what was written."""
    digest, size = hashlib.sha256(), 0
    with source.open("rb") as reader, os.fdopen(_create(target, 0o444), "wb") as writer:
        while chunk := reader.read(_CHUNK):
            digest.update(chunk)
            size += writer.write(chunk)
        writer.flush()
        os.fsync(writer.fileno())
    return FileRecord(sha256=digest.hexdigest(), size=size)


def write_anew(path: Path, content: bytes, mode: int) -> None:
    """Write a file to the disk in place of one that nobody reads yet."""
    path.unlink(missing_ok=True)
    with os.fdopen(_create(path, mode), "wb") as writer:
        writer.write(content)
        writer.flush()
        os.fsync(writer.fileno())


def sync_folder(folder: Path) -> None:
    """Put a folder's list of names on the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
