"""Ids of alerts: UUIDs of version 7, which sort by the time they were made (RFC 9562, section 5.7)."""

import re
import secrets
import threading
import time
import uuid
from datetime import UTC, datetime, timedelta

from service.alerts.errors import AlertIdInvalid

_ALERT_ID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_COUNTER_BITS = 42


class AlertIdSequence:
    """Makes UUIDs of version 7, each greater than the one before, from any thread.

    48 bits of Unix milliseconds, a 42-bit counter that starts at random in each millisecond, 32 random bits
    (RFC 9562, section 6.2, method 1). A clock set back does not: the last millisecond seen is counted on.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._milliseconds = -1
        self._counter = 0

    def next(self, milliseconds: int) -> uuid.UUID:
        """Return the next id, for a time in Unix milliseconds."""
        with self._lock:
            if milliseconds > self._milliseconds:
                self._reseed(milliseconds)
            else:
                self._counter += 1
                if self._counter >> _COUNTER_BITS:
                    self._reseed(self._milliseconds + 1)
            time_bits, counter = self._milliseconds, self._counter
        high, low = counter >> 30, counter & 0x3FFF_FFFF
        return uuid.UUID(int=time_bits << 80 | 7 << 76 | high << 64 | 2 << 62 | low << 32 | secrets.randbits(32))

    def _reseed(self, milliseconds: int) -> None:
        # The counter's top bit starts at 0, which leaves room for 2**41 ids in any one millisecond.
        self._milliseconds = milliseconds
        self._counter = secrets.randbits(_COUNTER_BITS - 1)


# One per process: ids are in order within a process only if they all come from the same sequence.
_SEQUENCE = AlertIdSequence()


def new_alert_id() -> str:
    """Make an alert's id: a UUID of version 7 in canonical text, greater than every one made before in this process."""
    return str(_SEQUENCE.next(time.time_ns() // 1_000_000))


def is_alert_id(text: str) -> bool:
    """Return whether this is a canonical UUID of version 7."""
    return _ALERT_ID.fullmatch(text) is not None


def check_alert_id(alert_id: str) -> str:
    """Return the id as it came. Raises AlertIdInvalid unless it is a canonical UUID of version 7."""
    if not is_alert_id(alert_id):
        raise AlertIdInvalid(alert_id)
    return alert_id


def alert_id_time(alert_id: str) -> datetime:
    """Return when the id was made, in UTC, to the millisecond. Raises AlertIdInvalid."""
    return _EPOCH + timedelta(milliseconds=uuid.UUID(check_alert_id(alert_id)).int >> 80)
