"""How long a request may take."""

import asyncio
from time import monotonic
from types import TracebackType
from typing import Self

from service.metrics import ModelMetrics

MICROSECOND = 1e-6


class RequestTimedOut(TimeoutError):
    """A request took longer than it may."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"The request was given up after {seconds:g} s.")


class TimedRequest:
    """Time, count and bound one inference request: the block that it is answered in.

    ``deadline`` is when the block is given up, a time of ``time.monotonic``; it then raises ``RequestTimedOut``, as it
    does for any other ``TimeoutError`` in it.
    """

    __slots__ = ("_metrics", "_seconds", "_start", "_timeout", "deadline")

    def __init__(self, metrics: ModelMetrics, seconds: float) -> None:
        self._metrics = metrics
        self._seconds = seconds
        self._start = monotonic()
        self._timeout = asyncio.timeout(seconds)
        self.deadline = self._start + seconds

    def shorten(self, microseconds: int) -> None:
        """Bound the block by so many microseconds from its start, where that is sooner; 0 sets no bound.

        Raises ``TimeoutError`` when they are over already.
        """
        if not microseconds or microseconds * MICROSECOND >= self._seconds:
            return
        self._seconds = microseconds * MICROSECOND
        self.deadline = self._start + self._seconds
        left = self.deadline - monotonic()
        if left <= 0:
            raise TimeoutError
        self._timeout.reschedule(asyncio.get_running_loop().time() + left)

    async def __aenter__(self) -> Self:
        await self._timeout.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await self._timeout.__aexit__(kind, error, trace)
        except TimeoutError as late:
            error = late
        self._metrics.request_seconds.observe(monotonic() - self._start)
        if error is None:
            self._metrics.answered.inc()
        elif isinstance(error, TimeoutError):
            self._metrics.refused(RequestTimedOut.__name__)
            raise RequestTimedOut(self._seconds) from error
        else:
            self._metrics.refused(type(error).__name__)
