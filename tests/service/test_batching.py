"""Batches of whoever waits: everyone gets the answer of their own images, failures stay with who caused them."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator

import numpy as np
import pytest
import pytest_asyncio

from service.batching import Batcher, BatcherClosed, QueueFull
from service.engines import Answers, OnnxEngine
from service.metrics import Metrics


def unit(pixels: np.ndarray) -> np.ndarray:
    return pixels.astype(np.float32) / np.float32(255)


@pytest.fixture(scope="module")
def engine(store) -> OnnxEngine:
    """The handmade graph: two pixels make it fail, see its description."""
    outputs = ["logits", "score", "alert", "undefended_logits", "purified"]
    return OnnxEngine(store / "models" / "fragile" / "1" / "model.onnx", outputs, threads=1)


class Door:
    """Let batches through to an engine one by one, and note how large they were and of what type."""

    def __init__(self, engine: OnnxEngine) -> None:
        self.engine = engine
        self.sizes: list[int] = []
        self.types: list[np.dtype] = []
        self.open = threading.Event()
        self.entered = threading.Event()

    def predict(self, images: np.ndarray) -> Answers:
        """Wait for the door, then compute."""
        self.sizes.append(len(images))
        self.types.append(images.dtype)
        self.entered.set()
        assert self.open.wait(10)
        return self.engine.predict(images)


@pytest.fixture
def door(engine) -> Door:
    return Door(engine)


@pytest_asyncio.fixture
async def batcher(door) -> AsyncIterator[Batcher]:
    """A batcher behind a closed door: at most four images at once, ten waiting."""
    started = Batcher("fragile", door.predict, max_batch=4, capacity=10, longest_wait=0, metrics=Metrics()).start()
    yield started
    door.open.set()
    await started.stop()


async def held(batcher: Batcher, door: Door, images: np.ndarray) -> asyncio.Task[list[Answers]]:
    """Send the first request in and return when the model is busy with it."""
    first = asyncio.create_task(batcher.submit(images))
    await asyncio.to_thread(door.entered.wait, 10)
    return first


def joined(pieces: list[Answers]) -> np.ndarray:
    return np.concatenate([piece.logits for piece in pieces])


async def test_a_lone_request_does_not_wait_for_company(batcher, door, engine, dark):
    door.open.set()
    start = time.perf_counter()
    (answer,) = await batcher.submit(unit(dark(2)))
    assert time.perf_counter() - start < 1
    np.testing.assert_allclose(answer.logits, engine.predict(unit(dark(2))).logits, atol=1e-5)
    assert door.sizes == [2]


async def test_whoever_waits_is_computed_together_in_the_order_of_arrival(batcher, door, engine, dark):
    first = await held(batcher, door, unit(dark(1)))
    requests = [unit(dark(count, seed=seed)) for seed, count in enumerate((1, 2, 1, 3), start=1)]
    waiting = [asyncio.create_task(batcher.submit(images)) for images in requests]
    await asyncio.sleep(0)
    door.open.set()
    finished = [await task for task in (first, *waiting)]
    assert door.sizes == [1, 4, 3]
    for images, pieces in zip(requests, finished[1:], strict=True):
        np.testing.assert_allclose(joined(pieces), engine.predict(images).logits, atol=1e-5)


async def test_pixels_stay_pixels_until_the_engine_unless_floats_come_with_them(batcher, door, engine, dark):
    first = await held(batcher, door, dark(1))
    pixels = [asyncio.create_task(batcher.submit(images)) for images in (dark(2, seed=1), dark(2, seed=2))]
    await asyncio.sleep(0)
    mixed = [asyncio.create_task(batcher.submit(images)) for images in (dark(1, seed=3), unit(dark(1, seed=4)))]
    await asyncio.sleep(0.05)
    door.open.set()
    answers = [(await task)[0].logits for task in (first, *pixels, *mixed)]
    assert door.types == [np.uint8, np.uint8, np.float32]
    sent = [dark(1), dark(2, seed=1), dark(2, seed=2), dark(1, seed=3), dark(1, seed=4)]
    expected = engine.predict(unit(np.concatenate(sent))).logits
    np.testing.assert_allclose(np.concatenate(answers), expected, atol=1e-5)


async def test_a_request_is_never_torn_apart_to_fill_a_batch(batcher, door, dark):
    first = await held(batcher, door, unit(dark(1)))
    waiting = [asyncio.create_task(batcher.submit(unit(dark(count)))) for count in (3, 2, 2)]
    await asyncio.sleep(0)
    door.open.set()
    await asyncio.gather(first, *waiting)
    assert door.sizes == [1, 3, 4]


async def test_a_request_larger_than_a_batch_comes_back_whole_and_in_order(batcher, door, engine, dark):
    door.open.set()
    images = unit(dark(11))
    pieces = await batcher.submit(images)
    assert [len(piece.logits) for piece in pieces] == [4, 4, 3]
    expected = engine.predict(images)
    np.testing.assert_allclose(joined(pieces), expected.logits, atol=1e-5)
    np.testing.assert_allclose(np.concatenate([piece.purified for piece in pieces]), expected.purified, atol=1e-6)


async def test_an_input_that_breaks_the_run_costs_its_neighbours_nothing(batcher, door, engine, dark):
    requests = [unit(dark(1, seed=seed)) for seed in range(4)]
    for images in requests:
        images[:, 0, 0, :2] = 0
    requests[1][0, 0, 0, 0] = 1
    first = await held(batcher, door, unit(dark(1)))
    waiting = [asyncio.create_task(batcher.submit(images)) for images in requests]
    await asyncio.sleep(0)
    door.open.set()
    outcomes = await asyncio.gather(*waiting, return_exceptions=True)
    await first
    assert door.sizes == [1, 4, 1, 1, 1, 1], "the batch fails, then each of its requests is computed alone"
    for number, (images, outcome) in enumerate(zip(requests, outcomes, strict=True)):
        if number == 1:
            assert "out of data bounds" in str(outcome)
        else:
            np.testing.assert_allclose(joined(outcome), engine.predict(images).logits, atol=1e-5)
    (answer,) = await batcher.submit(requests[0])
    assert np.isfinite(answer.logits).all()


async def test_values_that_are_not_finite_stay_in_their_row(batcher, door, engine, dark):
    images = [unit(dark(1, seed=seed)) for seed in range(3)]
    for one in images:
        one[:, 0, 0, :2] = 0
    images[1][0, 0, 0, 1] = 1
    first = await held(batcher, door, unit(dark(1)))
    waiting = [asyncio.create_task(batcher.submit(one)) for one in images]
    await asyncio.sleep(0)
    door.open.set()
    await first
    finite = [bool(np.isfinite(joined(await task)).all()) for task in waiting]
    assert door.sizes == [1, 3]
    assert finite == [True, False, True]


async def test_a_request_that_is_cancelled_leaves_the_queue_and_its_room(batcher, door, dark):
    first = await held(batcher, door, unit(dark(1)))
    waiting = [asyncio.create_task(batcher.submit(unit(dark(5, seed=seed)))) for seed in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(QueueFull):
        await batcher.submit(unit(dark(1)))
    waiting[0].cancel()
    await asyncio.gather(waiting[0], return_exceptions=True)
    assert waiting[0].cancelled()
    another = asyncio.create_task(batcher.submit(unit(dark(5, seed=2))))
    await asyncio.sleep(0)
    door.open.set()
    await asyncio.gather(first, waiting[1], another)
    assert sum(door.sizes) == 1 + 5 + 5, "what was cancelled is not computed"


async def test_a_request_whose_first_piece_fails_does_not_keep_the_model_busy_with_the_rest(batcher, door, dark):
    images = unit(dark(12))
    images[:, 0, 0, :2] = 0
    images[0, 0, 0, 0] = 1
    door.open.set()
    with pytest.raises(Exception, match="out of data bounds"):
        await batcher.submit(images)
    (answer,) = await batcher.submit(images[1:3])
    assert len(answer.logits) == 2
    assert sum(door.sizes) <= 4 + 4 + 2


async def test_a_full_queue_says_how_full_it_is(batcher, door, dark):
    first = await held(batcher, door, unit(dark(1)))
    waiting = asyncio.create_task(batcher.submit(unit(dark(8))))
    await asyncio.sleep(0)
    with pytest.raises(QueueFull, match="8 images wait for model 'fragile' already and at most 10 may; try again"):
        await batcher.submit(unit(dark(3)))
    fits = asyncio.create_task(batcher.submit(unit(dark(2))))
    await asyncio.sleep(0)
    door.open.set()
    await asyncio.gather(first, waiting, fits)


async def test_a_stop_answers_what_was_taken_and_refuses_the_rest(batcher, door, engine, dark):
    first = await held(batcher, door, unit(dark(1)))
    waiting = [asyncio.create_task(batcher.submit(unit(dark(2, seed=seed)))) for seed in range(3)]
    await asyncio.sleep(0)
    stopping = asyncio.create_task(batcher.stop())
    await asyncio.sleep(0.01)
    with pytest.raises(BatcherClosed, match="stopping and takes no more images"):
        await batcher.submit(unit(dark(1)))
    assert not stopping.done()
    door.open.set()
    await stopping
    await first
    for seed, task in enumerate(waiting):
        np.testing.assert_allclose(joined(task.result()), engine.predict(unit(dark(2, seed=seed))).logits, atol=1e-5)


async def test_a_request_that_waits_past_its_deadline_is_not_computed(batcher, door, dark):
    first = await held(batcher, door, unit(dark(1)))
    late = asyncio.create_task(batcher.submit(unit(dark(2)), time.monotonic() + 0.01))
    in_time = asyncio.create_task(batcher.submit(unit(dark(1)), time.monotonic() + 60))
    await asyncio.sleep(0.03)
    door.open.set()
    with pytest.raises(TimeoutError, match="waited past their deadline"):
        await late
    await asyncio.gather(first, in_time)
    assert door.sizes == [1, 1]
    batcher.check_room(10)


@pytest_asyncio.fixture
async def patient(door) -> AsyncIterator[Batcher]:
    """A batcher that may wait ten seconds for company: at most four images at once."""
    door.open.set()
    started = Batcher("fragile", door.predict, max_batch=4, capacity=10, longest_wait=10, metrics=Metrics()).start()
    yield started
    await started.stop()


async def test_a_batch_waits_for_a_request_that_is_being_decoded_and_for_no_other(patient, door, dark):
    with patient.coming():
        first = asyncio.create_task(patient.submit(unit(dark(1))))
        await asyncio.sleep(0.05)
        assert door.sizes == []
        second = asyncio.create_task(patient.submit(unit(dark(2))))
        await asyncio.sleep(0.05)
        assert door.sizes == []
    await asyncio.gather(first, second)
    assert door.sizes == [3], "what was decoded together is computed together"
    await patient.submit(unit(dark(1)))
    assert door.sizes == [3, 1], "nothing is being decoded, so a lone request does not wait"


async def test_a_full_batch_waits_for_nobody(patient, door, dark):
    with patient.coming():
        await asyncio.wait_for(patient.submit(unit(dark(4))), 5)
    assert door.sizes == [4]


async def test_a_batch_waits_no_longer_than_it_may(door, dark):
    door.open.set()
    batcher = Batcher("fragile", door.predict, max_batch=4, capacity=10, longest_wait=0.05, metrics=Metrics()).start()
    start = time.monotonic()
    with batcher.coming():
        await asyncio.wait_for(batcher.submit(unit(dark(1))), 5)
        assert time.monotonic() - start >= 0.05
    await batcher.stop()


async def test_a_stop_does_not_wait_for_what_is_being_decoded(patient, door, dark):
    with patient.coming():
        waiting = asyncio.create_task(patient.submit(unit(dark(1))))
        await asyncio.sleep(0.02)
        await asyncio.wait_for(patient.stop(), 5)
        await waiting
    assert door.sizes == [1]


async def test_the_queue_is_measured(door, dark):
    metrics = Metrics()
    batcher = Batcher("fragile", door.predict, max_batch=4, capacity=10, longest_wait=0, metrics=metrics).start()

    def depth() -> float | None:
        return metrics.registry.get_sample_value("portcullis_queue_depth", {"model": "fragile"})

    first = await held(batcher, door, unit(dark(1)))
    waiting = [asyncio.create_task(batcher.submit(unit(dark(3)))) for _ in range(2)]
    await asyncio.sleep(0)
    assert depth() == 6
    door.open.set()
    await asyncio.gather(first, *waiting)
    assert depth() == 0
    await batcher.stop()
    sizes = metrics.registry.get_sample_value("portcullis_batch_size_sum", {"model": "fragile"})
    waits = metrics.registry.get_sample_value("portcullis_stage_seconds_count", {"stage": "queue"})
    assert (sizes, waits) == (7, 3)


@pytest.mark.parametrize("lanes", [1, 2])
async def test_forty_clients_at_once_each_get_what_their_image_alone_gets(gateway, store, dark, bright, lanes):
    names = ["logits", "score", "alert", "purified"]
    alone = OnnxEngine(store / "models" / "digits" / "2" / "model.onnx", names, threads=1, noise=False)
    images = [(dark if number % 3 else bright)(1 + number % 4, seed=number) for number in range(40)]
    expected = [alone.predict(unit(pixels)) for pixels in images]
    async with gateway(max_batch=8, threads=1, lanes=lanes) as visitor:
        wanted = ["label", "class_index", "verdict", "logits", "score", "purified"]
        answers = await asyncio.gather(*(visitor.outputs("digits", pixels, wanted) for pixels in images))
        batches = await visitor.metric("batch_size_count", model="digits")
        assert await visitor.metric("batch_size_sum", model="digits") == sum(map(len, images))
    assert batches < 40, "clients that come together are computed together"
    labels = ("zero", "one", "two", "three")
    for outputs, answer in zip(answers, expected, strict=True):
        np.testing.assert_allclose(outputs["logits"], answer.logits, atol=1e-4)
        np.testing.assert_allclose(outputs["score"], answer.scores, atol=1e-4)
        np.testing.assert_allclose(outputs["purified"], answer.purified, atol=1e-4)
        assert outputs["class_index"].tolist() == answer.logits.argmax(1).tolist()
        assert outputs["label"] == [labels[index] for index in answer.logits.argmax(1)]
        assert outputs["verdict"] == ["alert" if alert else "accepted" for alert in answer.alerts]
    spread = {tuple(outputs["logits"].ravel().round(4)) for outputs in answers}
    assert len(spread) == 40, "the images are told apart, so no answer can be a neighbour's unnoticed"


async def test_a_request_that_breaks_the_run_fails_alone_among_many(gateway, dark):
    good = [dark(1, seed=seed) for seed in range(12)]
    for pixels in good:
        pixels[:, 0, 0, :2] = 0
    bad = good[0].copy()
    bad[0, 0, 0, 0] = 255
    async with gateway(models=("fragile",)) as visitor:
        mixed = [*good[:6], bad, *good[6:]]
        answers = await asyncio.gather(*(visitor.infer("fragile", pixels, ["logits"]) for pixels in mixed))
        assert [answer.status_code for answer in answers] == [200] * 6 + [503] + [200] * 6
        for pixels, answer in zip(mixed, answers, strict=True):
            if answer.status_code == 200:
                alone = await visitor.outputs("fragile", pixels, ["logits"])
                np.testing.assert_allclose(visitor.read(answer)["logits"], alone["logits"], atol=1e-5)


async def test_a_model_goes_on_after_all_that_waited_for_company_has_left(patient, door, dark):
    with patient.coming():
        left = asyncio.create_task(patient.submit(unit(dark(1))))
        await asyncio.sleep(0.05)
        left.cancel()
        await asyncio.gather(left, return_exceptions=True)
    await asyncio.sleep(0.05)
    (answer,) = await asyncio.wait_for(patient.submit(unit(dark(2))), 5)
    assert len(answer.logits) == 2
    assert door.sizes == [2]


@pytest.mark.parametrize("counts", [(8,), (1, 1, 1, 1), (3, 1)])
async def test_what_comes_at_once_is_shared_out_among_free_lanes(engine, door, dark, counts):
    options = {"max_batch": 4, "capacity": 10, "longest_wait": 0, "metrics": Metrics(), "lanes": 2}
    batcher = Batcher("fragile", door.predict, **options).start()
    requests = [unit(dark(count, seed=seed)) for seed, count in enumerate(counts)]
    tasks = [asyncio.create_task(batcher.submit(images)) for images in requests]
    await asyncio.sleep(0.05)
    assert sorted(door.sizes) == sorted({(8,): (4, 4), (1, 1, 1, 1): (2, 2), (3, 1): (3, 1)}[counts])
    door.open.set()
    for images, pieces in zip(requests, await asyncio.gather(*tasks), strict=True):
        np.testing.assert_allclose(joined(pieces), engine.predict(images).logits, atol=1e-5)
    await batcher.stop()


async def test_as_many_batches_as_there_are_lanes_are_computed_at_once(engine, door, dark):
    batcher = Batcher(
        "fragile", door.predict, max_batch=4, capacity=10, longest_wait=0, metrics=Metrics(), lanes=2
    ).start()
    requests = [unit(dark(count, seed=count)) for count in (2, 3, 1, 4)]
    tasks = []
    for images in requests[:2]:
        tasks.append(await held(batcher, door, images))
        door.entered.clear()
    tasks += [asyncio.create_task(batcher.submit(images)) for images in requests[2:]]
    await asyncio.sleep(0.05)
    assert door.sizes == [2, 3], "the others wait for a lane"
    door.open.set()
    for images, (answer,) in zip(requests, await asyncio.gather(*tasks), strict=True):
        np.testing.assert_allclose(answer.logits, engine.predict(images).logits, atol=1e-5)
    await asyncio.wait_for(batcher.stop(), 5)
    assert sorted(door.sizes) == [1, 2, 3, 4]
    assert "model-fragile" not in {thread.name for thread in threading.enumerate()}


class Where:
    """Answer with an engine, after so many seconds, and note in which thread."""

    def __init__(self, engine: OnnxEngine) -> None:
        self.engine = engine
        self.seconds = 0.0
        self.threads: list[str] = []

    def predict(self, images: np.ndarray) -> Answers:
        self.threads.append(threading.current_thread().name)
        time.sleep(self.seconds)
        return self.engine.predict(images)


async def test_a_lone_image_is_computed_on_the_event_loop_where_that_is_soon_done(engine, dark, monkeypatch):
    monkeypatch.setattr("service.batching.LONE_SECONDS", 0.2)
    where = Where(engine)
    batcher = Batcher("fragile", where.predict, max_batch=4, capacity=10, longest_wait=0, metrics=Metrics()).start()
    own, loop = "model-fragile", threading.current_thread().name
    image = unit(dark(1))
    image[:, 0, 0, :2] = 0

    async def computed_alone() -> list[str]:
        """Submit, with pauses, until an image is computed on the event loop: the thread turns back to its queue."""
        where.threads.clear()
        while loop not in where.threads and len(where.threads) < 200:
            await asyncio.sleep(0.002)
            (answer,) = await batcher.submit(image)
            np.testing.assert_allclose(answer.logits, engine.predict(image).logits, atol=1e-5)
        return where.threads

    assert (await computed_alone())[0] == own, "how long an image takes is known after the first"
    assert where.threads[-1] == loop
    await asyncio.gather(batcher.submit(image), batcher.submit(image))
    await batcher.submit(unit(dark(2)))
    assert set(where.threads[-2:]) == {own}, "who has company is computed with it, and a pair is not a lone image"
    assert (await computed_alone())[-1] == loop
    with batcher.coming():
        await batcher.submit(image)
    assert where.threads[-1] == own, "company is coming"
    assert (await computed_alone())[-1] == loop
    for seconds in (0.25, 0.0):
        where.seconds = seconds
        await asyncio.sleep(0.01)
        await batcher.submit(image)
    assert where.threads[-2:] == [loop, own], "once it took long the next image leaves the event loop free"
    assert (await computed_alone())[-1] == loop
    await batcher.submit(image)
    assert where.threads[-2:] == [loop, own], "what had come while the last answer was made is no lone image"
    assert (await computed_alone())[-1] == loop
    image[0, 0, 0, 0] = 1
    await asyncio.sleep(0.01)
    with pytest.raises(Exception, match="out of data bounds"):
        await batcher.submit(image)
    assert where.threads[-2:] == [loop, loop], "what fails there fails alone"
    await batcher.stop()


async def test_while_the_model_is_busy_a_lone_image_waits_for_it(engine, dark, monkeypatch):
    monkeypatch.setattr("service.batching.LONE_SECONDS", 10)
    door = Door(engine)
    door.open.set()
    batcher = Batcher("fragile", door.predict, max_batch=4, capacity=10, longest_wait=0, metrics=Metrics()).start()
    await batcher.submit(unit(dark(1)))
    door.open.clear()
    door.entered.clear()
    first = await held(batcher, door, unit(dark(2)))
    second = asyncio.create_task(batcher.submit(unit(dark(1))))
    await asyncio.sleep(0.05)
    assert not second.done()
    door.open.set()
    await asyncio.gather(first, second)
    assert door.sizes == [1, 2, 1]
    await batcher.stop()


async def test_a_stop_before_a_lone_image_is_looked_at_answers_it(engine, dark, monkeypatch):
    monkeypatch.setattr("service.batching.LONE_SECONDS", 10)
    where = Where(engine)
    batcher = Batcher("fragile", where.predict, max_batch=4, capacity=10, longest_wait=0, metrics=Metrics()).start()
    await batcher.submit(unit(dark(1)))
    last, stopping = asyncio.create_task(batcher.submit(unit(dark(1)))), asyncio.create_task(batcher.stop())
    await asyncio.wait_for(asyncio.gather(last, stopping), 10)
    assert len(where.threads) == 2
