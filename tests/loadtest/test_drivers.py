import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from loadtest.connections import Address, Message
from loadtest.drivers import arrivals, closed_loop, drive, open_loop
from loadtest.runs import Run

MESSAGE = Message("/", (("Content-Type", "text/plain"),), b"image")
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\no\r\n1\r\nk\r\n0\r\n\r\n"
STALL = 0.4


class Scripted(asyncio.Protocol):
    """A server's side of one connection that answers each request as a function of its number says."""

    def __init__(self, answer: Callable[[int], tuple[float, bytes, bool]], numbers: Iterator[int]) -> None:
        self.answer, self.numbers = answer, numbers

    def connection_made(self, transport):
        self.transport = transport

    def data_received(self, data):
        delay, content, close = self.answer(next(self.numbers))
        asyncio.get_running_loop().call_later(delay, self._send, content, close)

    def _send(self, content, close):
        self.transport.write(content)
        if close:
            self.transport.close()


@contextmanager
def answering(answer: Callable[[int], tuple[float, bytes, bool]]) -> Iterator[Address]:
    """Serve from another thread: delay in seconds, bytes, and whether the connection is closed behind them."""
    loop, ready = asyncio.new_event_loop(), threading.Event()
    numbers = iter(range(10**9))
    servers = []

    async def serve():
        servers.append(await loop.create_server(lambda: Scripted(answer, numbers), "127.0.0.1", 0))
        ready.set()

    def stop():
        servers[0].close()
        loop.call_soon(loop.stop)

    loop.create_task(serve())
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    ready.wait()
    try:
        yield Address("127.0.0.1", servers[0].sockets[0].getsockname()[1])
    finally:
        loop.call_soon_threadsafe(stop)
        thread.join()
        loop.close()


def test_percentiles_are_measured_latencies_of_answers_with_200():
    seconds = np.array([0.001 * n for n in range(1, 101)] + [9.0])
    run = Run(np.zeros(101), seconds, np.array([200] * 100 + [429]), np.zeros(101), {}, 10.0)
    assert [run.percentile(percent) for percent in (50, 90, 99, 100)] == [0.05, 0.09, 0.099, 0.1]
    told = run.summary()
    assert told["milliseconds"] == {"p50": 50.0, "p90": 90.0, "p99": 99.0, "max": 100.0}
    assert told["statuses"] == {"200": 100, "429": 1}
    assert (told["too_many"], told["per_second"], run.errors) == (1, 10.0, 1)


def test_a_run_without_answers_has_no_latency():
    run = Run(np.zeros(2), np.ones(2), np.zeros(2, int), np.zeros(2), {"ConnectionRefusedError": 2}, 1.0)
    assert run.percentile(50) == float("inf")
    assert run.summary()["milliseconds"] == {}


def test_requests_after_a_moment_are_a_run_of_their_own():
    run = Run(np.arange(4.0), np.arange(4.0), np.array([0, 200, 200, 200]), np.zeros(4), {"TimeoutError": 1}, 4.0)
    late = run.after(2)
    assert (late.errors, late.duration, late.percentile(50)) == (0, 2.0, 2.0)
    assert late.summary()["failures"] == {}


def test_arrivals_are_as_many_a_second_as_asked():
    assert np.allclose(arrivals(10, 1, "even"), np.arange(10) / 10)
    moments = arrivals(200, 50, "exponential", seed=1)
    gaps = np.diff(moments)
    assert len(moments) == pytest.approx(10_000, rel=0.05)
    assert (gaps >= 0).all()
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.05), "as in a Poisson process"
    assert np.array_equal(moments, arrivals(200, 50, "exponential", seed=1))


@pytest.mark.parametrize(("rate", "seconds"), [(0, 1), (-1, 1), (1, 0), (float("nan"), 1)])
def test_a_rate_or_time_not_above_0_is_refused(rate, seconds):
    with pytest.raises(ValueError, match="above 0"):
        arrivals(rate, seconds, "even")


def test_an_open_loop_shows_who_queued_while_a_server_stalled():
    def stalls_once(number):
        return (STALL if number == 20 else 0.0), ANSWER, False

    with answering(stalls_once) as address:
        opened = drive(open_loop(address, [MESSAGE], rate=200, seconds=1, spacing="even", connections=1))
    with answering(stalls_once) as address:
        closed = drive(closed_loop(address, [MESSAGE], concurrency=1, requests=200))
    assert opened.errors == closed.errors == 0
    # In an open loop whoever came during the stall waited for what was left of it; a closed loop sent nobody then.
    assert (opened.seconds > STALL / 2).sum() >= 0.8 * 200 * STALL / 2
    assert (closed.seconds > STALL / 2).sum() == 1
    assert opened.seconds.max() > 0.95 * STALL
    assert opened.late.min() >= 0
    assert opened.seconds.min() > 0, "nothing is sent before its moment"


def test_a_closed_loop_keeps_so_many_in_flight():
    with answering(lambda number: (0.05, ANSWER, False)) as address:
        run = drive(closed_loop(address, [MESSAGE], concurrency=8, requests=80))
    assert (len(run.seconds), run.errors) == (80, 0)
    assert run.duration == pytest.approx(0.5, rel=0.4)


def test_a_closed_loop_ends_after_its_seconds():
    with answering(lambda number: (0.01, ANSWER, False)) as address:
        run = drive(closed_loop(address, [MESSAGE], concurrency=2, seconds=0.3))
    assert 0.3 <= run.duration < 0.6
    with pytest.raises(ValueError, match="Expected an end"):
        drive(closed_loop(address, [MESSAGE], concurrency=2))
    with pytest.raises(ValueError, match="Expected a message"):
        drive(closed_loop(address, [], concurrency=2, requests=1))


def test_answers_in_chunks_and_closed_connections_are_read():
    with answering(lambda number: (0.0, CHUNKED if number % 2 else ANSWER, number % 3 == 0)) as address:
        run = drive(closed_loop(address, [MESSAGE], concurrency=2, requests=30))
    assert run.summary()["statuses"] == {"200": 30}


def test_a_broken_answer_is_a_failure_by_name():
    with answering(lambda number: (0.0, ANSWER[:25], True)) as address:
        broken = drive(closed_loop(address, [MESSAGE], concurrency=1, requests=3))
    assert broken.failures == {"ConnectionBroken": 3}
    with answering(lambda number: (0.0, b"nothing of HTTP\r\n\r\n", False)) as address:
        strange = drive(closed_loop(address, [MESSAGE], concurrency=1, requests=2))
    assert sum(strange.failures.values()) == 2
    refused = drive(closed_loop(address, [MESSAGE], concurrency=1, requests=2))
    assert refused.failures == {"ConnectionRefusedError": 2}


def test_no_answer_in_time_is_a_failure():
    with answering(lambda number: (5.0, ANSWER, False)) as address:
        run = drive(open_loop(address, [MESSAGE], rate=20, seconds=0.2, spacing="even", answer_seconds=0.1))
    assert run.failures == {"TimeoutError": 4}


def test_a_request_on_a_connection_that_was_just_closed_is_sent_again():
    # The server closes without an answer every time that it has answered one request on a connection.
    with answering(lambda number: (0.0, b"" if number % 3 == 1 else ANSWER, number % 3 == 1)) as address:
        run = drive(closed_loop(address, [MESSAGE], concurrency=1, requests=20))
    assert run.errors == 0
    assert run.reopened >= 5


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "https://127.0.0.1", "http://127.0.0.1/v1"])
def test_an_address_is_a_host_and_a_port(url):
    with pytest.raises(ValueError, match="Expected an address"):
        Address.of(url)
