"""Where versions are kept: the protocol of a backend, and the one that keeps them in a local folder."""

import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from errno import EEXIST, ENOTDIR, ENOTEMPTY
from pathlib import Path
from typing import Protocol
from uuid import uuid4

from model_store.errors import VersionExists
from model_store.files import copy_hashed, storage_failures, sync_folder, write_anew
from model_store.manifest import FileRecord

_ALIASES = "aliases.json"
_VERSION = re.compile(r"[1-9][0-9]{0,17}")
# Names that begin with '.' are neither models nor versions.
_NEW_ALIASES = ".aliases.json.new"
_LOCK = ".lock"
_PUBLISHING = ".publishing-"


class Staging(Protocol):
    """A payload on its way into the store: kept and hashed, but not visible."""

    @property
    def files(self) -> dict[str, FileRecord]:
        """Size and digest of every file, as it was taken."""

    def commit(self, version: int, documents: Mapping[str, bytes]) -> None:
        """Add the documents and make the whole visible at once; raise VersionExists if the number is taken."""


class Storage(Protocol):
    """A place that keeps versions. Names and paths come checked; only `stage`, `write_aliases` and `prune` write.

    A folder does it with a rename and a lock; an object store with create-if-absent and compare-and-swap by etag.
    Every method raises StorageFailed where the place cannot be read or written.
    """

    def models(self) -> list[str]:
        """List the names that have at least one version."""

    def versions(self, name: str) -> list[int]:
        """List the versions in ascending order; an unknown model has none."""

    def read(self, name: str, version: int, file: str) -> bytes | None:
        """Read one file of a version, or None if it is not there."""

    def folder(self, name: str, version: int) -> Path:
        """Give a local folder with all files of an existing version."""

    def stage(self, name: str, folder: Path, files: Sequence[str]) -> AbstractContextManager[Staging]:
        """Take these files of a local folder; what is not committed in the context is dropped at its end."""

    def prune(self, name: str) -> int:
        """Remove what publishers left behind that no longer live; return how many there were."""

    def read_aliases(self, name: str) -> tuple[bytes, str] | None:
        """Read the aliases document and its etag, or None if there is none yet."""

    def write_aliases(self, name: str, content: bytes, etag: str | None) -> bool:
        """Replace the aliases document atomically if its etag is still this one (None: still absent), or say False."""


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    descriptor = _open_lock(path)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _open_lock(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)


@contextmanager
def _kept_alive(model: Path, publishing: Path) -> Iterator[None]:
    with ExitStack() as stack:
        with _locked(model / _LOCK):  # or a pruner could see the folder before its own lock is held
            publishing.mkdir()
            stack.callback(_drop, model, publishing)
            stack.enter_context(_locked(publishing / _LOCK))
        yield


def _drop(model: Path, publishing: Path) -> None:
    with _locked(model / _LOCK):
        shutil.rmtree(publishing, ignore_errors=True)


def _is_abandoned(publishing: Path) -> bool:
    descriptor = _open_lock(publishing / _LOCK)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


class LocalStaging:
    """A copied payload in a hidden folder beside the versions of its model."""

    def __init__(self, model: Path, content: Path, files: dict[str, FileRecord]) -> None:
        self._model = model
        self._content = content
        self.files = files

    def commit(self, version: int, documents: Mapping[str, bytes]) -> None:
        """Write the documents in their order, then rename the folder to its number."""
        with storage_failures(f"Model {self._model.name!r} version {version} could not be published"):
            for file, content in documents.items():
                write_anew(self._content / file, content, 0o444)
            sync_folder(self._content)
            try:
                # The kernel refuses to replace a folder that is not empty, so no version is ever overwritten.
                self._content.rename(self._model / str(version))
            except OSError as error:
                if error.errno in {ENOTEMPTY, EEXIST, ENOTDIR}:
                    raise VersionExists(self._model.name, version) from error
                raise
            sync_folder(self._model)


class LocalStorage:
    """Keep versions in `<root>/<model>/<version>/`, a folder on a POSIX file system that knows flock and fsync.

    The root is created by the first version. Readers take no lock and need no right to write. A live publisher
    holds a lock inside its hidden folder, so what a killed one left behind is told apart without guessing by age.
    """

    def __init__(self, root: Path) -> None:
        self._root = root.absolute()

    def models(self) -> list[str]:
        """List the names that have at least one version."""
        return sorted(name for name in self._folders(self._root) if self.versions(name))

    def versions(self, name: str) -> list[int]:
        """List the versions in ascending order; an unknown model has none."""
        return sorted(int(entry) for entry in self._folders(self._root / name) if _VERSION.fullmatch(entry))

    def _folders(self, parent: Path) -> list[str]:
        with storage_failures("The model store could not be listed"):
            try:
                return [entry.name for entry in parent.iterdir() if entry.is_dir()]
            except (FileNotFoundError, NotADirectoryError):
                return []

    def read(self, name: str, version: int, file: str) -> bytes | None:
        """Read one file of a version, or None if it is not there."""
        return self._read(self._root / name / str(version) / file)

    def _read(self, path: Path) -> bytes | None:
        with storage_failures("The model store could not be read"):
            try:
                return path.read_bytes()
            except (FileNotFoundError, NotADirectoryError):
                return None

    def folder(self, name: str, version: int) -> Path:
        """Give the folder of an existing version."""
        return self._root / name / str(version)

    @contextmanager
    def stage(self, name: str, folder: Path, files: Sequence[str]) -> Iterator[Staging]:
        """Copy these files into a hidden folder of the model, on the disk and read-only."""
        model = self._root / name
        publishing = model / f"{_PUBLISHING}{uuid4().hex}"
        content = publishing / "content"
        with storage_failures(f"Model {name!r} could not be published"):
            model.mkdir(parents=True, exist_ok=True)
            sync_folder(self._root)
            with _kept_alive(model, publishing):
                content.mkdir()
                yield LocalStaging(model, content, _copy(folder, content, files))

    def prune(self, name: str) -> int:
        """Remove the hidden folders whose publisher no longer holds their lock; return how many there were."""
        model = self._root / name
        with storage_failures(f"What was left behind in model {name!r} could not be removed"):
            if not model.is_dir():
                return 0
            with _locked(model / _LOCK):
                abandoned = [folder for folder in model.glob(f"{_PUBLISHING}*") if _is_abandoned(folder)]
                for folder in abandoned:
                    shutil.rmtree(folder)
                return len(abandoned)

    def read_aliases(self, name: str) -> tuple[bytes, str] | None:
        """Read the aliases document; its etag is its SHA-256."""
        content = self._read(self._root / name / _ALIASES)
        return None if content is None else (content, hashlib.sha256(content).hexdigest())

    def write_aliases(self, name: str, content: bytes, etag: str | None) -> bool:
        """Replace the aliases document under the model's lock by a rename, unless it changed since `etag`."""
        model = self._root / name
        with storage_failures(f"The aliases of model {name!r} could not be written"), _locked(model / _LOCK):
            present = self.read_aliases(name)
            if etag != (present and present[1]):
                return False
            write_anew(model / _NEW_ALIASES, content, 0o644)
            (model / _NEW_ALIASES).replace(model / _ALIASES)
            sync_folder(model)
        return True


def _copy(folder: Path, content: Path, files: Sequence[str]) -> dict[str, FileRecord]:
    records: dict[str, FileRecord] = {}
    for file in files:
        target = content / file
        target.parent.mkdir(parents=True, exist_ok=True)
        records[file] = copy_hashed(folder / file, target)
    for inner in {parent for file in files for parent in (content / file).parents if parent.is_relative_to(content)}:
        sync_folder(inner)
    return records
