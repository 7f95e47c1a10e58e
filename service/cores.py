"""How a processor's cores are shared out among the batches of one version."""

import os
from collections.abc import Callable
from time import perf_counter

import numpy as np

from service.engines import Engine
from service.settings import Settings

SMALL_SECONDS = 0.01
"""A version is small where one thread answers one image in at most so long."""

TURNS = 3


def with_cores(settings: Settings, open_engine: Callable[[Settings], Engine], shape: tuple[int, ...]) -> Settings:
    """Return settings that say in how many threads and lanes a version of images (C, H, W) is computed.

    Where they leave both open, for ONNX Runtime on the processor, a small version is computed in one thread and in as
    many lanes as there are cores, which serves many requests faster than threads that share each batch do; another one
    in every core, a batch at a time, which answers one image soonest. An engine that fails is no small one.
    """
    open_to_choice = (
        settings.device == "cpu" and settings.engine != "torch" and not (settings.threads or settings.lanes)
    )
    if not open_to_choice:
        return settings
    shared = settings.model_copy(update={"threads": 1, "lanes": os.cpu_count() or 1})
    return shared if seconds_alone(open_engine(shared), shape) <= SMALL_SECONDS else settings


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
