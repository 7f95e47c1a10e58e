"""A limit on request bodies, whether they declare their length or not."""

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class BodyTooLarge(ValueError):
    """A request's body is over the limit."""

    def __init__(self, limit: int, came: int) -> None:
        self.limit = limit
        super().__init__(f"Expected a body of at most {limit} bytes, got {came} or more.")


async def read_body(request: Request, most: int) -> bytes:
    """Return a request's body, in a fraction of the time that ``request.body`` takes.

    Raises ``BodyTooLarge`` beyond ``most`` bytes, before they are held, and ``ClientDisconnect``.
    """
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > most:
        raise BodyTooLarge(most, int(declared))
    parts, read, more = [], 0, True
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        part, more = message.get("body", b""), message.get("more_body", False)
        read += len(part)
        if read > most:
            raise BodyTooLarge(most, read)
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
