import numpy as np
import pytest

from loadtest.connections import Address, Message
from loadtest.drivers import arrivals, closed_loop, drive, in_stages, open_loop
from loadtest.runs import Run

MESSAGE = Message("/", (("Content-Type", "text/plain"),), b"image")
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\no\r\n1\r\nk\r\n0\r\n\r\n"
STALL = 0.4


def run_of(intended, seconds, statuses, *, reasons=None, duration=1.0) -> Run:
    count = len(seconds)
    reasons = np.array([""] * count if reasons is None else reasons)
    return Run(intended, seconds, np.array(statuses), np.zeros(count), np.zeros(count, bool), reasons, duration)


def test_percentiles_are_measured_latencies_of_answers_with_200():
    seconds = np.array([0.001 * n for n in range(1, 101)] + [9.0])
    run = run_of(np.zeros(101), seconds, [200] * 100 + [429], duration=10.0)
    assert [run.percentile(percent) for percent in (50, 90, 99, 100)] == [0.05, 0.09, 0.099, 0.1]
    told = run.summary()
    assert told["milliseconds"] == {"p50": 50.0, "p90": 90.0, "p99": 99.0, "max": 100.0}
    assert told["statuses"] == {"200": 100, "429": 1}
    assert (told["too_many"], told["per_second"], run.errors) == (1, 10.0, 1)


def test_a_run_without_answers_has_no_latency():
    run = run_of(np.zeros(2), np.ones(2), [0, 0], reasons=["ConnectionRefusedError"] * 2)
    assert run.percentile(50) == float("inf")
    assert run.summary()["milliseconds"] == {}
    assert run.summary()["failures"] == {"ConnectionRefusedError": 2}


def test_requests_between_moments_are_a_run_of_their_own():
    reasons = ["TimeoutError", "", "", "ConnectionBroken"]
    run = run_of(np.arange(4.0), np.arange(4.0), [0, 200, 200, 0], reasons=reasons, duration=6.0)
    early, late = run.between(0, 2), run.between(2)
    assert (early.intended.tolist(), late.intended.tolist()) == ([0.0, 1.0], [0.0, 1.0])
    assert (early.failures, late.failures) == ({"TimeoutError": 1}, {"ConnectionBroken": 1})
    assert (early.duration, late.duration, late.percentile(50)) == (2.0, 4.0, 2.0)
    nothing = run.between(7)
    assert (len(nothing.seconds), nothing.rate) == (0, 0.0)


def test_stages_follow_one_another():
    moments = in_stages([(20, 1), (10, 2)], "even")
    assert np.allclose(moments, [*np.arange(20) / 20, *(1 + np.arange(20) / 10)])
    with pytest.raises(ValueError, match="Expected a stage"):
        in_stages([])


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


def test_an_open_loop_shows_who_queued_while_a_server_stalled(answering):
    def stalls_once(number):
        return (STALL if number == 20 else 0.0), ANSWER, False

    with answering(stalls_once) as address:
        opened = drive(open_loop(address, [MESSAGE], arrivals(200, 1, "even"), connections=1))
    with answering(stalls_once) as address:
        closed = drive(closed_loop(address, [MESSAGE], concurrency=1, requests=200))
    assert opened.errors == closed.errors == 0
    # In an open loop whoever came during the stall waited for what was left of it; a closed loop sent nobody then.
    assert (opened.seconds > STALL / 2).sum() >= 0.8 * 200 * STALL / 2
    assert (closed.seconds > STALL / 2).sum() == 1
    assert opened.seconds.max() > 0.95 * STALL
    assert opened.late.min() >= 0
    assert opened.seconds.min() > 0, "nothing is sent before its moment"
    assert opened.waited.sum() >= 0.8 * 200 * STALL, "who found the only connection taken is told"
    with answering(stalls_once) as address:
        free = drive(open_loop(address, [MESSAGE], arrivals(100, 0.6, "even"), connections=100))
    assert (free.waited.sum(), free.summary()["waited_for_connection"]) == (0, 0)


def test_a_closed_loop_keeps_so_many_in_flight(answering):
    with answering(lambda number: (0.05, ANSWER, False)) as address:
        run = drive(closed_loop(address, [MESSAGE], concurrency=8, requests=80))
    assert (len(run.seconds), run.errors) == (80, 0)
    assert run.duration == pytest.approx(0.5, rel=0.4)


def test_a_closed_loop_ends_after_its_seconds(answering):
    with answering(lambda number: (0.01, ANSWER, False)) as address:
        run = drive(closed_loop(address, [MESSAGE], concurrency=2, seconds=0.3))
    assert 0.3 <= run.duration < 0.6
    with pytest.raises(ValueError, match="Expected an end"):
        drive(closed_loop(address, [MESSAGE], concurrency=2))
    with pytest.raises(ValueError, match="Expected a message"):
        drive(closed_loop(address, [], concurrency=2, requests=1))


def test_answers_in_chunks_and_closed_connections_are_read(answering):
    with answering(lambda number: (0.0, CHUNKED if number % 2 else ANSWER, number % 3 == 0)) as address:
        run = drive(closed_loop(address, [MESSAGE], concurrency=2, requests=30))
    assert run.summary()["statuses"] == {"200": 30}


def test_a_broken_answer_is_a_failure_by_name(answering):
    with answering(lambda number: (0.0, ANSWER[:25], True)) as address:
        broken = drive(closed_loop(address, [MESSAGE], concurrency=1, requests=3))
    assert broken.failures == {"ConnectionBroken": 3}
    with answering(lambda number: (0.0, b"nothing of HTTP\r\n\r\n", False)) as address:
        strange = drive(closed_loop(address, [MESSAGE], concurrency=1, requests=2))
    assert sum(strange.failures.values()) == 2
    refused = drive(closed_loop(address, [MESSAGE], concurrency=1, requests=2))
    assert refused.failures == {"ConnectionRefusedError": 2}


def test_no_answer_in_time_is_a_failure(answering):
    with answering(lambda number: (5.0, ANSWER, False)) as address:
        run = drive(open_loop(address, [MESSAGE], arrivals(20, 0.2, "even"), answer_seconds=0.1))
    assert run.failures == {"TimeoutError": 4}


def test_a_request_on_a_connection_that_was_just_closed_is_sent_again(answering):
    # The server closes without an answer every time that it has answered one request on a connection.
    with answering(lambda number: (0.0, b"" if number % 3 == 1 else ANSWER, number % 3 == 1)) as address:
        run = drive(closed_loop(address, [MESSAGE], concurrency=1, requests=20))
    assert run.errors == 0
    assert run.reopened >= 5


def test_a_request_that_a_new_connection_leaves_unanswered_is_not_sent_again(answering):
    asked = []

    def closes(number):
        asked.append(number)
        return 0.0, b"", True

    with answering(closes) as address:
        run = drive(closed_loop(address, [MESSAGE], concurrency=1, requests=3))
    assert len(asked) == 3, "each once"
    assert (run.failures, run.reopened) == ({"ConnectionBroken": 3}, 0)


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "https://127.0.0.1", "http://127.0.0.1/v1"])
def test_an_address_is_a_host_and_a_port(url):
    with pytest.raises(ValueError, match="Expected an address"):
        Address.of(url)
