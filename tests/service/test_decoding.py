"""What is decoded at once and what in threads, and how much may wait for one."""

import asyncio
import gc
import math
import threading
import weakref
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from PIL.PngImagePlugin import PngInfo

from model_store import InputSpec
from service.decoding import SMALL_BYTES, SMALL_VALUES, DecodeQueueFull, Decoder, decode_uploads
from service.images import ImageRefused, decode_pixels
from service.uploads import Upload

SPEC = InputSpec(shape=(1, 16, 16), mode="L", resize="bilinear")


class Shelf:
    """Calls that wait until they are let go."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.open = threading.Event()

    def take(self, number: int) -> int:
        """Wait, then return the number."""
        self.begun.append(number)
        assert self.open.wait(10)
        return number


@pytest_asyncio.fixture
async def decoder() -> AsyncIterator[Decoder]:
    """One thread, and at most two calls that wait for it."""
    one = Decoder(1, 2)
    yield one
    one.close()


async def begun(shelf: Shelf, calls: int) -> None:
    for _ in range(1000):
        if len(shelf.begun) == calls:
            return
        await asyncio.sleep(0.005)
    raise AssertionError(f"Expected {calls} calls to begin, and {len(shelf.begun)} did.")


async def test_calls_beyond_the_queue_are_refused_and_room_comes_back(decoder):
    shelf = Shelf()
    running = asyncio.create_task(decoder.run(shelf.take, 0))
    await begun(shelf, 1)
    waiting = [asyncio.create_task(decoder.run(shelf.take, number)) for number in (1, 2)]
    await asyncio.sleep(0)
    with pytest.raises(DecodeQueueFull, match="2 requests wait to be decoded already and at most 2 may; try again"):
        await decoder.run(shelf.take, 3)
    shelf.open.set()
    assert await asyncio.gather(running, *waiting) == [0, 1, 2]
    assert await decoder.run(shelf.take, 4) == 4


async def test_a_cancelled_caller_leaves_the_queue_but_a_begun_call_holds_its_thread(decoder):
    shelf = Shelf()
    running = asyncio.create_task(decoder.run(shelf.take, 0))
    await begun(shelf, 1)
    waiting = [asyncio.create_task(decoder.run(shelf.take, number)) for number in (1, 2)]
    await asyncio.sleep(0)
    for task in (running, waiting[0]):
        task.cancel()
    await asyncio.gather(running, waiting[0], return_exceptions=True)
    another = asyncio.create_task(decoder.run(shelf.take, 3))
    await asyncio.sleep(0)
    with pytest.raises(DecodeQueueFull):
        await decoder.run(shelf.take, 4)
    shelf.open.set()
    assert await asyncio.gather(waiting[1], another) == [2, 3]
    assert shelf.begun == [0, 2, 3]


async def test_what_a_cancelled_caller_had_to_decode_is_let_go(decoder):
    class Body:
        """Stands for what a request came with."""

    shelf = Shelf()
    running = asyncio.create_task(decoder.run(shelf.take, 0))
    await begun(shelf, 1)
    bodies = [Body() for _ in range(20)]
    held = weakref.WeakSet(bodies)
    while bodies:
        waiting = asyncio.create_task(decoder.run(id, bodies.pop()))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
    del waiting
    await asyncio.sleep(0)
    gc.collect()
    assert len(held) == 0
    shelf.open.set()
    assert await running == 0


async def test_who_is_cancelled_as_the_turn_comes_hands_it_on(decoder):
    for _ in range(20):
        shelf = Shelf()
        running = asyncio.create_task(decoder.run(shelf.take, 0))
        await begun(shelf, 1)
        waiting = [asyncio.create_task(decoder.run(shelf.take, number)) for number in (1, 2)]
        await asyncio.sleep(0)
        shelf.open.set()
        for _ in range(100_000):
            if running.done():
                break
            await asyncio.sleep(0)
        waiting[0].cancel()
        await asyncio.gather(waiting[0], return_exceptions=True)
        assert await asyncio.wait_for(waiting[1], 5) == 2


async def test_a_call_that_outlives_the_gateway_ends_quietly(caplog):
    shelf, loop, before = Shelf(), asyncio.new_event_loop(), set(threading.enumerate())

    def lived() -> None:
        decoder = Decoder(1, 1)
        running = loop.create_task(decoder.run(shelf.take, 0))
        loop.run_until_complete(begun(shelf, 1))
        decoder.close()
        running.cancel()
        loop.run_until_complete(asyncio.gather(running, return_exceptions=True))
        loop.close()

    await asyncio.to_thread(lived)
    (thread,) = (one for one in set(threading.enumerate()) - before if one.name.startswith("decoder"))
    shelf.open.set()
    await asyncio.to_thread(thread.join, 5)
    assert not thread.is_alive()
    assert caplog.text == ""


async def test_what_a_call_raises_reaches_its_caller(decoder):
    with pytest.raises(ValueError, match="invalid literal"):
        await decoder.run(int, "seven")


class Company:
    """Notes how often it was said that a request is coming."""

    def __init__(self) -> None:
        self.times = 0

    @contextmanager
    def coming(self) -> Iterator[None]:
        """Note it."""
        self.times += 1
        yield


@pytest.mark.parametrize(
    ("side", "form", "options", "in_a_thread"),
    [
        (16, "PNG", {}, False),
        (128, "JPEG", {}, False),
        (129, "JPEG", {}, True),
        (300, "PNG", {"compress_level": 0}, True),
    ],
)
async def test_an_image_is_decoded_the_same_wherever_it_is(decoder, file_of, side, form, options, in_a_thread):
    pixels = np.random.default_rng(0).integers(0, 256, (1, side, side), np.uint8) // (32 if form == "JPEG" else 1)
    file, company = file_of(pixels, form, **options), Company()
    images = await decode_uploads([Upload("it", file)], SPEC, decoder, company.coming(), 10**6)
    np.testing.assert_array_equal(images, decode_pixels(file, SPEC, max_pixels=10**6)[None])
    assert images.flags.c_contiguous
    assert company.times == in_a_thread


async def test_the_image_that_is_refused_is_named_among_several(decoder, file_of, dark):
    async def decoded(*files: bytes, **limits: Any) -> np.ndarray:
        uploads = [Upload(f"{number}.png", file) for number, file in enumerate(files)]
        return await decode_uploads(uploads, SPEC, decoder, Company().coming(), limits.get("max_pixels", 10**6))

    small, large = file_of(dark(1)[0]), file_of(np.zeros((1, 200, 200), np.uint8))
    assert (await decoded(small, large)).shape == (2, 1, 16, 16)
    with pytest.raises(ImageRefused, match=r"^Image 1 \(1.png\): A PNG, JPEG or WebP image was expected"):
        await decoded(small, b"none")
    with pytest.raises(ImageRefused, match=r"^Image 0 \(0.png\): An image may have at most 300 pixels"):
        await decoded(large, small, max_pixels=300)
    with pytest.raises(ImageRefused, match=r"^The PNG image is damaged or truncated"):
        await decoded(large[:-40])


async def test_a_small_image_that_is_enlarged_is_so_in_a_thread(decoder, file_of, dark):
    side = math.isqrt(SMALL_VALUES)
    uploads = [Upload("it", file_of(dark(1)[0]))]
    for wanted, in_a_thread in ((side, False), (side + 1, True)):
        spec, company = SPEC.model_copy(update={"shape": (1, wanted, wanted), "resize": "bilinear"}), Company()
        images = await decode_uploads(uploads, spec, decoder, company.coming(), 10**6)
        assert images.shape == (1, 1, wanted, wanted)
        assert company.times == in_a_thread


async def test_a_png_that_may_swell_when_it_is_opened_is_opened_in_a_thread(decoder, file_of, dark):
    text = PngInfo()
    text.add_text("Comment", "x" * 500_000, zip=True)
    file, company = file_of(dark(1)[0], "PNG", pnginfo=text), Company()
    assert len(file) < SMALL_BYTES
    images = await decode_uploads([Upload("it", file)], SPEC, decoder, company.coming(), 10**6)
    np.testing.assert_array_equal(images, decode_pixels(file, SPEC, max_pixels=10**6)[None])
    assert company.times == 1
