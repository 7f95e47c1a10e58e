"""What is decoded where: small images and messages at once, the others in threads, behind a bounded queue."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from math import prod
from typing import ParamSpec, TypeVar

import numpy as np
from PIL.ImageFile import ImageFile

from model_store import InputSpec
from service.images import ImageRefused, open_image, read_pixels
from service.uploads import Upload

P = ParamSpec("P")
T = TypeVar("T")

SMALL_BYTES = 2**14
"""Images of at most so many bytes in all, and ..."""

SMALL_PIXELS = 2**14
"""... so many pixels in all, to be brought to at most ..."""

SMALL_VALUES = 2**16
"""... so many values, are decoded on the event loop: it takes less time than handing them to a thread."""

COMPRESSED_CHUNKS = (b"zTXt", b"iTXt", b"iCCP")
"""Chunks of a PNG that a few bytes may swell to megabytes of text, which are read when it is opened."""


class DecodeQueueFull(RuntimeError):
    """As many requests wait to be decoded as may."""

    def __init__(self, waiting: int, capacity: int) -> None:
        super().__init__(f"{waiting} requests wait to be decoded already and at most {capacity} may; try again.")


class Decoder:
    """Decode in ``threads`` threads, with at most ``capacity`` requests waiting for one of them."""

    def __init__(self, threads: int, capacity: int) -> None:
        self._capacity = capacity
        self._waiting = 0
        self._closed = False
        self._free = asyncio.Semaphore(threads)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decoder")

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function in a thread; raises ``DecodeQueueFull``, and what the function raises.

        A caller that is cancelled takes its call out of the queue, and what it was to be called with.
        """
        if self._free.locked() and self._waiting >= self._capacity:
            raise DecodeQueueFull(self._waiting, self._capacity)
        self._waiting += 1
        try:
            # The pool's own queue keeps a cancelled call until its turn: it is handed what a thread is free for.
            await self._free.acquire()
        finally:
            self._waiting -= 1
        call, loop = self._pool.submit(function, *args, **kwargs), asyncio.get_running_loop()
        # Not when the caller is done: a call that was begun goes on without one, and its thread is not free.
        call.add_done_callback(lambda _: None if self._closed else loop.call_soon_threadsafe(self._free.release))
        return await asyncio.wrap_future(call)

    def close(self) -> None:
        """Take no more calls."""
        self._closed = True
        self._pool.shutdown(wait=False)


async def decode_uploads(
    uploads: Sequence[Upload], spec: InputSpec, decoder: Decoder, coming: AbstractContextManager[None], max_pixels: int
) -> np.ndarray:
    """Decode images into uint8 (N, C, H, W); ``coming`` is entered while they are decoded in a thread.

    Raises ``ImageRefused``, which names the image where there are several, and ``DecodeQueueFull``.
    """
    if _looks_small(uploads, spec):
        opened = _opened(uploads, max_pixels)
        if sum(image.width * image.height for image in opened) <= SMALL_PIXELS:
            return _read(uploads, opened, spec)
    with coming:
        return await decoder.run(lambda: _read(uploads, _opened(uploads, max_pixels), spec))


def _looks_small(uploads: Sequence[Upload], spec: InputSpec) -> bool:
    """Say whether images may be opened on the event loop, before anything of them is read."""
    return (
        sum(len(upload.data) for upload in uploads) <= SMALL_BYTES
        and len(uploads) * prod(spec.shape) <= SMALL_VALUES
        and not any(chunk in upload.data for upload in uploads for chunk in COMPRESSED_CHUNKS)
    )


def _opened(uploads: Sequence[Upload], max_pixels: int) -> list[ImageFile]:
    return _each(uploads, lambda number: open_image(uploads[number].data, max_pixels=max_pixels))


def _read(uploads: Sequence[Upload], opened: Sequence[ImageFile], spec: InputSpec) -> np.ndarray:
    images = _each(uploads, lambda number: read_pixels(opened[number], spec))
    # Channels come last from a decoder; brought first here, the model's thread copies whole rows.
    return np.stack(images, out=np.empty((len(images), *spec.shape), np.uint8))


def _each(uploads: Sequence[Upload], step: Callable[[int], T]) -> list[T]:
    """Take a step for each upload by number; what it refuses is refused by name where there are several."""
    done = []
    for number, upload in enumerate(uploads):
        try:
            done.append(step(number))
        except ImageRefused as error:
            if len(uploads) == 1:
                raise
            raise ImageRefused(f"Image {number} ({upload.name}): {error}") from error
    return done
