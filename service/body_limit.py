"""Limits on request bodies, one by one and all together, whether they declare their length or not."""

from typing import Self

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class BodyTooLarge(ValueError):
    """A request's body is over the limit."""

    def __init__(self, limit: int, came: int) -> None:
        self.limit = limit
        super().__init__(f"Expected a body of at most {limit} bytes, got {came} or more.")


class BodiesFull(RuntimeError):
    """The bodies of the requests that are being answered take as many bytes as they may."""

    def __init__(self, held: int, came: int, capacity: int) -> None:
        super().__init__(
            f"{held} bytes of request bodies are held already, {came} more came, and at most {capacity} may be; "
            "try again."
        )


class BodyBudget:
    """Bound the bytes of all bodies that are held at once by ``capacity``; a body that is alone may be of any size.

    ``held`` counts what has come, not what was declared: a client that sends nothing keeps nobody out.
    """

    __slots__ = ("capacity", "held")

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.held = 0

    def room(self) -> "BodyRoom":
        """Return the block in which one request's body is held."""
        return BodyRoom(self)


class BodyRoom:
    """The bytes that one request's body takes of a budget, given back at the end of the block."""

    __slots__ = ("_budget", "_taken")

    def __init__(self, budget: BodyBudget) -> None:
        self._budget = budget
        self._taken = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._budget.held -= self._taken

    def check(self, size: int) -> None:
        """Raise ``BodiesFull`` where so many bytes would not be taken now."""
        held, capacity = self._budget.held, self._budget.capacity
        if held + size > capacity and held > self._taken:
            raise BodiesFull(held, size, capacity)

    def take(self, size: int) -> None:
        """Take so many bytes more; raises ``BodiesFull``."""
        self.check(size)
        self._budget.held += size
        self._taken += size


async def read_body(request: Request, most: int, room: BodyRoom) -> bytes:
    """Return a request's body, in a fraction of the time that ``request.body`` takes, and hold it in ``room``.

    Raises ``BodyTooLarge`` beyond ``most`` bytes and ``BodiesFull``, of a declared length before anything is read, else
    before it is held, and ``ClientDisconnect``.
    """
    declared = request.headers.get("content-length", "")
    if declared.isdecimal():
        if int(declared) > most:
            raise BodyTooLarge(most, int(declared))
        room.check(int(declared))
    parts, read, more = [], 0, True
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        part, more = message.get("body", b""), message.get("more_body", False)
        read += len(part)
        if read > most:
            raise BodyTooLarge(most, read)
        room.take(len(part))
        parts.append(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


class BodyLimit:
    """Raise ``BodyTooLarge`` where the application reads a body beyond ``most`` bytes, before it is held in memory."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self.app = app
        self.most = most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "")
        came = int(declared) if declared.isdecimal() else 0
        read = 0

        async def limited() -> Message:
            nonlocal read
            if came > self.most:
                raise BodyTooLarge(self.most, came)
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.most:
                raise BodyTooLarge(self.most, read)
            return message

        await self.app(scope, limited, send)
