"""Small versions are computed beside each other, large ones in every core; whoever says otherwise is obeyed."""

import os
import time

import numpy as np
import pytest

from service.cores import SMALL_SECONDS, seconds_alone, with_cores
from service.engines import OnnxEngine
from service.settings import Settings

SHAPE = (1, 16, 16)


class Slowed:
    """Answer with an engine, so many seconds late."""

    def __init__(self, engine: OnnxEngine, seconds: float) -> None:
        self._engine = engine
        self._seconds = seconds

    def run(self, images: np.ndarray) -> dict[str, np.ndarray]:
        time.sleep(self._seconds)
        return self._engine.run(images)


@pytest.fixture(scope="module")
def engine(store) -> OnnxEngine:
    return OnnxEngine(store / "models" / "digits" / "2" / "model.onnx", ["logits", "score"], threads=1)


def used(settings: Settings, engine) -> tuple[int, int]:
    chosen = with_cores(settings, lambda shared: engine, SHAPE)
    assert chosen.model_dump(exclude={"threads", "lanes"}) == settings.model_dump(exclude={"threads", "lanes"})
    return chosen.threads, chosen.lanes


def test_a_small_version_gets_a_lane_for_each_core_and_a_large_one_all_cores(engine):
    assert seconds_alone(engine, SHAPE) < SMALL_SECONDS
    assert used(Settings(), engine) == (1, os.cpu_count())
    assert used(Settings(), Slowed(engine, SMALL_SECONDS)) == (0, 0)


def test_it_is_timed_as_it_would_be_computed(engine):
    asked = []
    with_cores(Settings(), lambda shared: asked.append(shared.threads) or engine, SHAPE)
    assert asked == [1]


@pytest.mark.parametrize("given", [{"threads": 2}, {"lanes": 3}, {"device": "cuda"}, {"engine": "torch"}])
def test_what_is_set_stands_and_nothing_is_timed(given):
    settings = Settings(**given)
    assert with_cores(settings, lambda _: pytest.fail("opened"), SHAPE) is settings


def test_an_engine_that_fails_is_no_small_one(store):
    fragile = OnnxEngine(store / "models" / "fragile" / "1" / "model.onnx", ["logits"], threads=1)
    assert seconds_alone(fragile, (2, 16, 16)) == float("inf")
    assert used(Settings(), fragile) == (1, os.cpu_count())
    assert with_cores(settings := Settings(), lambda _: fragile, (2, 16, 16)) is settings
