"""What a run of requests showed: how long each took, what it was answered, and the figures that tell it."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

OK = 200
TOO_MANY = 429


@dataclass(frozen=True, eq=False)
class Run:
    """The requests of one run, in the order in which they were to be sent; all arrays are (N,).

    ``intended`` and ``seconds`` are when a request was to be sent, counted from the run's start, and how long after
    that moment its answer was there. ``statuses`` are the answers' or 0 where there was none, and ``reasons`` the name
    of the error there, else empty. ``late`` is how long after its moment a request was really taken up by the client,
    ``waited`` whether it then had to wait for one of the client's connections, and ``duration`` the seconds from the
    start to the last answer. ``reopened`` counts over the whole run, in a part of it too.
    """

    intended: np.ndarray
    seconds: np.ndarray
    statuses: np.ndarray
    late: np.ndarray
    waited: np.ndarray
    reasons: np.ndarray
    duration: float
    reopened: int = 0

    def between(self, first: float, last: float = float("inf")) -> "Run":
        """Return the requests that were to be sent in the seconds [first, last), counted from the first."""
        kept = (self.intended >= first) & (self.intended < last)
        columns = (self.seconds, self.statuses, self.late, self.waited, self.reasons)
        intended = self.intended[kept] - first
        answered = float((intended + self.seconds[kept]).max(initial=0.0))
        duration = max(answered, min(last, self.duration) - first)
        return Run(intended, *(column[kept] for column in columns), duration, self.reopened)

    @property
    def failures(self) -> dict[str, int]:
        """How many requests were not answered, by the error's name."""
        return dict(Counter(self.reasons[self.statuses == 0].tolist()))

    @property
    def errors(self) -> int:
        """How many requests were not answered with 200."""
        return int((self.statuses != OK).sum())

    @property
    def rate(self) -> float:
        """Requests answered with 200 per second."""
        return float((self.statuses == OK).sum() / self.duration) if self.duration > 0 else 0.0

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
            "failures": self.failures,
            "reopened_connections": self.reopened,
            "waited_for_connection": int(self.waited.sum()),
            "client_late_p99": 1000 * float(np.percentile(self.late, 99)) if len(self.late) else 0.0,
        }
