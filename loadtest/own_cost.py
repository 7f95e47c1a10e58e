"""The gateway's own cost: an idle server's latency beside what no gateway could do without."""

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from loadtest.connections import Address, Message
from loadtest.drivers import closed_loop, drive
from loadtest.messages import png, png_message
from loadtest.serving import Running, free_port, gateway, running
from model_store import Fetched
from service.correcting import CorrectingEngine
from service.engines import Engine, outputs_of
from service.engines.opening import open_source
from service.images import decode_pixels
from service.served import CORRECTION, GRAPH
from service.settings import Settings

WARM_UP_REQUESTS = 200
MAX_PIXELS = 25_000_000
ANSWERED = ("logits", "score", "alert", "purified")
"""What a gateway on loopback computes, as far as a version has it."""


class Cost(NamedTuple):
    """Milliseconds of a request or a call: the p50 by the clock, and the mean processor time."""

    p50: float
    cpu: float


@contextmanager
def echo() -> Iterator[Running]:
    """Run the bare server until the block ends."""
    port = free_port()
    with running([sys.executable, str(Path(__file__).with_name("echo.py")), str(port)], port, ready="/") as server:
        yield server


def own_cost(
    store: Path,
    versions: dict[str, Fetched],
    images: np.ndarray,
    *,
    requests: int,
    rounds: int,
    told: Callable[[str], None],
) -> dict[str, Any]:
    """Return the latencies of single requests to the gateway, one at a time, and those of their parts.

    ``versions`` are by what they are called. For each: the gateway's p50 in milliseconds, those of decoding and of the
    engine in this process, its correction of what it alerts included, that of a bare uvicorn that answers a fixed text,
    and ``ratio``, the first over the sum of the others; medians of the rounds, in which all take turns. The same of the
    processor's time, as means over the requests, with ``cpu_ratio``; and of the ``stages`` as the gateway timed them.
    """
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in versions}
    stages: dict[str, list[dict[str, float]]] = {name: [] for name in versions}
    for number in range(rounds):
        told(f"round {number + 1} of {rounds}: the gateway's own cost")
        with echo() as server:
            least = _alone(server, [png_message(image, "/") for image in images], requests)
        for name, fetched in versions.items():
            manifest = fetched.manifest
            path = f"/v1/models/{manifest.name}/predict"
            with gateway(store, models=f"{manifest.name}@{manifest.version}", threads=1) as server:
                whole = _alone(server, [png_message(image, path) for image in images], requests)
                stages[name].append(stage_means(httpx.get(f"{server.url}/metrics").text))
            rows[name].append(_row(whole, least, *_parts(fetched, images)))
    return {
        name: {
            **_medians(measured),
            "ratios": [row["ratio"] for row in measured],
            "stages": _medians(stages[name]),
        }
        for name, measured in rows.items()
    }


def _medians(measured: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(row[key] for row in measured) for key in measured[0]}


def _row(whole: Cost, least: Cost, decoding: Cost, engine: Cost) -> dict[str, float]:
    parts = (least, decoding, engine)
    return {
        "gateway_p50": whole.p50,
        "echo_p50": least.p50,
        "decode": decoding.p50,
        "engine": engine.p50,
        "ratio": whole.p50 / sum(part.p50 for part in parts),
        "gateway_cpu_milliseconds": whole.cpu,
        "echo_cpu_milliseconds": least.cpu,
        "decode_cpu_milliseconds": decoding.cpu,
        "engine_cpu_milliseconds": engine.cpu,
        "cpu_ratio": whole.cpu / sum(part.cpu for part in parts),
    }


def stage_means(exposition: str) -> dict[str, float]:
    """Return what each stage took, by what a gateway told Prometheus: means in milliseconds by the stage's name."""
    (family,) = (
        family for family in text_string_to_metric_families(exposition) if family.name == "portcullis_stage_seconds"
    )
    values = {(sample.name.rpartition("_")[2], sample.labels["stage"]): sample.value for sample in family.samples}
    counts = {stage: count for (kind, stage), count in values.items() if kind == "count" and count}
    return {stage: 1000 * values["sum", stage] / count for stage, count in counts.items()}


def _alone(server: Running, messages: list[Message], requests: int) -> Cost:
    """Return what one request at a time costs, of the server's processor time."""
    address = Address.of(server.url)
    drive(closed_loop(address, messages, concurrency=1, requests=WARM_UP_REQUESTS))
    before = server.cpu_seconds
    run = drive(closed_loop(address, messages, concurrency=1, requests=requests))
    return Cost(1000 * run.percentile(50), 1000 * (server.cpu_seconds - before) / requests)


def _parts(fetched: Fetched, images: np.ndarray) -> tuple[Cost, Cost]:
    """Return what decoding an image and what the engine costs, in turns as requests have it.

    The engine leaves little of the processor's caches to what is decoded next; decoded in a row, images take half.
    """
    engine, spec = engine_of(fetched), fetched.manifest.input
    encoded = [png(image) for image in images]
    times, used = [], []
    for repetition in range(3):
        for data in encoded:
            moments = [_now()]
            pixels = decode_pixels(data, spec, max_pixels=MAX_PIXELS)
            moments.append(_now())
            engine.run(pixels[None])
            moments.append(_now())
            if repetition:
                taken = np.diff(moments, axis=0)
                times.append(taken[:, 0])
                used.append(taken[:, 1])
    clocks, processor = 1000 * np.median(times, axis=0), 1000 * np.mean(used, axis=0)
    return Cost(clocks[0], processor[0]), Cost(clocks[1], processor[1])


def _now() -> tuple[float, float]:
    """Return the clock and the processor's time, in seconds."""
    return time.perf_counter(), time.process_time()


def engine_of(fetched: Fetched) -> Engine:
    """Open what a gateway on loopback, with one thread and no other setting, answers a version's images with.

    Raises ``GraphUnloadable``; the engine raises ``ValueError`` where a correction fails.
    """
    path = fetched.folder / GRAPH
    # Unlike Settings(), this does not read the environment, which the gateways that are measured are not given either.
    source = open_source(fetched, path, path.with_name(CORRECTION), Settings.model_construct(threads=1))
    present = outputs_of(path)
    outputs = [name for name in ANSWERED if name in present]
    if CORRECTION not in fetched.manifest.files:
        return source.open(tuple(outputs))

    def failed(images: int) -> None:
        name = f"{fetched.manifest.name}@{fetched.manifest.version}"
        raise ValueError(f"Expected {name} to correct what it alerts, but it failed on {images} images.")

    return CorrectingEngine(source, outputs, failed=failed)
