"""How much memory a server holds while something else goes on."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Protocol

from loadtest.serving import ServerEnded


class Watched(Protocol):
    """What tells how many bytes it holds; raises ``ServerEnded`` where it is gone."""

    @property
    def memory(self) -> int:
        """The bytes held now."""


@dataclass
class Held:
    """What a server held, as (seconds since the start, bytes), and how it ended where it did."""

    samples: list[tuple[float, int]] = field(default_factory=list)
    ended: ServerEnded | None = None

    def most(self, until: float = float("inf")) -> int:
        """Return the most bytes that were held before a second, 0 where none were noted."""
        return max((held for second, held in self.samples if second < until), default=0)


@contextmanager
def memory_over_time(server: Watched, every: float = 1.0) -> Iterator[Held]:
    """Note what a server holds until the block ends, first and last included, or until it is gone."""
    start, over, held = perf_counter(), threading.Event(), Held()

    def note() -> None:
        if held.ended is not None:
            return
        try:
            held.samples.append((perf_counter() - start, server.memory))
        except ServerEnded as error:
            held.ended = error

    def watch() -> None:
        while not over.wait(every):
            note()

    note()
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield held
    finally:
        over.set()
        thread.join()
    note()
