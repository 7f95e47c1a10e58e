"""Small versions are computed beside each other, large ones in every core; whoever says otherwise is obeyed."""

import threading
import time

import numpy as np
import pytest

from service.cores import SMALL_SECONDS, cores, opened_in_cores, seconds_alone
from service.engines import OnnxEngine
from service.settings import Settings

SHAPE = (1, 16, 16)


class Slowed(OnnxEngine):
    """Answer so many seconds late."""

    seconds = 2 * SMALL_SECONDS

    def run(self, images: np.ndarray) -> dict[str, np.ndarray]:
        time.sleep(self.seconds)
        return super().run(images)


def opened(store, settings: Settings, kind: type[OnnxEngine] = OnnxEngine) -> tuple[list[int], int]:
    """Return the threads of each opening, and the lanes."""
    path, asked = store / "models" / "digits" / "2" / "model.onnx", []

    def open_engine(threads: int) -> OnnxEngine:
        asked.append(threads)
        return kind(path, ["logits", "score"], threads=threads)

    source, engine, lanes = opened_in_cores(settings, lambda chosen: chosen.threads, open_engine, SHAPE)
    assert source == asked[-1]
    assert isinstance(engine, kind)
    return asked, lanes


def test_a_small_version_gets_a_lane_for_each_core_and_is_opened_once(store, caplog):
    with caplog.at_level("INFO", "portcullis"):
        assert opened(store, Settings()) == ([1], cores())
    assert f"{cores()} lanes of one thread" in caplog.text


def test_a_large_version_gets_every_core(store, caplog):
    with caplog.at_level("INFO", "portcullis"):
        assert opened(store, Settings(), Slowed) == ([1, 0], 1)
    assert "every core computes each batch" in caplog.text


@pytest.mark.parametrize(("given", "threads", "lanes"), [({"threads": 2}, 2, 1), ({"lanes": 3}, 0, 3)])
def test_what_is_set_stands(store, given, threads, lanes):
    assert opened(store, Settings(**given)) == ([threads], lanes)


@pytest.mark.parametrize("given", [{"device": "cuda"}, {"engine": "torch"}])
def test_other_engines_and_devices_are_left_what_they_take(store, given):
    assert opened(store, Settings(**given)) == ([0], 1)


def test_an_engine_that_fails_is_no_small_one(store):
    fragile = OnnxEngine(store / "models" / "fragile" / "1" / "model.onnx", ["logits"], threads=1)
    assert seconds_alone(fragile, SHAPE) < 1
    assert seconds_alone(fragile, (2, 16, 16)) == float("inf")


@pytest.mark.parametrize(("given", "lanes"), [({"threads": 0}, cores()), ({"lanes": 3}, 3), ({"threads": 1}, 1)])
async def test_a_gateway_has_as_many_threads_for_a_model_as_lanes(gateway, dark, given, lanes):
    async with gateway(models="digits", **given) as visitor:
        assert (await visitor.outputs("digits", dark(1), ["verdict"]))["verdict"]
        assert [thread.name for thread in threading.enumerate()].count("model-digits") == lanes
