"""Load a gateway to its capacity and beyond: `python -m loadtest.overload NAME --store ... --images ...`.

Four acts on one gateway: the capacity, 80 % of it at a fixed rate, 150 % of it, and without a pause 80 % again while it
recovers. The capacity is what is answered of as many requests a second as a closed loop brings about: its own come in
step, which is easier than what comes as it likes. Latencies count from when a request was to be sent, and no request
may have to wait for a connection of the client's own. Prints JSON with a verdict on each limit and exits 1 where one is
broken.
"""

import json
import math
import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from loadtest.connections import Address, Message
from loadtest.drivers import arrivals, closed_loop, drive, in_stages, open_loop
from loadtest.image_sets import ImageSet, traffic
from loadtest.messages import Body
from loadtest.runs import OK, TOO_MANY, Run
from loadtest.serving import Running, gateway
from loadtest.watching import memory_over_time
from model_store import parse_reference
from service.cli.common import failures_told
from service.settings import Settings

TAIL = 5.0
"""How many times p50 p99 may be at 80 %."""
SLOWER = 2.0
"""How many times the p99 at 80 % the accepted requests' may be at 150 %, and after the recovery."""
RECOVERY_SECONDS = 5.0
GROWTH = 1.25
"""How many times the memory held before the overload may be held during it."""
WARM_UP_SECONDS = 3.0
CLOSED_SECONDS = 10.0
WINDOW_SECONDS = 5.0
"""The capacity is the least that such a part of its act showed: what a machine that is shared can be relied on for."""
ROOM = 1024
"""Connections beside those of images that wait: for what is computed, decoded, read and refused meanwhile."""
OTHER_FILES = 256
"""Open files that are no connection, of the client or the gateway."""


@dataclass(frozen=True)
class Acts:
    """What each act showed; memory in bytes, the most while it lasted, and how the server ended where it did."""

    capacity: Run
    steady: Run
    over: Run
    recovery: Run
    steady_memory: int
    over_memory: int
    ended: str | None = None


def main(
    name: Annotated[str, typer.Argument(help="The model, as NAME or NAME@VERSION.")],
    images: Annotated[Path, typer.Option(help="The images, from python -m loadtest.image_sets.")],
    store: Annotated[Path, typer.Option(help="Folder of the model store.")] = Path("var/demo/store"),
    body: Annotated[Body, typer.Option(help="How an image is sent.")] = "png",
    share: Annotated[float, typer.Option(help="The share of adversarial images.", min=0, max=1)] = 0.0,
    capacity_seconds: Annotated[
        float, typer.Option(help="How long the capacity is measured in an open loop.", min=0.5)
    ] = 20,
    concurrency: Annotated[int, typer.Option(help="Requests in flight in the closed loop before.", min=1)] = 64,
    steady_seconds: Annotated[float, typer.Option(help="How long 80 % last.", min=0.5)] = 300,
    over_seconds: Annotated[float, typer.Option(help="How long 150 % last.", min=0.5)] = 60,
    recovery_seconds: Annotated[float, typer.Option(help="How long the recovery is watched.", min=1)] = 20,
    setting: Annotated[list[str] | None, typer.Option(help="A setting of the gateway, as name=value.")] = None,
) -> None:
    """Run the acts and print what they showed."""
    with failures_told():
        model, _ = parse_reference(name)
        messages = traffic(ImageSet.read(images), share, model, body)
        settings = settings_of(setting or [])
        connections = connections_for(settings)
        allow_open_files(connections + OTHER_FILES)
        with gateway(store, models=name, **settings) as server:
            acts = play(
                server,
                messages,
                concurrency=concurrency,
                connections=connections,
                seconds=(capacity_seconds, steady_seconds, over_seconds, recovery_seconds),
                told=partial(typer.echo, err=True),
            )
    verdicts = judge(acts)
    result = {
        "command": " ".join(["python -m loadtest.overload", *sys.argv[1:]]),
        "settings": settings,
        "connections": connections,
        "ended": acts.ended,
        "capacity_per_second": least_rate(acts.capacity, capacity_seconds),
        "acts": {name: getattr(acts, name).summary() for name in ("capacity", "steady", "over", "recovery")},
        "recovered_after_seconds": recovered_after(acts.recovery, SLOWER * acts.steady.percentile(99)),
        "memory_bytes": {"steady": acts.steady_memory, "over": acts.over_memory},
        "verdicts": verdicts,
        "passed": all(verdict["passed"] for verdict in verdicts),
    }
    typer.echo(json.dumps(result, indent=1))
    raise typer.Exit(0 if result["passed"] else 1)


def settings_of(given: Sequence[str]) -> dict[str, str]:
    """Return settings by name; raises ``ValueError`` for one that is not ``name=value``."""
    parts = [text.partition("=") for text in given]
    for name, sign, value in parts:
        if not (name and sign):
            raise ValueError(f"Expected a setting as name=value, got {name + sign + value!r}.")
    return {name: value for name, _, value in parts}


def connections_for(settings: Mapping[str, str]) -> int:
    """Return how many connections keep a gateway's queue full without a request that waits for one of them.

    Raises ``ValueError`` for a queue that is no number of images.
    """
    queue = settings.get("queue_images", Settings.model_fields["queue_images"].default)
    try:
        return int(queue) + ROOM
    except ValueError as error:
        raise ValueError(f"Expected queue_images as a whole number, got {queue!r}.") from error


def allow_open_files(count: int) -> None:
    """Let this process, and those that it starts from now on, hold so many files open.

    Raises ``ValueError`` where the system allows fewer.
    """
    soft, hard = (math.inf if limit == resource.RLIM_INFINITY else limit for limit in _open_files())
    if hard < count:
        raise ValueError(f"Expected to be allowed {count} open files, one a connection, but {hard:.0f} is the limit.")
    if soft < count:
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, _open_files()[1]))


def _open_files() -> tuple[int, int]:
    return resource.getrlimit(resource.RLIMIT_NOFILE)


def play(
    server: Running,
    messages: Sequence[Message],
    *,
    concurrency: int,
    connections: int,
    seconds: tuple[float, float, float, float],
    told: Callable[[str], None],
) -> Acts:
    """Play the acts, each for its seconds; the rates follow from the first, at most so many connections are open.

    The last two are one run, so that the recovery begins with what waits then. Raises ``ValueError`` where the capacity
    is none.
    """
    address = Address.of(server.url)
    drive(closed_loop(address, messages, concurrency=concurrency, seconds=min(WARM_UP_SECONDS, seconds[0])))
    capacity = _capacity(address, messages, concurrency, connections, seconds[0])
    least = least_rate(capacity, seconds[0])
    if least == 0:
        got = f"{capacity.summary()['statuses']}, with {WINDOW_SECONDS:g} s of none"
        raise ValueError(f"Expected answers with 200 all the time to measure a capacity, got {got}.")
    told(f"capacity: {least:.0f} requests per second")
    below, above = 0.8 * least, 1.5 * least
    _, steady_for, over_for, recovery_for = seconds
    told(f"80 % for {steady_for:g} s")
    with memory_over_time(server, min(1.0, steady_for / 4)) as steady_held:
        steady = drive(
            open_loop(address, messages, arrivals(below, steady_for, "exponential"), connections=connections)
        )
    told(f"150 % for {over_for:g} s, then 80 % for {recovery_for:g} s")
    moments = in_stages([(above, over_for), (below, recovery_for)])
    with memory_over_time(server, min(1.0, over_for / 4)) as over_held:
        both = drive(open_loop(address, messages, moments, connections=connections))
    ended = steady_held.ended or over_held.ended
    return Acts(
        capacity,
        steady,
        both.between(0, over_for),
        both.between(over_for),
        steady_held.most(),
        over_held.most(until=over_for),
        None if ended is None else str(ended),
    )


def _capacity(address: Address, messages: Sequence[Message], concurrency: int, connections: int, seconds: float) -> Run:
    """Return an open loop at the rate that a closed one brings about; the closed one where that is none."""
    in_step = drive(closed_loop(address, messages, concurrency=concurrency, seconds=min(CLOSED_SECONDS, seconds)))
    if not in_step.rate:
        return in_step
    return drive(open_loop(address, messages, arrivals(in_step.rate, seconds, "exponential"), connections=connections))


def least_rate(run: Run, seconds: float) -> float:
    """Return the least answers with 200 a second that a window of so long a run showed, or a shorter run in all."""
    windows = int(seconds // WINDOW_SECONDS)
    if windows < 1:
        return run.rate
    starts = [number * WINDOW_SECONDS for number in range(windows)]
    parts = (run.between(start, start + WINDOW_SECONDS) for start in starts)
    return min(float((part.statuses == OK).sum()) / WINDOW_SECONDS for part in parts)


def judge(acts: Acts) -> list[dict[str, Any]]:
    """Return a verdict on each limit: what is expected, what was measured, and whether it passed."""
    steady, over = acts.steady, acts.over
    limit = SLOWER * steady.percentile(99)
    recovered = recovered_after(acts.recovery, limit)
    growth = acts.over_memory / acts.steady_memory if acts.steady_memory else math.inf
    tail = steady.percentile(99) / steady.percentile(50)
    slower = over.percentile(99) / steady.percentile(99)
    refused = int((over.statuses == TOO_MANY).sum())
    waited = sum(int(run.waited.sum()) for run in (steady, over, acts.recovery))
    return [
        _verdict("the gateway runs to the end", None, acts.ended is None),
        _verdict("no request waits for a connection of the client", waited, waited == 0),
        _verdict("at 80 % every answer is 200", steady.errors, steady.errors == 0 and len(steady.seconds) > 0),
        _verdict(f"at 80 % p99 is under {TAIL:g} times p50", tail, tail < TAIL),
        _verdict("at 150 % requests are refused with 429", refused, refused > 0),
        _verdict("at 150 % every other answer is 200", over.errors - refused, over.errors == refused and over.rate > 0),
        _verdict(f"at 150 % accepted requests' p99 is within {SLOWER:g} times that at 80 %", slower, slower <= SLOWER),
        _verdict(f"at 150 % memory is within {GROWTH:g} times that at 80 %", growth, growth <= GROWTH),
        _verdict(
            f"within {RECOVERY_SECONDS:g} s all is as at 80 % again",
            recovered,
            recovered is not None and recovered <= RECOVERY_SECONDS,
        ),
    ]


def recovered_after(run: Run, limit: float) -> float | None:
    """Return the second from which every further second had answers of 200 alone and a p99 within ``limit`` seconds.

    None where the last second was not so.
    """
    seconds = range(int(run.intended.max()) + 1 if len(run.intended) else 0)
    bad = [second for second in seconds if not _well(run, second, limit)]
    if not len(seconds) or (bad and bad[-1] == seconds[-1]):
        return None
    return float(bad[-1] + 1) if bad else 0.0


def _well(run: Run, second: int, limit: float) -> bool:
    part = run.between(second, second + 1)
    return not len(part.seconds) or (part.errors == 0 and part.percentile(99) <= limit)


def _verdict(expected: str, measured: float | None, passed: bool) -> dict[str, Any]:
    finite = measured is not None and math.isfinite(measured)
    return {"expected": expected, "measured": measured if finite else None, "passed": bool(passed)}


if __name__ == "__main__":
    typer.run(main)
