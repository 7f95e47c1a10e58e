"""How a fit ends that cannot go on: out of memory, on a full disk, or stopped by a signal."""

import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EDQUOT, EFBIG, ENOSPC
from types import FrameType

import typer

from service.resources import MemoryTooSmall

_FULL = {ENOSPC, EDQUOT, EFBIG}
_OUT_OF_MEMORY = re.compile(
    r"out of memory|not enough memory|can't allocate memory|cannot allocate memory|failed to allocate memory"
    r"|bad_alloc|bad allocation|STATUS_ALLOC_FAILED",
    re.IGNORECASE,
)
_OS_ERROR = re.compile(r"\(os error (\d+)\)")

_PLACE_IN_TORCH = re.compile(r"^\[enforce fail at \S+\] [^.]*\. ")

_AGAIN = "What was finished is kept: run the same command again to go on"


class MemoryExhausted(MemoryError):
    """A fit ran out of memory; what it finished is kept."""

    def __init__(self, cause: Exception) -> None:
        first = next(iter(str(cause).strip().splitlines()), type(cause).__name__)
        super().__init__(
            f"The fit ran out of memory: {_PLACE_IN_TORCH.sub('', first).rstrip('.')}. No defense was published. "
            f"{_AGAIN} once more is free; a smaller --batch-size, or fewer --examples or --candidates, need less, but "
            "begin another fit."
        )


class DiskExhausted(OSError):
    """A fit filled the disk; what it finished is kept."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(
            f"The disk is full: {str(cause).rstrip('.')}. No defense was published. {_AGAIN} once there is room."
        )


class _Stopped(BaseException):
    """A signal asked the command to stop; no library takes it for an error of its own."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def exhaustion_told() -> Iterator[None]:
    """Raise ``MemoryExhausted`` or ``DiskExhausted`` for what Python and the libraries raise in these two cases."""
    try:
        yield
    except MemoryTooSmall:  # said before anything began
        raise
    except Exception as error:
        if is_disk_full(error):
            raise DiskExhausted(error) from error
        if is_out_of_memory(error):
            raise MemoryExhausted(error) from error
        raise


def is_disk_full(error: Exception) -> bool:
    """Say whether an error tells that a disk is full, a quota used up, or a file as large as it may become."""
    told = _OS_ERROR.search(str(error))  # how safetensors tells it
    number = error.errno if isinstance(error, OSError) else int(told[1]) if told else None
    return number in _FULL


def is_out_of_memory(error: Exception) -> bool:
    """Say whether an error tells that memory ran out: Python's own kind, or a RuntimeError of torch or ONNX Runtime."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error)) is not None
    )


@contextmanager
def interruptions_told() -> Iterator[None]:
    """End the command on Ctrl-C with exit status 130 and on SIGTERM with 143, and say how to go on.

    What is under way is unwound first, so that locks are given back and nothing half-written is left.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise _Stopped(number)

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, stop) for number in numbers]
    try:
        yield
    except _Stopped as stopped:
        name = signal.Signals(stopped.number).name
        typer.echo(f"portcullis: Stopped by {name}. {_AGAIN}.", err=True)
        raise typer.Exit(128 + stopped.number) from stopped
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
