import math
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from service.alerts import AlertFilter, AlertNotFound, AlertQueueFull, ImageNotKept


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("score", math.nan),
        ("score", math.inf),
        ("threshold", -math.inf),
        ("p_value", math.nan),
        ("p_value", 0),
        ("p_value", 1.01),
        ("class_index", -1),
        ("version", 2**31),
        ("created", datetime(2026, 11, 20, 12)),
        ("client", "a\0b"),
        ("request_id", "lone \ud800 surrogate"),
        ("request_id", "x" * 513),
        ("media_type", "image/gif"),
        ("id", "../escape"),
        ("sha256", "0" * 63),
        ("mode", "sometimes"),
        ("defence", "unknown field"),
    ],
)
def test_an_alert_that_no_database_could_take_is_refused_at_once(make_alert: Any, field: str, value: object) -> None:
    with pytest.raises(ValidationError) as refusal:
        make_alert(**{field: value})
    assert refusal.value.errors()[0]["loc"] == (field,)


def test_numbers_from_arrays_become_plain_numbers(make_alert: Any) -> None:
    alert = make_alert(class_index=np.int64(4), score=np.float32(0.5), index=np.int32(1))
    assert (type(alert.class_index), type(alert.index), type(alert.score)) == (int, int, float)


def test_times_are_kept_in_utc(make_alert: Any) -> None:
    created = datetime(2026, 11, 20, 1, 30, tzinfo=timezone(timedelta(hours=2)))
    assert make_alert(created=created).created.isoformat() == "2026-11-19T23:30:00+00:00"


def test_a_filter_refuses_a_naive_time_and_a_text_that_cannot_be_stored() -> None:
    with pytest.raises(ValidationError, match="timezone"):
        AlertFilter(since=datetime(2026, 1, 1))
    with pytest.raises(ValidationError, match="NUL"):
        AlertFilter(client="\0")
    assert AlertFilter(since=datetime(2026, 1, 1, tzinfo=UTC)).until is None


@pytest.mark.parametrize(
    "error",
    [AlertNotFound("x"), ImageNotKept("x"), AlertQueueFull(2, 7, 8, 0.5)],
    ids=lambda error: type(error).__name__,
)
def test_an_error_reads_as_one_sentence(error: Exception) -> None:
    assert str(error)[0].isalnum()
    assert str(error).endswith(".")
