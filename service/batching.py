"""Dynamic batching: whoever waits while the model is busy is computed together next."""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from time import perf_counter
from typing import Self

import numpy as np

from service.engine import Answers
from service.metrics import Metrics


class QueueFull(RuntimeError):
    """A model has as many images waiting as it may."""

    def __init__(self, model: str, waiting: int, capacity: int) -> None:
        super().__init__(f"{waiting} images wait for model {model!r} already and at most {capacity} may; try again.")


class BatcherClosed(RuntimeError):
    """A model is being taken out of service."""

    def __init__(self, model: str) -> None:
        super().__init__(f"Model {model!r} is stopping and takes no more images.")


@dataclass(frozen=True, eq=False)
class _Waiting:
    images: np.ndarray
    answer: asyncio.Future[Answers]
    since: float = field(default_factory=perf_counter)


class Batcher:
    """Gather the images of concurrent requests into batches for one model.

    A lone request never waits for company: a batch is whatever waits when the model becomes free, at most
    ``max_batch`` images of whole requests; a larger request is split by ``submit``. When a batch fails, each of its
    requests is computed alone, so that nobody gets an error for a neighbour's input.
    """

    def __init__(
        self,
        model: str,
        predict: Callable[[np.ndarray], Answers],
        *,
        max_batch: int,
        capacity: int,
        metrics: Metrics,
    ) -> None:
        self.model = model
        self.max_batch = max_batch
        self.capacity = capacity
        self._predict = predict
        self._waiting: deque[_Waiting] = deque()
        self._depth = 0
        self._arrived = asyncio.Event()
        self._closed = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"model-{model}")
        self._metrics = metrics
        self._worker: asyncio.Task[None] | None = None

    def start(self) -> Self:
        """Start to take batches; call within a running event loop."""
        self._worker = asyncio.create_task(self._work(), name=f"batches of {self.model}")
        return self

    async def submit(self, images: np.ndarray) -> list[Answers]:
        """Return the answers for one request's images (N, C, H, W), in order, in pieces of at most ``max_batch``.

        Raises ``QueueFull`` when the images do not fit behind those that wait already (an idle model takes a request
        of any size), ``BatcherClosed`` after ``stop``, and what the model raises on these images.
        """
        if self._closed:
            raise BatcherClosed(self.model)
        if self._depth and self._depth + len(images) > self.capacity:
            raise QueueFull(self.model, self._depth, self.capacity)
        loop = asyncio.get_running_loop()
        pieces = [
            _Waiting(images[start : start + self.max_batch], loop.create_future())
            for start in range(0, len(images), self.max_batch)
        ]
        self._waiting.extend(pieces)
        self._count(len(images))
        self._arrived.set()
        try:
            return await asyncio.gather(*(piece.answer for piece in pieces))
        finally:
            self._withdraw(pieces)

    async def stop(self) -> None:
        """Refuse further images, answer those that were taken, and end."""
        self._closed = True
        self._arrived.set()
        if self._worker is not None:
            await self._worker
        self._thread.shutdown()

    async def _work(self) -> None:
        while True:
            await self._arrived.wait()
            batch = self._next_batch()
            if batch:
                await self._answer(batch)
            elif self._closed:
                return
            else:
                self._arrived.clear()

    def _withdraw(self, pieces: Sequence[_Waiting]) -> None:
        """Take out of the queue what still waits of a request that was cancelled or has failed."""
        for piece in pieces:
            if piece in self._waiting:
                self._waiting.remove(piece)
                self._count(-len(piece.images))

    def _next_batch(self) -> list[_Waiting]:
        batch: list[_Waiting] = []
        size = 0
        while self._waiting and (not batch or size + len(self._waiting[0].images) <= self.max_batch):
            piece = self._waiting.popleft()
            self._count(-len(piece.images))
            self._metrics.stage_seconds.labels("queue").observe(perf_counter() - piece.since)
            batch.append(piece)
            size += len(piece.images)
        return batch

    async def _answer(self, batch: list[_Waiting]) -> None:
        try:
            answers = await self._compute(np.concatenate([piece.images for piece in batch]))
        except Exception as error:
            if len(batch) == 1:
                _settle(batch[0], error)
                return
            for piece in batch:
                if not piece.answer.done():
                    await self._answer([piece])
            return
        first = 0
        for piece in batch:
            last = first + len(piece.images)
            _settle(piece, answers[first:last])
            first = last

    async def _compute(self, images: np.ndarray) -> Answers:
        self._metrics.batch_size.labels(self.model).observe(len(images))
        with self._metrics.stage("purify_classify_inspect"):
            return await asyncio.get_running_loop().run_in_executor(self._thread, self._predict, images)

    def _count(self, images: int) -> None:
        self._depth += images
        self._metrics.queue_depth.labels(self.model).set(self._depth)


def _settle(piece: _Waiting, outcome: Answers | Exception) -> None:
    if piece.answer.done():
        return
    if isinstance(outcome, Exception):
        piece.answer.set_exception(outcome)
    else:
        piece.answer.set_result(outcome)
