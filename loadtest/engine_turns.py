"""Versions in one engine, one precision and one size of batch, in turns."""

import gc
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from loadtest.ceiling import products_per_second, torch_products_per_second
from loadtest.compute import ANSWERED, in_turns
from loadtest.cost import multiply_adds
from model_store import Fetched
from service.engines import Arithmetic, DeviceUnavailable, Engine, EngineUnavailable, outputs_of, pruned
from service.engines.opening import check_engine, open_source
from service.served import CORRECTION, GRAPH
from service.settings import EngineName, Precision, Settings

BARE = "bare"


class NothingMeasured(ValueError):
    """No version could be opened in any of the ways that were asked for."""

    def __init__(self, reasons: Sequence[str]) -> None:
        self.reasons = tuple(reasons)
        told = " ".join(reason.rstrip(".") + "." for reason in reasons)
        super().__init__(f"Nothing could be measured. {told}")


@dataclass(frozen=True)
class Plan:
    """What is measured, on which device, and in how many turns.

    ``versions`` are by what they are called, the bare classifier as ``BARE``; ``threads`` are a processor's, 0 one for
    each core.
    """

    store: Path
    versions: Mapping[str, Fetched]
    device: torch.device
    engines: tuple[EngineName, ...]
    precisions: tuple[Precision, ...]
    batches: tuple[int, ...]
    threads: int
    turns: int

    def settings(self, engine: EngineName, precision: Precision, batch: int) -> Settings:
        """Return the settings of a gateway that computes so many images at once, whatever the environment says."""
        return Settings.model_construct(
            store=self.store,
            device=self.device.type,
            engine=engine,
            precision=precision,
            threads=self.threads,
            max_batch=batch,
        )


@dataclass(frozen=True)
class Step:
    """What one way of computing showed: a row for each version, and what was refused with the reason.

    A row's times are by the clock. ``multiply_adds_per_second`` are those that the version's graph counts, ``ceiling``
    those of a product of matrices, ``device_bytes`` the most of a GPU's memory that the version has taken, None on a
    processor. A refusal's ``version`` and ``batch`` are None where it is of every one.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    refused: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class _Version:
    """A version, what is asked of it, and the multiply-adds that its graph counts for that and one image."""

    fetched: Fetched
    outputs: tuple[str, ...]
    multiply_adds: int

    @classmethod
    def of(cls, fetched: Fetched) -> Self:
        path = fetched.folder / GRAPH
        present = outputs_of(path)
        outputs = tuple(name for name in ANSWERED if name in present)
        return cls(fetched, outputs, multiply_adds(pruned(path, outputs)))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.fetched.manifest.input.shape

    def open(self, settings: Settings) -> Engine:
        """Open the engine that a gateway with these settings has, and run it in each size that it prepares for."""
        path = self.fetched.folder / GRAPH
        engine = open_source(self.fetched, path, path.with_name(CORRECTION), settings).open(self.outputs)
        for size in engine.warm_up_sizes:
            engine.run(np.zeros((size, *self.shape), np.float32))
        return engine


def measured(plan: Plan, told: Callable[[str], None]) -> Iterator[Step]:
    """Measure each engine in each precision at each size of batch; yield what each showed.

    What is asked of a version is what a gateway computes for every image, as far as the version has it, of images as
    uint8; the second answer to alerted images is not. What the device does at most is measured once for each engine and
    arithmetic.
    """
    versions = {name: _Version.of(fetched) for name, fetched in plan.versions.items()}
    ceilings: dict[tuple[EngineName, Arithmetic], float] = {}

    def ceiling(engine: EngineName, arithmetic: Arithmetic) -> float:
        key = engine, arithmetic
        if key not in ceilings:
            on_onnx = engine == "onnx" and plan.device.type == "cpu"
            ceilings[key] = (
                products_per_second(plan.threads) if on_onnx else torch_products_per_second(plan.device, arithmetic)
            )
        return ceilings[key]

    for engine, precision in product(plan.engines, plan.precisions):
        try:
            check_engine(plan.settings(engine, precision, 1))
        except (EngineUnavailable, DeviceUnavailable) as error:
            refusal = {"version": None, "engine": engine, "precision": precision, "batch": None, "reason": str(error)}
            yield Step(refused=[refusal])
            continue
        for batch in plan.batches:
            told(f"{engine}, {precision}, batch {batch} on {plan.device}")
            yield _step(plan, versions, plan.settings(engine, precision, batch), ceiling)


def _step(
    plan: Plan,
    versions: Mapping[str, _Version],
    settings: Settings,
    ceiling: Callable[[EngineName, Arithmetic], float],
) -> Step:
    """Measure the versions in one way, of which nothing stays on the device."""
    batch = settings.max_batch
    way = {"engine": settings.engine, "precision": settings.precision, "batch": batch}
    step = Step()
    engines: dict[str, Engine] = {}
    most_held: dict[str, int | None] = {}
    for name, version in versions.items():
        before = _bytes_used(plan.device, emptied=True)
        try:
            engines[name] = version.open(settings)
        except Exception as error:  # the runtimes' own exceptions share no narrower ancestor
            step.refused.append({"version": name, **way, "reason": str(error).strip()})
            continue
        after = _bytes_used(plan.device, emptied=False)
        most_held[name] = None if before is None or after is None else after - before
    calls = {name: partial(engine.predict, _images(batch, versions[name].shape)) for name, engine in engines.items()}
    times = {name: [clock for clock, _ in taken] for name, taken in in_turns(calls, plan.turns).items()}
    for name, engine in engines.items():
        rate = batch / statistics.fmean(times[name])
        work = rate * versions[name].multiply_adds
        most = ceiling(settings.engine, engine.arithmetic)
        step.rows.append(
            {
                **{"version": name, **way, "arithmetic": engine.arithmetic, "platform": engine.platform},
                "p50_milliseconds": 1000 * statistics.median(times[name]),
                "p99_milliseconds": 1000 * float(np.percentile(times[name], 99)),
                "images_per_second": rate,
                "over_bare": statistics.median(times[name]) / statistics.median(times[BARE]) if BARE in times else None,
                "multiply_adds_per_second": work,
                "ceiling": most,
                "of_ceiling": work / most,
                "device_bytes": most_held[name],
            }
        )
    return step


def _images(batch: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (batch, *shape), np.uint8)


def _bytes_used(device: torch.device, *, emptied: bool) -> int | None:
    """Return the bytes of a GPU's memory that are not free, None of a processor's.

    Both runtimes keep what they once needed, so that this is the most that was needed so far, unless what torch keeps
    without need is ``emptied`` first.
    """
    if device.type != "cuda":
        return None
    if emptied:
        gc.collect()
        torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return total - free
