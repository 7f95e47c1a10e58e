"""Servers one after the other, several times, under the same load by the same client."""

import asyncio
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np
import psutil

from loadtest.connections import Address, Connection, Message
from loadtest.contenders import Contender
from loadtest.drivers import FAILURES, closed_loop, drive
from loadtest.serving import Running, ServerEnded, ServerNotReady

WARM_UP_REQUESTS = 200
END_SECONDS = 1.0
"""How long a server that has failed is given to end: its connections break before its process is gone."""

Told = Callable[[str], None]


def race(
    contenders: Sequence[Contender],
    images: np.ndarray,
    *,
    concurrencies: Sequence[int],
    seconds: float,
    rounds: int,
    told: Told,
) -> dict[str, Any]:
    """Measure each contender at each concurrency for so long in every round, and return all that was measured.

    Each round begins with another contender. Returns ``runs``, one row each, and ``failures``, the round and the reason
    by contender for those that failed, or by process for those that did not start; who failed is not tried again, and
    costs the others nothing.
    """
    groups: dict[str, list[Contender]] = defaultdict(list)
    for contender in contenders:
        groups[_process(contender)].append(contender)
    runs: list[dict[str, Any]] = []
    failures: dict[str, str] = {}
    for number in range(rounds):

        def failed(name: str, error: Exception, number: int = number) -> None:
            failures[name] = f"In round {number + 1} of {rounds}: {error}"
            told(f"{name}: {failures[name]}")

        order = list(groups.items())
        first = number * len(order) // rounds
        for process, group in order[first:] + order[:first]:
            left = deque(contender for contender in group if _name(contender) not in failures)
            if process in failures or not left:
                continue
            told(f"round {number + 1} of {rounds}: {process}")
            runs += [{"round": number, **row} for row in _measured(left, images, concurrencies, seconds, failed)]
    return {"runs": runs, "failures": failures}


def _process(contender: Contender) -> str:
    return f"{contender.server}, {contender.process}"


def _name(contender: Contender) -> str:
    return f"{contender.server}, {contender.setting}"


class NoAnswer(RuntimeError):
    """A server is ready but does not answer an image; ``status`` is 0 where it gave no answer in HTTP."""

    def __init__(self, name: str, status: int, content: str) -> None:
        self.status = status
        told = f"answered an image with {status}" if status else "gave no answer to an image"
        super().__init__(f"{name} {told}: {content[:300]}")


def _measured(
    left: deque[Contender],
    images: np.ndarray,
    concurrencies: Sequence[int],
    seconds: float,
    failed: Callable[[str, Exception], None],
) -> Iterator[dict[str, Any]]:
    """Yield the rows of contenders that share a process, which is started anew for the others where one ends it."""
    while left:
        process = _process(left[0])
        try:
            with left[0].open() as server:
                while left:
                    contender = left.popleft()
                    try:
                        yield from _rows(contender, server, images, concurrencies, seconds)
                    except (NoAnswer, ServerEnded) as error:
                        failed(_name(contender), error)
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
    drive(closed_loop(address, messages, concurrency=16, requests=WARM_UP_REQUESTS))
    for concurrency in concurrencies:
        yield {
            "server": contender.server,
            "setting": contender.setting,
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


def best_settings(runs: Sequence[Mapping[str, Any]], rounds: int) -> list[dict[str, Any]]:
    """Return for each server and concurrency its setting with the highest median rate.

    Only settings without an error count, that were measured in every round. Each row holds the medians over the rounds
    of the rate and the latencies, and the rates of the rounds.
    """
    groups: dict[tuple[str, int, str], list[Mapping[str, Any]]] = defaultdict(list)
    for run in runs:
        groups[run["server"], run["concurrency"], run["setting"]].append(run)
    best: dict[tuple[str, int], dict[str, Any]] = {}
    for (server, concurrency, setting), rows in groups.items():
        if len(rows) < rounds or any(set(row["statuses"]) != {"200"} or row["failures"] for row in rows):
            continue
        row = {
            "server": server,
            "concurrency": concurrency,
            "setting": setting,
            "per_second": median(row["per_second"] for row in rows),
            "rounds": [row["per_second"] for row in rows],
            **{name: median(row["milliseconds"][name] for row in rows) for name in ("p50", "p90", "p99", "max")},
            "server_cpu_milliseconds": median(row["server_cpu_milliseconds"] for row in rows),
        }
        if row["per_second"] > best.get((server, concurrency), {"per_second": 0})["per_second"]:
            best[server, concurrency] = row
    return list(best.values())


def ratios(best: Sequence[Mapping[str, Any]], own: Sequence[str]) -> list[dict[str, Any]]:
    """Return for each own server and each other one, by concurrency, the ratio of their best rates.

    ``least`` and ``most`` are the ratios of single rounds. ``lower_p99`` says whether the own server's is lower.
    """
    table = {(row["server"], row["concurrency"]): row for row in best}
    compared = []
    for (server, concurrency), row in table.items():
        for (other, at), rival in table.items():
            if server not in own or other in own or at != concurrency:
                continue
            by_round = [mine / theirs for mine, theirs in zip(row["rounds"], rival["rounds"], strict=True)]
            compared.append(
                {
                    "server": server,
                    "against": other,
                    "concurrency": concurrency,
                    "ratio": row["per_second"] / rival["per_second"],
                    "least": min(by_round),
                    "most": max(by_round),
                    "p99_ratio": row["p99"] / rival["p99"],
                    "lower_p99": row["p99"] < rival["p99"],
                }
            )
    return compared
