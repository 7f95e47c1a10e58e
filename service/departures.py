"""Giving up requests whose client has gone."""

import asyncio
from time import monotonic
from types import TracebackType

from starlette.requests import ClientDisconnect
from starlette.types import Receive

LOOK_SECONDS = 0.1
"""How long a request waits before its connection is listened to; most are answered sooner, and cost nothing."""


class Stay:
    """The block in which a request, its body read, waits for its answer.

    Raises ``ClientDisconnect`` in the block when the client goes, some ``LOOK_SECONDS`` later.
    """

    __slots__ = ("_gone", "_receive", "_stays", "_task", "_watcher", "since")

    def __init__(self, stays: "set[Stay]", receive: Receive) -> None:
        self.since = monotonic()
        self._stays = stays
        self._receive = receive
        self._gone = False
        self._task: asyncio.Task[None] | None = None
        self._watcher: asyncio.Task[None] | None = None

    def __enter__(self) -> None:
        self._task = asyncio.current_task()
        self._stays.add(self)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stays.discard(self)
        if self._watcher is not None:
            self._watcher.cancel()
        if self._gone and self._task is not None and isinstance(error, asyncio.CancelledError):
            self._task.uncancel()
            raise ClientDisconnect from error

    def listen(self) -> None:
        """Listen to the connection, once."""
        if self._watcher is None:
            self._watcher = asyncio.create_task(self._listened())

    async def _listened(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        if self in self._stays and self._task is not None:
            self._gone = self._task.cancel()


class Departures:
    """Look, every ``LOOK_SECONDS``, after the requests that have waited as long."""

    def __init__(self) -> None:
        self._stays: set[Stay] = set()

    def stay(self, receive: Receive) -> Stay:
        """Return the block in which a request waits; ``receive`` is its connection's."""
        return Stay(self._stays, receive)

    async def watch(self) -> None:
        """Look after the requests until cancelled."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            before = monotonic() - LOOK_SECONDS
            for stay in self._stays:
                if stay.since <= before:
                    stay.listen()
