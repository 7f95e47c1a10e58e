"""How a processor's cores are shared out among the batches of one version."""

import logging
import os
from collections.abc import Callable
from time import perf_counter
from typing import TypeVar

import numpy as np

from service.engines import Engine
from service.settings import Settings

logger = logging.getLogger("portcullis")

S = TypeVar("S")

SMALL_SECONDS = 0.01
"""A version is small where one thread answers one image in at most so long."""

TURNS = 3


def cores() -> int:
    """Return how many cores this process may use; a container's share of them is not seen."""
    return len(os.sched_getaffinity(0))


def opened_in_cores(
    settings: Settings, source_of: Callable[[Settings], S], open_engine: Callable[[S], Engine], shape: tuple[int, ...]
) -> tuple[S, Engine, int]:
    """Open a version of images (C, H, W); return its source, its engine, and in how many lanes it is computed.

    Where the settings leave threads and lanes open, for ONNX Runtime on the processor, a small version is computed in
    one thread and in as many lanes as there are cores, which serves many requests faster than threads that share each
    batch do; another one in every core, a batch at a time, which answers one image soonest. What corrects alerted
    images counts only where the image that is timed, a black one, is alerted. Raises what opening raises.
    """
    if settings.device == "cpu" and settings.engine != "torch" and not (settings.threads or settings.lanes):
        source = source_of(settings.model_copy(update={"threads": 1}))
        engine = open_engine(source)
        if (seconds := seconds_alone(engine, shape)) <= SMALL_SECONDS:
            logger.info("One thread answers an image in %.1f ms: %d lanes of one thread.", 1000 * seconds, cores())
            return source, engine, cores()
        logger.info("One thread answers an image in %.1f ms: every core computes each batch.", 1000 * seconds)
        del source, engine  # a large version is not held in memory twice
    source = source_of(settings)
    engine = open_engine(source)
    return source, engine, settings.lanes or engine.lanes


def seconds_alone(engine: Engine, shape: tuple[int, ...]) -> float:
    """Return how long an engine takes for one image (C, H, W) at its best; infinity where it fails."""
    image, taken = np.zeros((1, *shape), np.uint8), []
    try:
        engine.run(image)
        for _ in range(TURNS):
            start = perf_counter()
            engine.run(image)
            taken.append(perf_counter() - start)
    except Exception:  # the runtimes' own exceptions share no narrower ancestor; who serves the version tells of them
        return float("inf")
    return min(taken)
