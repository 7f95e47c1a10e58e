"""Dynamic batching: whoever waits while the model is busy is computed together next."""

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import monotonic
from typing import Generic, Protocol, Self, TypeVar

import numpy as np

from service.metrics import Metrics, Timed
from service.pixels import as_batch

LONE_SECONDS = 0.005
"""A lone image is computed on the event loop where the last one took at most so long: longer, and it saves little."""

CALM_TURNS = 3
"""How often the event loop turns after an answer until whatever had come meanwhile is submitted."""


class Rows(Protocol):
    """What a model says of N images, of which some rows can be taken."""

    def __getitem__(self, rows: slice) -> Self: ...


A = TypeVar("A", bound=Rows)


class QueueFull(RuntimeError):
    """A model has as many images waiting as it may."""

    def __init__(self, model: str, waiting: int, capacity: int) -> None:
        super().__init__(f"{waiting} images wait for model {model!r} already and at most {capacity} may; try again.")


class BatcherClosed(RuntimeError):
    """A model is being taken out of service."""

    def __init__(self, model: str) -> None:
        super().__init__(f"Model {model!r} is stopping and takes no more images.")


@dataclass(slots=True, eq=False)
class _Request:
    deadline: float
    since: float = field(default_factory=monotonic)
    error: Exception | None = None
    """Why none of its pieces need be computed any more."""


@dataclass(slots=True, eq=False)
class _Waiting(Generic[A]):
    images: np.ndarray
    answer: asyncio.Future[A]
    request: _Request


class Batcher(Generic[A]):
    """Gather the images of concurrent requests into batches for one model, and compute them in ``lanes`` threads.

    A batch is whatever waits when a lane becomes free, at most ``max_batch`` images of whole requests; a larger
    request is split by ``submit``. A lone request never waits for company: a batch that is not full waits, at most
    ``longest_wait`` seconds from its oldest image's arrival, only while other requests are being decoded (``coming``).
    What waits is shared out among the lanes that are free. A lone image that is soon computed (``LONE_SECONDS``) is
    computed on the event loop, which saves two changes of thread: nothing else waits, and nothing had come while the
    last answer was made, so that a second client is not kept waiting for the first one's.
    When a batch fails, each of its requests is computed alone, so that nobody gets an error for a neighbour's input;
    what fails alone is answered by ``instead``, in the same thread, where that is given and does not fail as well.
    """

    def __init__(
        self,
        model: str,
        predict: Callable[[np.ndarray], A],
        *,
        instead: Callable[[np.ndarray, Exception], A] | None = None,
        max_batch: int,
        capacity: int,
        longest_wait: float,
        metrics: Metrics,
        lanes: int = 1,
    ) -> None:
        self.model = model
        self.max_batch = max_batch
        self.capacity = capacity
        self.longest_wait = longest_wait
        self._predict = predict
        self._instead = instead
        self._waiting: deque[_Waiting[A]] = deque()
        self._depth = 0
        self._coming = 0
        self._closed = False
        self._changed = threading.Condition()
        self._telling = False
        self._running = 0
        self._arrivals = 0
        self._calm = True
        self._lone_seconds = float("inf")
        self._lanes = [threading.Thread(target=self._work, name=f"model-{model}", daemon=True) for _ in range(lanes)]
        self._loop: asyncio.AbstractEventLoop | None = None
        self._seconds, self._queued = metrics.stages["purify_classify_inspect"], metrics.stages["queue"]
        self._sizes, self._gauge = metrics.batch_size.labels(model), metrics.queue_depth.labels(model)

    def start(self) -> Self:
        """Start to take batches; call within a running event loop."""
        self._loop = asyncio.get_running_loop()
        for lane in self._lanes:
            lane.start()
        return self

    def check_room(self, images: int) -> None:
        """Raise what ``submit`` would raise now, before work is spent on images that cannot be taken."""
        if self._closed:
            raise BatcherClosed(self.model)
        depth = self._depth
        if depth and depth + images > self.capacity:
            raise QueueFull(self.model, depth, self.capacity)

    @contextmanager
    def coming(self) -> Iterator[None]:
        """Say that a request is being decoded within the block: company that a batch may wait for."""
        self._coming += 1
        try:
            yield
        finally:
            self._coming -= 1
            self._tell_soon()

    async def submit(self, images: np.ndarray, deadline: float = float("inf")) -> list[A]:
        """Return the answers for one request's images, in order, in pieces of at most ``max_batch``.

        Images are (N, C, H, W), uint8 or float32; uint8 go to the model as such unless float32 come with them.

        Raises ``QueueFull`` when the images do not fit behind those that wait already (an idle model takes a request
        of any size), ``BatcherClosed`` after ``stop``, ``TimeoutError`` for what still waits when the model gets to it
        after ``deadline``, a time of ``time.monotonic``, and what the model, then ``instead``, raises on these images.
        """
        self.check_room(len(images))
        request, new_answer = _Request(deadline), asyncio.get_running_loop().create_future
        if len(images) <= self.max_batch:
            pieces = [_Waiting(images, new_answer(), request)]
        else:
            starts = range(0, len(images), self.max_batch)
            pieces = [_Waiting(images[start : start + self.max_batch], new_answer(), request) for start in starts]
        self._arrivals += 1
        with self._changed:
            self._waiting.extend(pieces)
            self._depth += len(images)
        self._gauge.inc(len(images))
        self._tell_soon()
        try:
            if len(pieces) == 1:
                return [await pieces[0].answer]
            answers: list[A] = await asyncio.gather(*(piece.answer for piece in pieces))
            return answers
        except BaseException:
            self._withdraw(pieces)
            raise

    async def stop(self) -> None:
        """Refuse further images, answer those that were taken, and end."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for lane in self._lanes:
            if lane.ident is not None:
                await asyncio.to_thread(lane.join)

    def _tell_soon(self) -> None:
        """Wake a lane once everything that the event loop has at hand has been looked at: it comes together."""
        if not self._telling:
            self._telling = True
            asyncio.get_running_loop().call_soon(self._tell)

    def _tell(self) -> None:
        """Compute what waits on the event loop where it is a lone image and soon done, else wake a lane."""
        self._telling = False
        with self._changed:
            alone = self._calm and self._depth == 1 and not (self._coming or self._running)
            self._calm = False
            batch = self._taken() if alone and self._lone_seconds <= LONE_SECONDS else []
            if not batch:
                self._changed.notify()
        if batch:
            self._answer(batch)

    def _withdraw(self, pieces: Sequence[_Waiting[A]]) -> None:
        """Take out of the queue what still waits of a request that was cancelled or has failed."""
        left = 0
        with self._changed:
            for piece in pieces:
                if piece in self._waiting:
                    self._waiting.remove(piece)
                    left += len(piece.images)
            self._depth -= left
        self._gauge.dec(left)

    def _work(self) -> None:
        """Compute batches, in a lane, until the batcher is closed and nothing waits."""
        while batch := self._next_batch():
            self._answer(batch)
            with self._changed:
                self._running -= 1

    def _next_batch(self) -> list[_Waiting[A]]:
        with self._changed:
            while not (self._closed and not self._waiting):
                self._wait_for_images()
                # What waited may have been withdrawn or computed meanwhile, or be over.
                if batch := self._taken():
                    self._running += 1
                    if self._waiting:
                        self._changed.notify()
                    return batch
        return []

    def _wait_for_images(self) -> None:
        while not self._waiting and not self._closed:
            self._changed.wait()
        while self._waiting and self._coming and not self._closed and self._depth < self.max_batch:
            left = self._waiting[0].request.since + self.longest_wait - monotonic()
            if left <= 0:
                return
            self._changed.wait(left)

    def _taken(self) -> list[_Waiting[A]]:
        """Take the next batch off the queue: what waits, or a part of it where other lanes are free for the rest.

        What is over, by its deadline or another piece's error, is left out.
        """
        batch: list[_Waiting[A]] = []
        size, left, now = 0, 0, monotonic()
        most = min(self.max_batch, -(-self._depth // max(1, len(self._lanes) - self._running)))
        while self._waiting and (not batch or size + len(self._waiting[0].images) <= most):
            piece = self._waiting.popleft()
            left += len(piece.images)
            if piece.request.error is None and piece.request.deadline <= now:
                piece.request.error = TimeoutError("The images waited past their deadline.")
            if piece.request.error is not None:
                self._settle([piece], piece.request.error, now)
            else:
                batch.append(piece)
                size += len(piece.images)
        self._depth -= left
        self._gauge.dec(left)
        return batch

    def _answer(self, batch: Sequence[_Waiting[A]]) -> None:
        start = monotonic()
        self._sizes.observe(sum(len(piece.images) for piece in batch))
        try:
            images = as_batch([piece.images for piece in batch])
            with Timed(self._seconds):
                outcome: A | Exception = self._predict(images)
            if len(images) == 1:
                self._lone_seconds = monotonic() - start
        except Exception as error:
            if len(batch) > 1:
                for piece in batch:
                    if not piece.answer.done():
                        self._answer([piece])
                return
            outcome = self._given_instead(batch[0], error)
        self._settle(batch, outcome, start)

    def _given_instead(self, piece: _Waiting[A], error: Exception) -> A | Exception:
        """Return what is answered where a piece failed alone; an error is that of its whole request."""
        if self._instead is not None:
            try:
                return self._instead(piece.images, error)
            except Exception as final:
                error = final
        piece.request.error = error
        return error

    def _settle(self, batch: Sequence[_Waiting[A]], outcome: A | Exception, start: float) -> None:
        """Hand what became of a batch, begun at ``start``, from a lane to the event loop."""
        assert self._loop is not None, "batches are only taken after the start"
        self._loop.call_soon_threadsafe(self._hand_out, batch, outcome, start)

    def _hand_out(self, batch: Sequence[_Waiting[A]], outcome: A | Exception, start: float) -> None:
        first = 0
        for piece in batch:
            self._queued.observe(start - piece.request.since)
            last = first + len(piece.images)
            if piece.answer.done():
                pass
            elif isinstance(outcome, Exception):
                piece.answer.set_exception(outcome)
            else:
                piece.answer.set_result(outcome if len(batch) == 1 else outcome[first:last])
            first = last
        self._calm_down(self._arrivals, CALM_TURNS)

    def _calm_down(self, arrivals: int, turns: int) -> None:
        """Note, so many turns of the event loop from now, that nothing came since there were so many arrivals."""
        if turns and arrivals == self._arrivals:
            asyncio.get_running_loop().call_soon(self._calm_down, arrivals, turns - 1)
        else:
            self._calm = arrivals == self._arrivals
