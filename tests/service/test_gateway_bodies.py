"""How many bytes of request bodies a gateway holds at once, and what it refuses before it reads."""

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest

from service.body_limit import BodiesFull, BodyBudget

KIB = 1024
PATHS = ("/v2/models/digits/infer", "/v1/models/digits/predict")


def test_a_body_takes_room_as_it_comes_and_gives_it_back_at_the_end():
    budget = BodyBudget(100)
    with budget.room() as first, budget.room() as second:
        for room, size in ((first, 40), (second, 30), (first, 30)):
            room.take(size)
        with pytest.raises(BodiesFull, match=r"100 bytes of request bodies are held already, 1 more came, and at most"):
            second.take(1)
        assert budget.held == 100
    assert budget.held == 0


def test_what_a_request_declares_is_refused_at_once_but_not_held():
    budget = BodyBudget(100)
    with budget.room() as first, budget.room() as second:
        first.check(60)
        second.check(60)
        first.take(50)
        with pytest.raises(BodiesFull, match=r"50 bytes .* 60 more came, and at most 100 may be; try again"):
            second.check(60)
        second.check(50)


def test_a_body_that_is_alone_is_taken_whatever_its_size():
    budget = BodyBudget(100)
    with budget.room() as first, budget.room() as second:
        first.check(300)
        for _ in range(3):
            first.take(100)
        with pytest.raises(BodiesFull):
            second.take(1)
    with budget.room() as third:
        third.take(1)
    assert budget.held == 0


def tap() -> tuple[asyncio.Event, Callable[[], AsyncIterator[bytes]], list[int]]:
    """A body of 64 KiB of which the last byte waits for the event, and what was taken of such bodies."""
    rest, taken = asyncio.Event(), []

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(16):
            taken.append(4 * KIB)
            yield bytes(4 * KIB - (len(taken) == 16))
        await rest.wait()
        yield b"\0"

    return rest, chunks, taken


async def until_counted(visitor, metric: str) -> None:
    """Return once the model ``slow`` has counted something."""
    for _ in range(2000):
        if await visitor.metric(metric, model="slow"):
            return
        await asyncio.sleep(0.002)
    raise AssertionError(f"{metric} stayed at 0.")


@pytest.mark.parametrize("path", PATHS)
async def test_a_body_beyond_what_may_be_held_is_refused_and_room_comes_back(gateway, dark, file_of, path):
    async with gateway(queue_bytes=100 * KIB, max_body_bytes=80 * KIB) as visitor:
        rest, body, taken = tap()
        first = asyncio.create_task(visitor.http.post(path, content=body()))
        for _ in range(2000):
            if len(taken) == 16:
                break
            await asyncio.sleep(0.001)
        declared = await visitor.http.post(path, content=body(), headers={"content-length": str(64 * KIB)})
        assert len(taken) == 16, "it is refused before it is read"
        chunked = await visitor.http.post(path, content=body())
        assert 16 < len(taken) <= 16 + 10, "it is refused when there is no more room"
        for answer in (declared, chunked):
            assert answer.status_code == 429
            assert answer.headers["retry-after"] == "1"
            assert f"and at most {100 * KIB} may be; try again." in answer.json()["error"]
        assert (await visitor.predict("digits", file_of(dark(1)[0]))).status_code == 200, "a small one finds room"
        assert await visitor.metric("rejected_total", reason="BodiesFull") == 2
        labels = {"model": "digits", "version": "2", "outcome": "BodiesFull"}
        assert await visitor.metric("requests_total", **labels) == 2
        rest.set()
        assert (await first).status_code == 400, "it was no image, but it was read"
        assert (await visitor.http.post(path, content=body())).status_code == 400


async def test_a_body_is_held_until_its_request_is_answered(gateway, dark, file_of):
    async with gateway(models=("slow",), max_batch=1, queue_bytes=8 * KIB) as visitor:
        request = visitor.request_of(dark(20))
        assert 4 * KIB < len(request["content"]) < 8 * KIB
        first = asyncio.create_task(visitor.http.post("/v2/models/slow/infer", **request))
        await until_counted(visitor, "batch_size_count")
        assert (await visitor.http.post("/v2/models/slow/infer", **request)).status_code == 429
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        assert (await visitor.http.post("/v2/models/slow/infer", **visitor.request_of(dark(1)))).status_code == 200


async def test_a_full_queue_refuses_a_request_before_its_body_is_read(gateway, dark):
    taken = 0

    async def chunks() -> AsyncIterator[bytes]:
        nonlocal taken
        taken += 1
        yield bytes(KIB)

    async with gateway(models=("slow",), max_batch=1, queue_images=1) as visitor:
        busy = []
        for metric in ("batch_size_count", "queue_depth"):
            busy.append(asyncio.create_task(visitor.infer("slow", dark(1))))
            await until_counted(visitor, metric)
        for path in ("/v2/models/slow/infer", "/v1/models/slow/predict"):
            answer = await visitor.http.post(path, content=chunks())
            assert (answer.status_code, taken) == (429, 0)
            assert "images wait for model 'slow' already" in answer.json()["error"]
        assert {(await task).status_code for task in busy} == {200}
