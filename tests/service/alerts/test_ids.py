import threading
import time
import uuid
from datetime import UTC, datetime, timedelta

import pytest

from service.alerts import AlertIdInvalid, new_alert_id
from service.alerts.ids import AlertIdSequence, alert_id_time, check_alert_id


def test_an_id_is_a_canonical_uuid_of_version_7_that_holds_the_time() -> None:
    before = time.time_ns() // 1_000_000
    text = new_alert_id()
    after = time.time_ns() // 1_000_000
    parsed = uuid.UUID(text)
    assert str(parsed) == text
    assert (parsed.version, parsed.variant) == (7, uuid.RFC_4122)
    assert before <= parsed.int >> 80 <= after
    assert abs(alert_id_time(text) - datetime.now(UTC)) < timedelta(seconds=5)


def test_ids_made_in_many_threads_are_unique_and_rise_within_each_thread() -> None:
    made: dict[int, list[str]] = {}
    start = threading.Barrier(8)

    def make(number: int) -> None:
        start.wait()
        made[number] = [new_alert_id() for _ in range(4000)]

    threads = [threading.Thread(target=make, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id for ids in made.values() for id in ids}) == 8 * 4000
    assert all(ids == sorted(ids) for ids in made.values())


def test_a_clock_set_back_does_not_turn_the_order() -> None:
    sequence = AlertIdSequence()
    ids = [sequence.next(milliseconds) for milliseconds in (1000, 1000, 400, 0, 1000, 1001, 1001)]
    assert ids == sorted(set(ids))
    assert [id.int >> 80 for id in ids] == [1000, 1000, 1000, 1000, 1000, 1001, 1001]


def test_a_counter_that_runs_over_goes_on_in_the_next_millisecond() -> None:
    sequence = AlertIdSequence()
    first = sequence.next(1000)
    sequence._counter = 2**42 - 2
    last, beyond = sequence.next(1000), sequence.next(1000)
    assert first < last < beyond
    assert (last.int >> 80, beyond.int >> 80) == (1000, 1001)
    assert all(id.version == 7 and id.variant == uuid.RFC_4122 for id in (first, last, beyond))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "../../etc/passwd",
        "018f2f6e-0000-7000-8000-000000000000/..",
        "018f2f6e-0000-7000-8000-00000000000\n",
        "018f2f6e-0000-7000-8000-000000000000\n",
        "018F2F6E-0000-7000-8000-000000000000",
        "018f2f6e000070008000000000000000",
        "{018f2f6e-0000-7000-8000-000000000000}",
        "018f2f6e-0000-4000-8000-000000000000",
        "018f2f6e-0000-7000-c000-000000000000",
        "\u06618f2f6e-0000-7000-8000-000000000000",
    ],
)
def test_what_is_not_a_canonical_uuid_of_version_7_is_refused(text: str) -> None:
    with pytest.raises(AlertIdInvalid, match="UUID of version 7"):
        check_alert_id(text)
