"""The bare answer in place of a defense that fails: behind the model's queue, like every other answer."""

import asyncio
import threading
import time
from collections import Counter

import numpy as np
import pytest

from service.engines import OnnxEngine


class Bare:
    """Notes how the bare classifier is run, and lets it go slowly."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
        self.sizes: list[int] = []
        self.at_once = 0
        self._running = 0
        self._counting = threading.Lock()
        run = OnnxEngine.run

        def noted(engine: OnnxEngine, images: np.ndarray) -> dict[str, np.ndarray]:
            if engine._outputs != ["undefended_logits"] or not images.any():
                return run(engine, images)
            with self._counting:
                self.sizes.append(len(images))
                self._running += 1
                self.at_once = max(self.at_once, self._running)
            try:
                time.sleep(seconds)
                return run(engine, images)
            finally:
                with self._counting:
                    self._running -= 1

        monkeypatch.setattr(OnnxEngine, "run", noted)


def broken(pixels: np.ndarray) -> np.ndarray:
    """Images on which the run of the model ``fragile`` fails."""
    pixels[:, 0, 0, :2] = 255, 0
    return pixels


def sound(pixels: np.ndarray) -> np.ndarray:
    pixels[:, 0, 0, :2] = 0
    return pixels


async def test_a_defense_that_fails_open_is_no_way_past_the_queue(gateway, dark, monkeypatch):
    bare = Bare(monkeypatch, 0.05)
    async with gateway(models=("fragile",), on_defense_error="open", max_batch=1, queue_images=2) as visitor:
        asked = []
        for seed in range(40):
            asked.append(asyncio.create_task(visitor.infer("fragile", broken(dark(1, seed=seed)), ["verdict"])))
            await asyncio.sleep(0.005)
        answers = await asyncio.gather(*asked)
        counted = Counter(answer.status_code for answer in answers)
        assert set(counted) == {200, 429}
        assert len(bare.sizes) == counted[200] <= 20
        assert bare.at_once == 1
        for answer in answers:
            if answer.status_code == 200:
                assert visitor.read(answer)["verdict"] == ["undefended"]
            else:
                assert answer.headers["retry-after"] == "1"
        assert await visitor.metric("defense_errors_total", model="fragile") == counted[200]


async def test_who_waits_for_a_bare_answer_keeps_deadline_and_leaves_the_queue(gateway, dark, monkeypatch):
    bare = Bare(monkeypatch, 0.3)
    async with gateway(models=("fragile",), on_defense_error="open", max_batch=1) as visitor:
        first = asyncio.create_task(visitor.infer("fragile", broken(dark(1)), ["verdict"]))
        for _ in range(2000):
            if bare.sizes:
                break
            await asyncio.sleep(0.005)
        late = await visitor.infer("fragile", broken(dark(1)), parameters={"timeout": 50_000})
        assert (late.status_code, late.json()["error"]) == (504, "The request was given up after 0.05 s.")
        assert await visitor.metric("queue_depth", model="fragile") == 0
        assert visitor.read(await first)["verdict"] == ["undefended"]
        assert (await visitor.infer("fragile", sound(dark(1)))).status_code == 200
    assert bare.sizes == [1], "what was given up is not computed"


async def test_only_what_failed_is_given_the_bare_answer(gateway, dark, monkeypatch):
    bare = Bare(monkeypatch, 0)
    pixels = sound(dark(11))
    pixels[5, 0, 0, 0] = 255  # the run on the second piece of four fails
    pixels[9, 0, 0, 1] = 255  # one row of the third gives no finite number
    names = ["verdict", "logits", "score", "purified"]
    given = {"models": ("fragile",), "on_defense_error": "open", "disclose": "all", "undefended_answer": True}
    async with gateway(**given, max_batch=4) as visitor:
        outputs = await visitor.outputs("fragile", pixels, [*names, "undefended_class_index"])
        assert await visitor.metric("defense_errors_total", model="fragile") == 5
    lost = np.isin(np.arange(11), (4, 5, 6, 7, 9))
    assert outputs["verdict"] == ["undefended" if failed else "accepted" for failed in lost]
    assert sorted(bare.sizes) == [1, 4]
    thirds = [pixels[:, 0, :, first:last].mean((1, 2)) for first, last in ((0, 5), (5, 11), (11, 16))]
    assert outputs["undefended_class_index"].tolist() == np.argmax(thirds, 0).tolist()
    assert outputs["logits"][lost].argmax(1).tolist() == np.argmax(thirds, 0)[lost].tolist()
    assert not outputs["score"][lost].any()
    assert not outputs["purified"][lost].any()
    assert (outputs["score"][~lost] < 0).all()


async def test_where_the_bare_answer_fails_too_none_is_given_but_to_the_neighbours(gateway, dark, monkeypatch):
    run = OnnxEngine.run

    def failing(engine: OnnxEngine, images: np.ndarray) -> dict[str, np.ndarray]:
        if engine._outputs == ["undefended_logits"] and images.any():
            raise RuntimeError("the device is gone")
        return run(engine, images)

    async with gateway(models=("fragile",), on_defense_error="open") as visitor:
        monkeypatch.setattr(OnnxEngine, "run", failing)
        bad = sound(dark(2, seed=50))
        bad[1, 0, 0, 1] = 255
        requests = [sound(dark(1, seed=n)) for n in range(4)] + [bad, broken(dark(1, seed=60))]
        answers = await asyncio.gather(*(visitor.infer("fragile", pixels) for pixels in requests))
    assert [answer.status_code for answer in answers] == [200] * 4 + [503] * 2
    for answer in answers[4:]:
        assert answer.json()["error"].startswith("The defense of model 'fragile' failed on ")
