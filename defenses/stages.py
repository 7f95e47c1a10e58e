"""What each stage of a long job made, kept in a folder: a job that was killed goes on with the stage after."""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

logger = logging.getLogger(__name__)

_SUFFIX = ".safetensors"
_NEW = ".new"
_LONGEST_NAME = 200


class Kept(NamedTuple):
    """What a stage made: tensors on the CPU, contiguous, to the bit as they were, and values as JSON holds them."""

    tensors: dict[str, Tensor]
    values: dict[str, Any]


class StageNotKept(OSError):
    """The disk did not take what a stage made; `needed` and `free` are bytes, `errno` is the cause's, if it has one."""

    def __init__(self, stage: str, folder: Path, needed: int, free: int, cause: Exception) -> None:
        number = cause.errno if isinstance(cause, OSError) else _errno_in(str(cause))
        reason = os.strerror(number) if number else str(cause)
        self.message = (
            f"The stage {stage!r} could not be kept in {folder}: {reason}; it takes {needed / 2**20:.1f} MiB, and "
            f"{free / 2**20:.1f} MiB are free. The job resumes with this stage once there is room."
        )
        super().__init__(self.message)
        self.errno = number
        self.stage = stage
        self.folder = folder
        self.needed = needed
        self.free = free

    def __str__(self) -> str:
        return self.message


class Stages:
    """Keep what each stage of one job made, by the stage's name, in safetensors files of one folder.

    A stage is there whole or not at all, whatever kills the job or the machine. The folder is made when something is
    kept, and is one job's at a time.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def load(self, name: str) -> Kept | None:
        """Return what a stage made, or None where it is not kept.

        A file that is damaged counts as not kept: it is logged and removed.
        """
        path = self._path(name)
        try:
            with safe_open(path, framework="pt") as file:
                document = _document(file.metadata())
                # Copied out of the mapped file, into memory that is aligned as that of any other tensor.
                tensors = {key: file.get_tensor(key).clone() for key in document["tensors"]}
            if _digest(tensors) != document["sha256"]:
                raise ValueError("its tensors are not those that were kept")
        except FileNotFoundError:
            return None
        except (SafetensorError, LookupError, TypeError, ValueError) as error:
            logger.warning("The stage %r kept in %s is damaged (%s); it is dropped and done anew.", name, path, error)
            self.drop(name)
            return None
        return Kept(tensors, document["values"])

    def save(self, name: str, tensors: Mapping[str, Tensor], values: Mapping[str, Any] | None = None) -> None:
        """Keep what a stage made, in place of what it made before; on the disk when this returns.

        ``tensors`` may be of any dense layout and on any device, and may share memory; ``values`` are what JSON can
        hold, NaN and infinity included. Raises ``StageNotKept`` where the disk is full or does not take it, and leaves
        nothing behind then.
        """
        plain = _plain(tensors)
        document = {
            "stage": name,
            "values": dict(values or {}),
            "tensors": list(plain),
            "sha256": _digest(plain),
        }
        described = json.dumps(document)
        needed = len(described) + sum(tensor.nbytes for tensor in plain.values())
        path = self._path(name)
        try:
            with self._scratch() as scratch:
                save_file(plain, scratch / path.name, metadata={"stage": described})
                _sync(scratch / path.name, os.O_RDWR)
                (scratch / path.name).replace(path)
                _sync(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        except (OSError, SafetensorError) as error:
            raise StageNotKept(name, self.folder, needed, _free(self.folder), error) from error

    def drop(self, name: str) -> None:
        """Forget what a stage made; nothing happens where it is not kept."""
        self._path(name).unlink(missing_ok=True)

    def names(self) -> list[str]:
        """Return the names of the stages that are kept, in the order in which they were made."""
        if not self.folder.is_dir():
            return []
        found = [(path.stat().st_mtime_ns, path.name) for path in self.folder.glob(f"*{_SUFFIX}")]
        return [unquote(name.removesuffix(_SUFFIX)) for _, name in sorted(found)]

    def seconds(self, name: str) -> float | None:
        """Return how long a stage took, in seconds, where its values say so under ``seconds``."""
        try:
            with safe_open(self._path(name), framework="pt") as file:
                took = _document(file.metadata())["values"].get("seconds")
        except (FileNotFoundError, SafetensorError, LookupError, TypeError, ValueError):
            return None
        return float(took) if isinstance(took, int | float) else None

    def timed(self) -> dict[str, float]:
        """Return what each stage took in seconds, of those that say so, by name."""
        return {name: seconds for name in self.names() if (seconds := self.seconds(name)) is not None}

    def _path(self, name: str) -> Path:
        file = quote(name, safe=" :,=+()").replace(".", "%2E")
        if not name or len(file) > _LONGEST_NAME:
            raise ValueError(f"A stage's name has 1 to {_LONGEST_NAME} characters once it is quoted, got {name!r}.")
        return self.folder / f"{file}{_SUFFIX}"

    @contextmanager
    def _scratch(self) -> Iterator[Path]:
        """Yield an empty folder beside the stages; what a killed writer left there is cleared by the next."""
        scratch = self.folder / _NEW
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors on the CPU, contiguous, and each with memory of its own."""
    plain: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in tensors.items():
        dense = tensor.detach().cpu().contiguous()
        where = dense.untyped_storage().data_ptr()
        plain[name] = dense.clone() if where in taken else dense
        taken.add(where)
    return plain


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 over names, types, shapes and contents, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _document(metadata: dict[str, str] | None) -> dict[str, Any]:
    document = json.loads((metadata or {})["stage"])
    if not isinstance(document, dict):
        raise TypeError("its metadata is no JSON object")
    return document


def _errno_in(message: str) -> int | None:
    """Return the number of the operating system's error that safetensors tells in words."""
    found = re.search(r"\(os error (\d+)\)", message)
    return int(found[1]) if found else None


def _free(folder: Path) -> int:
    """Return the bytes free where a folder is, or is to be."""
    present = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    return shutil.disk_usage(present).free


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
