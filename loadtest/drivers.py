"""The two ways to load a server: so many clients that wait for their answers, or so many requests a second.

A closed loop slows down with its server and hides how long people would queue. An open loop does not: its requests have
their moments beforehand, and each latency counts from that moment, whether or not the request could be sent then.
"""

import asyncio
import itertools
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Literal

import httptools
import numpy as np
import uvloop

from loadtest.connections import Address, Message, Pool
from loadtest.runs import Run

Spacing = Literal["exponential", "even"]

TICK = 0.001
READ_EVERY = 64

COLUMNS = (float, float, int, float, bool, str)
"""The types of a run's columns: intended, seconds, statuses, late, waited, reasons."""

FAILURES = (OSError, TimeoutError, httptools.HttpParserError)
"""What a request can end in without an answer: no connection, none left, none in time, none that is HTTP."""


@dataclass
class _Record:
    """The columns of a run while it grows."""

    start: float = field(default_factory=perf_counter)
    rows: list[tuple[float, float, int, float, bool, str]] = field(default_factory=list)

    async def ask(self, pool: Pool, request: bytes, intended: float, answer_seconds: float) -> None:
        """Send one request and note its row."""
        late, waits, reason = perf_counter() - self.start - intended, pool.exhausted, ""
        try:
            async with asyncio.timeout(answer_seconds):
                status = (await pool.ask(request)).status
        except FAILURES as error:
            status, reason = 0, type(error).__name__
        self.rows.append((intended, perf_counter() - self.start - intended, status, late, waits, reason))

    def run(self, pool: Pool) -> Run:
        """Return what was noted, in the order of the requests."""
        duration = perf_counter() - self.start
        columns = zip(*sorted(self.rows), strict=True) if self.rows else [()] * len(COLUMNS)
        arrays = (np.array(column, kind) for column, kind in zip(columns, COLUMNS, strict=True))
        return Run(*arrays, duration, pool.reopened)


async def closed_loop(
    address: Address,
    messages: Sequence[Message],
    *,
    concurrency: int,
    seconds: float = float("inf"),
    requests: float = float("inf"),
    answer_seconds: float = 30.0,
) -> Run:
    """Keep so many requests in flight until the seconds are over or the requests are sent; each waits for its answer.

    The messages are sent in turns. Raises ``ValueError`` where neither end is given or nobody would ask.
    """
    if min(seconds, requests) == float("inf"):
        raise ValueError("Expected an end, in seconds or in requests, got neither.")
    if concurrency < 1:
        raise ValueError(f"Expected a concurrency of 1 or more, got {concurrency}.")
    pool, payloads = Pool(address, concurrency), _payloads(address, messages)
    record, numbers = _Record(), itertools.count()

    async def client() -> None:
        while (number := next(numbers)) < requests:
            now = perf_counter() - record.start
            if now >= seconds:
                return
            await record.ask(pool, payloads[number % len(payloads)], now, answer_seconds)

    try:
        await asyncio.gather(*(client() for _ in range(concurrency)))
    finally:
        pool.close()
    return record.run(pool)


async def open_loop(
    address: Address,
    messages: Sequence[Message],
    moments: np.ndarray,
    *,
    connections: int = 512,
    answer_seconds: float = 30.0,
) -> Run:
    """Send a request at each of the moments (N,), in seconds and ascending, and wait for the last answer.

    ``arrivals`` and ``in_stages`` give moments. At most so many connections are open; a request that finds none free
    waits for one, its latency counts from its moment all the same, and the run's ``waited`` tells of it. How late the
    client itself was is in the run's ``late``.
    """
    pool, payloads = Pool(address, connections), _payloads(address, messages)
    record, sent = _Record(), set[asyncio.Task[None]]()
    try:
        for number, moment in enumerate(moments.tolist()):
            if number % READ_EVERY == 0:
                await asyncio.sleep(0)  # a client that is behind must still read answers
            # The loop's clock ticks in milliseconds and may wake up to one too early.
            wait = moment - (perf_counter() - record.start)
            while wait > 0:
                await asyncio.sleep(max(wait, TICK))
                wait = moment - (perf_counter() - record.start)
            task = asyncio.create_task(record.ask(pool, payloads[number % len(payloads)], moment, answer_seconds))
            sent.add(task)
            task.add_done_callback(sent.discard)
        await asyncio.gather(*sent)
    finally:
        pool.close()
    return record.run(pool)


def arrivals(rate: float, seconds: float, spacing: Spacing, seed: int = 0) -> np.ndarray:
    """Return the moments (N,) in [0, seconds) at which requests of so many a second are to be sent, ascending.

    They are spaced ``even`` or as independent clients come, ``exponential``. Raises ``ValueError`` for a rate or a time
    that is not above 0.
    """
    if not (rate > 0 and seconds > 0):
        raise ValueError(f"Expected a rate and a time above 0, got {rate} per second for {seconds} s.")
    if spacing == "even":
        return np.arange(0, seconds, 1 / rate)
    # A Poisson process: how many come is random as well, and given that, the moments are uniform.
    generator = np.random.default_rng(seed)
    return np.sort(generator.uniform(0, seconds, generator.poisson(rate * seconds)))


def in_stages(stages: Sequence[tuple[float, float]], spacing: Spacing = "exponential", seed: int = 0) -> np.ndarray:
    """Return the moments (N,) of stages one right after the other, each a rate per second and its seconds.

    Raises ``ValueError`` as ``arrivals`` does, and where there is no stage.
    """
    if not stages:
        raise ValueError("Expected a stage, a rate and its seconds, got none.")
    parts, begun = [], 0.0
    for number, (rate, seconds) in enumerate(stages):
        parts.append(begun + arrivals(rate, seconds, spacing, seed + number))
        begun += seconds
    return np.concatenate(parts)


def drive(run: Coroutine[Any, Any, Run]) -> Run:
    """Wait for a run on an event loop of its own."""
    return uvloop.run(run)


def _payloads(address: Address, messages: Sequence[Message]) -> list[bytes]:
    if not messages:
        raise ValueError("Expected a message to send, got none.")
    return [message.to(address) for message in messages]
