"""HTTP/1.1 over kept connections, as lean as a client in Python gets: httptools parses, nothing is built twice.

A client that shares the cores with the server takes part in what is measured. This one is used for every server alike.
"""

import asyncio
from collections import deque
from dataclasses import dataclass
from typing import Self, cast
from urllib.parse import urlsplit

import httptools


class ConnectionBroken(ConnectionError):
    """A server closed the connection in the middle of a request."""

    def __init__(self, received: int) -> None:
        self.received = received
        super().__init__(f"The server closed the connection after {received} bytes of its answer.")


@dataclass(frozen=True)
class Address:
    """Where a server listens."""

    host: str
    port: int

    @classmethod
    def of(cls, url: str) -> Self:
        """Read an address of the form ``http://host:port``; raises ``ValueError`` for another."""
        parts = urlsplit(url)
        if parts.scheme != "http" or parts.hostname is None or parts.path.strip("/"):
            raise ValueError(f"Expected an address such as http://127.0.0.1:8000, got {url!r}.")
        return cls(parts.hostname, parts.port or 80)


@dataclass(frozen=True)
class Message:
    """A request without its server: a path, the headers that describe the content, and the content."""

    path: str
    headers: tuple[tuple[str, str], ...]
    content: bytes

    def to(self, address: Address, method: str = "POST") -> bytes:
        """Return the bytes of the whole request."""
        lines = [
            f"{method} {self.path} HTTP/1.1",
            f"Host: {address.host}:{address.port}",
            *(f"{name}: {value}" for name, value in self.headers),
            f"Content-Length: {len(self.content)}",
        ]
        return "\r\n".join([*lines, "", ""]).encode("latin-1") + self.content


@dataclass(frozen=True)
class Reply:
    """What a server answered."""

    status: int
    content: bytes


class Connection(asyncio.Protocol):
    """Carry one request at a time."""

    def __init__(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self._waiting: asyncio.Future[Reply] | None = None
        self._content: list[bytes] = []
        self._received = 0

    @classmethod
    async def open(cls, address: Address) -> Self:
        """Connect; raises ``OSError`` where nobody listens."""
        _, connection = await asyncio.get_running_loop().create_connection(cls, address.host, address.port)
        return connection

    @property
    def closed(self) -> bool:
        """Whether no further request can be sent."""
        return self._transport is None or self._transport.is_closing()

    async def ask(self, request: bytes) -> Reply:
        """Send the bytes of a request and return its answer; raises ``ConnectionBroken``."""
        if self._transport is None:
            raise ConnectionBroken(0)
        self._waiting = asyncio.get_running_loop().create_future()
        self._content, self._received = [], 0
        self._transport.write(request)
        try:
            return await self._waiting
        except asyncio.CancelledError:
            self.close()
            raise

    def close(self) -> None:
        """Close the connection, whatever it is doing."""
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by inheritance

    def data_received(self, data: bytes) -> None:
        self._received += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(error)
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._fail(ConnectionBroken(self._received))

    def on_body(self, body: bytes) -> None:
        """Take a part of the answer's content, called by the parser."""
        self._content.append(body)

    def on_message_complete(self) -> None:
        """Hand the answer over, called by the parser."""
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(Reply(self._parser.get_status_code(), b"".join(self._content)))
        if not self._parser.should_keep_alive() and self._transport is not None:
            self._transport.close()

    def _fail(self, error: Exception) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_exception(error)


class Pool:
    """Lend connections to a server, the one used last first, and open at most ``size`` of them."""

    def __init__(self, address: Address, size: int) -> None:
        self.address = address
        self.reopened = 0
        self._idle: deque[Connection] = deque()
        self._free = asyncio.Semaphore(size)

    @property
    def exhausted(self) -> bool:
        """Whether the next request waits for a connection."""
        return self._free.locked()

    async def ask(self, request: bytes) -> Reply:
        """Send a request over a connection that is free, waiting for one if need be.

        A server may close an idle connection at the very moment at which a request goes out. Such a request, to which
        not a byte was answered, is sent once more over a new connection and counted in ``reopened``. What fails on a
        connection that was opened for it is not. Raises ``ConnectionBroken`` and ``OSError``.
        """
        async with self._free:
            kept = self._take()
            connection = kept or await Connection.open(self.address)
            try:
                reply = await connection.ask(request)
            except ConnectionBroken as broken:
                if broken.received or kept is None:
                    raise
                self.reopened += 1
                connection = await Connection.open(self.address)
                reply = await connection.ask(request)
            if not connection.closed:
                self._idle.append(connection)
            return reply

    def close(self) -> None:
        """Close the connections that are idle."""
        while self._idle:
            self._idle.pop().close()

    def _take(self) -> Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if not connection.closed:
                return connection
        return None
