"""Servers one after the other, several times, under the same load by the same client."""

import asyncio
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import psutil

from loadtest.connections import Address, Connection, Message
from loadtest.contenders import Contender
from loadtest.drivers import FAILURES, closed_loop, drive
from loadtest.serving import Running, ServerEnded, ServerNotReady

WARM_UP_REQUESTS = 200
WARM_UP_SECONDS = 1.0
"""The warm-up ends with whichever is first."""

END_SECONDS = 1.0
"""How long a server that has failed is given to end: its connections break before its process is gone."""

Told = Callable[[str], None]


def race(
    loads: Mapping[Contender, Sequence[int]],
    images: np.ndarray,
    *,
    seconds: float,
    rounds: int,
    told: Told,
    called: str = "round",
) -> dict[str, Any]:
    """Measure each contender at each of its concurrencies for so long in every round, and return all that was measured.

    Each round begins with another contender. Returns ``runs``, one row each; ``failures``, the round and the reason by
    contender for those that failed, or by process for those that did not start; and ``overheads``, the seconds by
    process that starting, warming up and ending took beside the loads. Who failed is not tried again, and costs the
    others nothing. ``called`` is what a round is called.
    """
    groups: dict[str, list[Contender]] = defaultdict(list)
    for contender in loads:
        groups[contender.started].append(contender)
    runs: list[dict[str, Any]] = []
    failures: dict[str, str] = {}
    overheads: dict[str, list[float]] = defaultdict(list)
    for number in range(rounds):

        def failed(name: str, error: Exception, number: int = number) -> None:
            failures[name] = f"In {called} {number + 1} of {rounds}: {error}"
            told(f"{name}: {failures[name]}")

        order = list(groups.items())
        first = number * len(order) // rounds
        for process, group in order[first:] + order[:first]:
            left = deque(contender for contender in group if contender.name not in failures)
            if process in failures or not left:
                continue
            told(f"{called} {number + 1} of {rounds}: {process}")
            begun = perf_counter()
            rows = [{"round": number, **row} for row in _measured(left, images, loads, seconds, failed)]
            overheads[process].append(perf_counter() - begun - sum(row["seconds"] for row in rows))
            runs += rows
    return {
        "runs": runs,
        "failures": failures,
        "overheads": {process: median(values) for process, values in overheads.items()},
    }


class NoAnswer(RuntimeError):
    """A server is ready but does not answer an image; ``status`` is 0 where it gave no answer in HTTP."""

    def __init__(self, name: str, status: int, content: str) -> None:
        self.status = status
        told = f"answered an image with {status}" if status else "gave no answer to an image"
        super().__init__(f"{name} {told}: {content[:300]}")


def _measured(
    left: deque[Contender],
    images: np.ndarray,
    loads: Mapping[Contender, Sequence[int]],
    seconds: float,
    failed: Callable[[str, Exception], None],
) -> Iterator[dict[str, Any]]:
    """Yield the rows of contenders that share a process, which is started anew for the others where one ends it."""
    while left:
        process = left[0].started
        try:
            with left[0].open() as server:
                while left:
                    contender = left.popleft()
                    try:
                        yield from _rows(contender, server, images, loads[contender], seconds)
                    except (NoAnswer, ServerEnded) as error:
                        failed(contender.name, error)
                        if server.ends_within(END_SECONDS):
                            break
        except ServerNotReady as error:
            failed(process, error)
            return


def _rows(
    contender: Contender, server: Running, images: np.ndarray, concurrencies: Sequence[int], seconds: float
) -> Iterator[dict[str, Any]]:
    address = Address.of(server.url)
    messages = [contender.message(image) for image in images]
    _check(contender, address, messages[0])
    drive(closed_loop(address, messages, concurrency=16, seconds=WARM_UP_SECONDS, requests=WARM_UP_REQUESTS))
    for concurrency in concurrencies:
        yield {
            "server": contender.server,
            "setting": contender.setting,
            "raw": contender.raw,
            "concurrency": concurrency,
            **_under_load(server, address, messages, concurrency, seconds),
        }


def _under_load(
    server: Running, address: Address, messages: Sequence[Message], concurrency: int, seconds: float
) -> dict[str, Any]:
    client = psutil.Process()
    before, own = server.cpu_seconds, sum(client.cpu_times()[:2])
    run = drive(closed_loop(address, messages, concurrency=concurrency, seconds=seconds))
    requests = max(1, len(run.seconds))
    return {
        **run.summary(),
        "server_cpu_milliseconds": 1000 * (server.cpu_seconds - before) / requests,
        "client_cpu_milliseconds": 1000 * (sum(client.cpu_times()[:2]) - own) / requests,
        "memory_bytes": server.memory,
    }


def _check(contender: Contender, address: Address, message: Message) -> None:
    """Raise ``NoAnswer`` unless one image is answered."""

    async def ask() -> None:
        connection = await Connection.open(address)
        try:
            reply = await asyncio.wait_for(connection.ask(message.to(address)), 60)
        finally:
            connection.close()
        if reply.status != 200:
            raise NoAnswer(contender.setting, reply.status, reply.content.decode(errors="replace"))

    try:
        asyncio.run(ask())
    except FAILURES as error:
        raise NoAnswer(contender.setting, 0, str(error) or type(error).__name__) from error
