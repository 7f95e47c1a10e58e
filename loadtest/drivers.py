"""The two ways to load a server: so many clients that wait for their answers, or so many requests a second.

A closed loop slows down with its server and hides how long people would queue. An open loop does not: its requests have
their moments beforehand, and each latency counts from that moment, whether or not the request could be sent then.
"""

import asyncio
import itertools
from collections import Counter
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

FAILURES = (OSError, TimeoutError, httptools.HttpParserError)
"""What a request can end in without an answer: no connection, none left, none in time, none that is HTTP."""


@dataclass
class _Record:
    """The columns of a run while it grows."""

    start: float = field(default_factory=perf_counter)
    rows: list[tuple[float, float, int, float]] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)

    async def ask(self, pool: Pool, request: bytes, intended: float, answer_seconds: float) -> None:
        """Send one request and note its row."""
        late = perf_counter() - self.start - intended
        try:
            async with asyncio.timeout(answer_seconds):
                status = (await pool.ask(request)).status
        except FAILURES as error:
            self.failures[type(error).__name__] += 1
            status = 0
        self.rows.append((intended, perf_counter() - self.start - intended, status, late))

    def run(self, pool: Pool) -> Run:
        """Return what was noted, in the order of the requests."""
        duration = perf_counter() - self.start
        columns = np.array(sorted(self.rows), dtype=float).reshape(-1, 4).T
        return Run(columns[0], columns[1], columns[2].astype(int), columns[3], self.failures, duration, pool.reopened)


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
    *,
    rate: float,
    seconds: float,
    spacing: Spacing = "exponential",
    connections: int = 512,
    answer_seconds: float = 30.0,
    seed: int = 0,
) -> Run:
    """Send so many requests a second for so long, at moments fixed beforehand, and wait for the last answer.

    Moments are spaced ``even`` or as independent clients come, ``exponential``. At most so many connections are open; a
    request that finds none free waits for one, and its latency counts from its moment all the same. How late the client
    itself was is in the run's ``late``. Raises ``ValueError`` for a rate or a time that is not above 0.
    """
    moments = arrivals(rate, seconds, spacing, seed)
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
    """Return the moments (N,) in [0, seconds) at which requests of so many a second are to be sent, ascending."""
    if not (rate > 0 and seconds > 0):
        raise ValueError(f"Expected a rate and a time above 0, got {rate} per second for {seconds} s.")
    if spacing == "even":
        return np.arange(0, seconds, 1 / rate)
    # A Poisson process: how many come is random as well, and given that, the moments are uniform.
    generator = np.random.default_rng(seed)
    return np.sort(generator.uniform(0, seconds, generator.poisson(rate * seconds)))


def drive(run: Coroutine[Any, Any, Run]) -> Run:
    """Wait for a run on an event loop of its own."""
    return uvloop.run(run)


def _payloads(address: Address, messages: Sequence[Message]) -> list[bytes]:
    if not messages:
        raise ValueError("Expected a message to send, got none.")
    return [message.to(address) for message in messages]
