"""How much memory a server holds while something else goes on."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Protocol

import psutil


class Watched(Protocol):
    """What tells how many bytes it holds."""

    @property
    def memory(self) -> int:
        """The bytes held now."""


@contextmanager
def memory_over_time(server: Watched, every: float = 1.0) -> Iterator[list[tuple[float, int]]]:
    """Note what a server holds until the block ends, as (seconds since the start, bytes); first and last included."""
    start, ended = perf_counter(), threading.Event()
    samples: list[tuple[float, int]] = []

    def note() -> None:
        samples.append((perf_counter() - start, server.memory))

    def watch() -> None:
        while not ended.wait(every):
            try:
                note()
            except psutil.NoSuchProcess:
                return

    note()
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        ended.set()
        thread.join()
    note()
