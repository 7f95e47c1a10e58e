"""A client that goes while its request waits to be decoded is noticed, as one that waits for its answer is."""

import asyncio
import json
import os
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy as np
import pytest
import pytest_asyncio

from service.app import create_app
from service.direct import DirectApp
from service.gateway import Gateway
from service.settings import Settings


@pytest_asyncio.fixture
async def app(store, tmp_path) -> AsyncIterator[DirectApp]:
    """A gateway whose decoding threads are all busy until the test ends."""
    one = create_app(
        Settings(
            store=store,
            models=("digits",),
            database=f"sqlite+aiosqlite:///{tmp_path / 'alerts.db'}",
            inputs=tmp_path / "inputs",
            threads=1,
            noise=False,
            queue_decodes=1,
        )
    )
    go_on = threading.Event()
    async with one.router.lifespan_context(one):
        gateway: Gateway = one.state.gateway
        for _ in range(2000):
            if gateway.repository.ready:
                break
            await asyncio.sleep(0.005)
        busy = [asyncio.create_task(gateway.decoder.run(go_on.wait, 20)) for _ in range(os.cpu_count() or 1)]
        await asyncio.sleep(0)
        yield one
        go_on.set()
        assert all(await asyncio.gather(*busy))


class Connection:
    """A client's connection: its request is there at once, and it closes when told to."""

    def __init__(self, path: str, content: bytes) -> None:
        self.scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": []}
        self.status: int | None = None
        self.gone = asyncio.Event()
        self._messages = [{"type": "http.request", "body": content, "more_body": False}]

    async def receive(self) -> dict[str, Any]:
        """Return the request's body, and then that the client is gone, once it is."""
        if self._messages:
            return self._messages.pop()
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: dict[str, Any]) -> None:
        """Note the status."""
        self.status = message.get("status", self.status)


def outcomes(app: DirectApp, outcome: str) -> float | None:
    labels = {"model": "digits", "version": "2", "outcome": outcome}
    metrics = app.state.gateway.metrics
    found: float | None = metrics.registry.get_sample_value("portcullis_requests_total", labels)
    return found


@pytest.mark.parametrize("path", ["/v2/models/digits/infer", "/v1/models/digits/predict"])
async def test_a_client_that_goes_while_it_waits_to_be_decoded_leaves_the_queue(app, connected, path):
    first, second, third = (connected(path) for _ in range(3))
    waiting = asyncio.create_task(app(first.scope, first.receive, first.send))
    await asyncio.sleep(0.3)
    assert not waiting.done(), "a client that stays is waited with"
    await app(second.scope, second.receive, second.send)
    assert second.status == 429, "there is room for one"
    first.gone.set()
    await asyncio.wait_for(waiting, 2)
    assert outcomes(app, "ClientDisconnect") == 1
    another = asyncio.create_task(app(third.scope, third.receive, third.send))
    await asyncio.sleep(0.05)
    assert not another.done(), "its room is free again"
    third.gone.set()
    await asyncio.wait_for(another, 2)
    assert outcomes(app, "ClientDisconnect") == 2


@pytest.fixture
def connected(file_of) -> Callable[[str], Connection]:
    """Open a connection with a request that is decoded in a thread, by path."""
    tensor = {"name": "image", "datatype": "UINT8", "shape": [250, 1, 16, 16], "data": [0] * 250 * 256}
    message = json.dumps({"inputs": [tensor]}).encode()
    file = file_of(np.zeros((1, 300, 300), np.uint8), "PNG", compress_level=0)
    return lambda path: Connection(path, message if path.endswith("infer") else file)
