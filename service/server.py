"""Running the gateway until it is told to stop."""

import asyncio
import secrets
import signal
import socket
import sys

import onnxruntime
import uvicorn
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.app import create_app
from service.settings import Settings

SWITCH_SECONDS = 0.0005
"""How long a thread that holds the interpreter keeps a model's thread from its next batch, at most."""

DRAIN_SECONDS = 0.5
"""How long a stopping gateway goes on reading, so that requests on their way are accepted and not cut off."""


def run(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT, then finish what was accepted and return.

    Raises what the start fails with, and ``SystemExit`` when the address cannot be had or when the stop leaves accepted
    alerts unwritten.
    """
    # Without a seed the runtime's noise starts from the clock, which an attacker can guess.
    onnxruntime.set_seed(secrets.randbits(62))
    sys.setswitchinterval(SWITCH_SECONDS)
    # uvicorn raises the signal again once it has stopped; a stop that was asked for is no failure.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    startup = Startup(create_app(settings))
    drain = Drain(startup)
    config = uvicorn.Config(
        drain,
        host=settings.host,
        port=settings.port,
        workers=1,
        loop="uvloop",
        http="httptools",
        ws="none",
        log_level="warning",
        access_log=False,
        # An address that a client wrote itself must not make it an operator.
        proxy_headers=False,
        timeout_graceful_shutdown=settings.shutdown_seconds,
    )
    server = _Server(config, drain)
    try:
        server.run()
    except SystemExit:
        if startup.failure is None:
            raise
        raise startup.failure from None
    if server.lifespan.should_exit:
        raise SystemExit(1)


class Startup:
    """Keep the error that the start fails with as ``failure``, whose traceback would otherwise be all that is told."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.failure: Exception | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        failed = False

        async def without_traceback(message: Message) -> None:
            nonlocal failed
            if message["type"] == "lifespan.startup.failed":
                failed, message = True, {**message, "message": ""}
            await send(message)

        try:
            await self.app(scope, receive, without_traceback if scope["type"] == "lifespan" else send)
        except Exception as error:
            if failed:
                self.failure = error
            raise


class Drain:
    """Tell clients to open no further request on their connection once ``begun`` is set."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.begun = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def closing(message: Message) -> None:
            if self.begun and message["type"] == "http.response.start":
                MutableHeaders(scope=message)["connection"] = "close"
            await send(message)

        await self.app(scope, receive, closing if scope["type"] == "http" else send)


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, drain: Drain) -> None:
        super().__init__(config)
        self._drain = drain

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._drain.begun = True
        await asyncio.sleep(DRAIN_SECONDS)
        await super().shutdown(sockets)
