"""Servers one after the other, several times, under the same load by the same client."""

import asyncio
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from statistics import median
from typing import Any

import numpy as np
import psutil

from loadtest.connections import Address, Connection, Message
from loadtest.contenders import Contender
from loadtest.drivers import closed_loop, drive
from loadtest.serving import Running, ServerNotReady

WARM_UP_REQUESTS = 200

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

    Each round begins with another contender. Returns ``runs``, one row each, and ``failures``, the reason by contender
    for those that did not start or did not answer; a contender that failed is not tried again.
    """
    groups: dict[tuple[str, str], list[Contender]] = defaultdict(list)
    for contender in contenders:
        groups[contender.server, contender.process].append(contender)
    runs: list[dict[str, Any]] = []
    failures: dict[str, str] = {}
    for number in range(rounds):
        order = list(groups.values())
        first = number * len(order) // rounds
        for group in order[first:] + order[:first]:
            name = f"{group[0].server}, {group[0].process}"
            if name in failures:
                continue
            told(f"round {number + 1} of {rounds}: {name}")
            try:
                runs += [{"round": number, **row} for row in _measured(group, images, concurrencies, seconds)]
            except (ServerNotReady, NoAnswer) as error:
                failures[name] = str(error)
                told(str(error))
    return {"runs": runs, "failures": failures}


class NoAnswer(RuntimeError):
    """A server is ready but does not answer an image."""

    def __init__(self, name: str, status: int, content: bytes) -> None:
        self.status = status
        super().__init__(f"{name} answered an image with {status}: {content[:300].decode(errors='replace')}")


def _measured(
    group: Sequence[Contender], images: np.ndarray, concurrencies: Sequence[int], seconds: float
) -> list[dict[str, Any]]:
    rows = []
    with ExitStack() as stack:
        server = stack.enter_context(group[0].open())
        address = Address.of(server.url)
        for contender in group:
            messages = [contender.message(image) for image in images]
            _check(contender, address, messages[0])
            drive(closed_loop(address, messages, concurrency=16, requests=WARM_UP_REQUESTS))
            rows += [
                {
                    "server": contender.server,
                    "setting": contender.setting,
                    "concurrency": concurrency,
                    **_under_load(server, address, messages, concurrency, seconds),
                }
                for concurrency in concurrencies
            ]
    return rows


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
            raise NoAnswer(contender.setting, reply.status, reply.content)

    try:
        asyncio.run(ask())
    except (OSError, TimeoutError) as error:
        raise NoAnswer(contender.setting, 0, str(error).encode()) from error


def best_settings(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return for each server and concurrency its setting with the highest median rate among those without an error.

    Each row holds the medians over the rounds of the rate and the latencies, and the rates of the rounds.
    """
    groups: dict[tuple[str, int, str], list[Mapping[str, Any]]] = defaultdict(list)
    for run in runs:
        groups[run["server"], run["concurrency"], run["setting"]].append(run)
    best: dict[tuple[str, int], dict[str, Any]] = {}
    for (server, concurrency, setting), rows in groups.items():
        if any(set(row["statuses"]) != {"200"} or row["failures"] for row in rows):
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
            by_round = [mine / theirs for mine, theirs in zip(row["rounds"], rival["rounds"], strict=False)]
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
