"""The gateway's own client, against a real gateway."""

import asyncio
import http.server
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime

import numpy as np
import pytest

from service.alerts import Alert, AlertLog, new_alert_id
from service.client import Client, GatewayRefused, GatewayUnreachable, Served, pages


@pytest.fixture
def client(server) -> Iterator[Client]:
    with closing(Client(server.url)) as opened:
        yield opened


def test_the_version_that_a_call_without_one_gets(client):
    assert client.served("digits") == Served("2", "flag")
    assert client.served("bare") == Served("1", "flag")
    with pytest.raises(GatewayRefused, match="Model letters is not in service") as caught:
        client.served("letters")
    assert caught.value.status == 404


def test_images_are_classified_in_batches_and_in_order(client, dark, bright):
    images = np.concatenate([dark(20), bright(3), dark(14, seed=1)])
    told = client.classify("digits", images, batch_size=8)
    assert told.alerted.tolist() == [False] * 20 + [True] * 3 + [False] * 14
    assert told.class_index.shape == (37,)
    one_by_one = [client.classify("digits", images[row : row + 1]) for row in range(len(images))]
    assert told.class_index.tolist() == [one.class_index[0] for one in one_by_one]


def test_a_bare_classifier_alerts_nobody(client, bright):
    told = client.classify("bare", bright(2))
    assert told.alerted.tolist() == [False, False]


def test_images_need_not_lie_in_order_in_memory(client, dark):
    images = dark(6)
    turned = np.asfortranarray(images)[::-1]
    told = client.classify("digits", turned).class_index[::-1]
    assert told.tolist() == client.classify("digits", images).class_index.tolist()


def test_what_the_gateway_refuses_is_told_with_its_status(client, dark):
    with pytest.raises(GatewayRefused, match="The gateway answered 404: No model letters is in service") as caught:
        client.classify("letters", dark(1))
    assert caught.value.status == 404
    with pytest.raises(GatewayRefused, match="The gateway answered 400: The tensor must have the shape"):
        client.classify("digits", dark(1)[:, :, :8])


def test_every_page_of_alerts_is_followed(client, bright):
    before = {alert["id"] for alert in pages(client, "/v1/alerts?model=digits")}
    client.classify("digits", bright(5))
    for _ in range(100):
        after = {alert["id"] for alert in pages(client, "/v1/alerts?model=digits")}
        if len(after) == len(before) + 5:
            break
        time.sleep(0.02)
    assert before < after
    assert len(after) == len(before) + 5


async def written(database: str, count: int) -> None:
    """Put alerts on record as the gateway's writer does."""
    log = await AlertLog.open(database)
    facts = {"model": "digits", "version": 2, "request_id": "r", "client": "127.0.0.1", "class_index": 3}
    rest = {"label": "three", "score": 1.0, "threshold": 0.0, "mode": "flag", "sha256": "0" * 64}
    created = {"created": datetime.now(UTC), "media_type": "image/png"}
    await log.add([Alert(id=new_alert_id(), index=index, **facts, **rest, **created) for index in range(count)])
    await log.close()


async def test_more_alerts_than_one_page_holds_are_all_met_once(serve, tmp_path):
    await written(f"sqlite+aiosqlite:///{tmp_path / 'alerts.db'}", 2100)
    with serve(models="digits") as server, closing(Client(server.url)) as client:
        seen = await asyncio.to_thread(lambda: [alert["seq"] for alert in pages(client, "/v1/alerts?model=digits")])
    assert seen == list(range(2100, 0, -1))


class _Proxy(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(502)
        self.end_headers()
        self.wfile.write(b"<h1>Bad gateway</h1>")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def proxy() -> Iterator[str]:
    """The address of a server that answers 502 and a page to everything."""
    with http.server.HTTPServer(("127.0.0.1", 0), _Proxy) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_an_error_that_is_not_the_gateways_own_is_told_as_it_came(proxy):
    with (
        closing(Client(proxy)) as client,
        pytest.raises(GatewayRefused, match="The gateway answered 502: <h1>Bad gateway</h1>") as caught,
    ):
        client.get("/v2")
    assert caught.value.status == 502


def test_no_gateway_at_all_is_told_with_its_address():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
        with closing(Client(url)) as client, pytest.raises(GatewayUnreachable, match=url):
            client.get("/v2")
