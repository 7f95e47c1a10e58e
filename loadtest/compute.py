"""The protected pipeline's computation beside the bare classifier's, in turns in one process."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np

from loadtest.ceiling import Ceiling, measure_ceiling
from loadtest.cost import costs, total, weight_bytes
from model_store import Fetched
from service.engines import OnnxEngine, outputs_of, pruned
from service.served import CORRECTION, GRAPH

BATCHES = (1, 4, 8, 16, 32)
ANSWERED = ("logits", "score", "alert")
"""What is asked of a protected graph, as far as it is there."""

WARM_UPS = 3
MARGIN = 1.1
"""How much longer than its multiply-adds alone would have it a graph may take."""


def computation(
    protected: Fetched, bare: Fetched, *, turns: int, threads: int = 1, batches: tuple[int, ...] = BATCHES
) -> dict[str, Any]:
    """Return what a protected version and the classifier it was fitted for cost: counted, measured, and their ratios.

    The version's graph is `protected`, what of it makes the purified image `purifier`; where it corrects what it
    alerts, its second graph is `corrected`. Times are medians of turns in milliseconds of a batch, by the clock and by
    the processor's time, which other programs disturb less. Compared is the processor's time in one thread and the
    clock's in several. `allowed` is the ratio of the multiply-adds, a row's `limit` `MARGIN` times it.
    """
    graphs = {"bare": bare.folder / GRAPH, "protected": protected.folder / GRAPH}
    if CORRECTION in protected.manifest.files:
        graphs["corrected"] = protected.folder / CORRECTION
    present = outputs_of(graphs["protected"])
    outputs = {
        "bare": ["logits"],
        "protected": [name for name in ANSWERED if name in present],
        "corrected": ["logits"],
        "purifier": ["purified"],
    }
    if "purified" in present:
        graphs["purifier"] = graphs["protected"]
    counted = {name: costs(pruned(path, outputs[name])) for name, path in graphs.items()}
    engines = {name: OnnxEngine(path, outputs[name], threads=threads) for name, path in graphs.items()}
    shape, classes = protected.manifest.input.shape, len(protected.manifest.labels)
    ceiling = measure_ceiling(threads)
    work = {name: total(parts).multiply_adds for name, parts in counted.items()}
    allowed = {name: count / work["bare"] for name, count in work.items() if name != "bare"}
    compared = "cpu_milliseconds" if threads == 1 else "milliseconds"
    measured = {batch: _medians(engines, _inputs(list(engines), (batch, *shape), classes), turns) for batch in batches}
    return {
        "version": f"{protected.manifest.name}@{protected.manifest.version}",
        "kind": protected.manifest.kind,
        "threads": threads,
        "compared": compared,
        "ceiling": asdict(ceiling),
        "parts": {name: {part: asdict(cost) for part, cost in parts.items()} for name, parts in counted.items()},
        "multiply_adds": work,
        "weight_bytes": {name: weight_bytes(path) for name, path in graphs.items()},
        "allowed": allowed,
        "batches": {
            str(batch): with_ratios(
                times, compared, allowed, {name: _floor(parts, ceiling, batch) for name, parts in counted.items()}
            )
            for batch, times in measured.items()
        },
    }


def _inputs(names: list[str], shape: tuple[int, ...], classes: int) -> dict[str, dict[str, np.ndarray]]:
    images = np.random.default_rng(0).random(shape, np.float32)
    inputs = {name: {"image": images} for name in names}
    if "corrected" in inputs:
        logits = np.zeros((len(images), classes), np.float32)
        inputs["corrected"] = {"purified": images, "undefended_logits": logits}
    return inputs


def in_turns(calls: Mapping[str, Callable[[], object]], turns: int) -> dict[str, list[tuple[float, float]]]:
    """Return the seconds of each call in each turn, by the clock and by the processor's time, after some unmeasured."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for turn in range(turns + WARM_UPS):
        for name, call in calls.items():
            start, used = time.perf_counter(), time.process_time()
            call()
            if turn >= WARM_UPS:
                taken[name].append((time.perf_counter() - start, time.process_time() - used))
    return taken


def _medians(
    engines: Mapping[str, OnnxEngine], inputs: Mapping[str, dict[str, np.ndarray]], turns: int
) -> dict[str, dict[str, float]]:
    """Return the median milliseconds of each engine by the clock and by the processor's time."""
    taken = in_turns({name: partial(engine.feed, **inputs[name]) for name, engine in engines.items()}, turns)
    return {
        name: {
            "milliseconds": 1000 * statistics.median(clock for clock, _ in values),
            "cpu_milliseconds": 1000 * statistics.median(cpu for _, cpu in values),
        }
        for name, values in taken.items()
    }


def _floor(parts: Mapping[str, Any], ceiling: Ceiling, batch: int) -> float:
    """Return the milliseconds below which a batch cannot be computed."""
    cost = total(parts)
    moved = cost.weight_bytes + batch * cost.activation_bytes
    return 1000 * ceiling.floor(batch * cost.multiply_adds, moved)


def with_ratios(
    times: Mapping[str, Mapping[str, float]], compared: str, allowed: Mapping[str, float], floors: Mapping[str, float]
) -> dict[str, Any]:
    """Return each graph's times with their ratios to the bare classifier's and to the floor, by the time ``compared``.

    A graph with an ``allowed`` ratio has its ``limit``, and whether that is ``kept``.
    """
    rows: dict[str, dict[str, Any]] = {}
    for name, values in times.items():
        ratio = values[compared] / times["bare"][compared]
        rows[name] = {
            **values,
            "ratio": ratio,
            "floor_milliseconds": floors[name],
            "over_floor": values[compared] / floors[name],
        }
        if name in allowed:
            limit = MARGIN * allowed[name]
            rows[name] |= {"limit": limit, "kept": ratio <= limit}
    return rows
