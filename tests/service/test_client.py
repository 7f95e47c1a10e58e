"""The gateway's own client, against a real gateway."""

import http.server
import socket
import threading
from collections.abc import Iterator
from contextlib import closing

import httpx
import numpy as np
import pytest

from service.client import Client, GatewayRefused, pages


@pytest.fixture
def client(server) -> Iterator[Client]:
    with closing(Client(server.url)) as opened:
        yield opened


def test_the_version_that_a_call_without_one_gets(client):
    assert client.version("digits") == "2"
    assert client.version("bare") == "1"
    with pytest.raises(GatewayRefused, match="Model letters is not in service") as caught:
        client.version("letters")
    assert caught.value.status == 404


def test_images_are_classified_in_batches_and_in_order(client, dark, bright):
    images = np.concatenate([dark(20), bright(3), dark(14, seed=1)])
    told = client.classify("digits", images, batch_size=8)
    assert told.alerted.tolist() == [False] * 20 + [True] * 3 + [False] * 14
    assert told.class_index.shape == told.undefended_class_index.shape == (37,)
    one_by_one = [client.classify("digits", images[row : row + 1]) for row in range(len(images))]
    assert told.class_index.tolist() == [one.class_index[0] for one in one_by_one]
    assert told.undefended_class_index.tolist() == [one.undefended_class_index[0] for one in one_by_one]


def test_a_bare_classifier_tells_one_answer_only(client, bright):
    told = client.classify("bare", bright(2))
    assert told.undefended_class_index is None
    assert told.alerted.tolist() == [False, False]


def test_images_need_not_lie_in_order_in_memory(client, dark):
    images = dark(6)
    turned = np.asfortranarray(images)[::-1]
    assert (
        client.classify("digits", turned).class_index.tolist()
        == client.classify("digits", images).class_index.tolist()[::-1]
    )


def test_what_the_gateway_refuses_is_told_with_its_status(client, dark):
    with pytest.raises(GatewayRefused, match="The gateway answered 404: No model letters is in service") as caught:
        client.classify("letters", dark(1))
    assert caught.value.status == 404
    with pytest.raises(
        GatewayRefused, match=r"The gateway answered 400: The tensor must have the shape \(N, 1, 16, 16\)"
    ):
        client.classify("digits", dark(1)[:, :, :8])


def test_every_page_of_alerts_is_followed(client, bright):
    before = {alert["id"] for alert in pages(client, "/v1/alerts?model=digits")}
    client.classify("digits", bright(5))
    for _ in range(100):
        after = {alert["id"] for alert in pages(client, "/v1/alerts?model=digits")}
        if len(after) == len(before) + 5:
            break
    assert before < after
    assert len(after) == len(before) + 5


def test_more_alerts_than_one_page_holds_are_all_met(serve, bright):
    with serve(models="digits") as server, closing(Client(server.url)) as client:
        for seed in range(5):
            client.classify("digits", bright(250, seed=seed), batch_size=250)
        for _ in range(200):
            seen = [alert["seq"] for alert in pages(client, "/v1/alerts")]
            if len(seen) == 1250:
                break
        assert seen == list(range(1250, 0, -1))


class _Proxy(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(502)
        self.end_headers()
        self.wfile.write(b"<h1>Bad gateway</h1>")

    def log_message(self, *_: object) -> None:
        pass


def test_an_error_that_is_not_the_gateways_own_is_told_as_it_came():
    with http.server.HTTPServer(("127.0.0.1", 0), _Proxy) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        with closing(Client(f"http://127.0.0.1:{proxy.server_port}")) as client:
            with pytest.raises(GatewayRefused, match="The gateway answered 502: <h1>Bad gateway</h1>"):
                client.get("/v2")
        proxy.shutdown()


def test_no_gateway_at_all_is_a_transport_error():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        with closing(Client(f"http://127.0.0.1:{probe.getsockname()[1]}")) as client:
            with pytest.raises(httpx.TransportError):
                client.get("/v2")
