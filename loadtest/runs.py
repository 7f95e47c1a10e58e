"""What a run of requests showed: how long each took, what it was answered, and the figures that tell it."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

OK = 200
TOO_MANY = 429


@dataclass(frozen=True, eq=False)
class Run:
    """The requests of one run, in the order in which they were to be sent; all arrays are (N,).

    ``intended`` and ``seconds`` are when a request was to be sent, counted from the run's start, and how long after
    that moment its answer was there. ``statuses`` are the answers' or 0 where there was none; ``failures`` counts those
    by the error's name. ``late`` is how long after its moment a request was really taken up by the client, and
    ``duration`` the seconds from the start to the last answer.
    """

    intended: np.ndarray
    seconds: np.ndarray
    statuses: np.ndarray
    late: np.ndarray
    failures: Mapping[str, int]
    duration: float
    reopened: int = 0

    def after(self, second: float) -> "Run":
        """Return the requests that were to be sent from a moment on."""
        kept = self.intended >= second
        columns = (self.intended[kept], self.seconds[kept], self.statuses[kept], self.late[kept])
        failures = self.failures if (self.statuses[kept] == 0).any() else {}
        return Run(*columns, failures, self.duration - second, self.reopened)

    @property
    def errors(self) -> int:
        """How many requests were not answered with 200."""
        return int((self.statuses != OK).sum())

    @property
    def rate(self) -> float:
        """Requests answered with 200 per second."""
        return float((self.statuses == OK).sum() / self.duration)

    def percentile(self, percent: float) -> float:
        """Return the latency in seconds that so many per cent of the requests answered with 200 do not exceed.

        It is one that was measured (nearest rank), and infinite where no request was answered so.
        """
        accepted = self.seconds[self.statuses == OK]
        if not len(accepted):
            return float("inf")
        return float(np.percentile(accepted, percent, method="inverted_cdf"))

    def summary(self) -> dict[str, Any]:
        """Return the figures of the run as JSON values: latencies in milliseconds, of requests answered with 200."""
        answered = Counter(self.statuses[self.statuses != 0].tolist())
        accepted = bool((self.statuses == OK).any())
        latencies = {f"p{percent}": 1000 * self.percentile(percent) for percent in (50, 90, 99)} if accepted else {}
        if accepted:
            latencies["max"] = 1000 * float(self.seconds[self.statuses == OK].max())
        return {
            "requests": len(self.seconds),
            "seconds": self.duration,
            "per_second": self.rate,
            "milliseconds": latencies,
            "statuses": {str(status): count for status, count in sorted(answered.items())},
            "too_many": answered[TOO_MANY],
            "failures": dict(self.failures),
            "reopened_connections": self.reopened,
            "client_late_p99": 1000 * float(np.percentile(self.late, 99)) if len(self.late) else 0.0,
        }
