"""Rates over images, each with its interval, and what is counted on clean images."""

from dataclasses import dataclass
from typing import Self

from torch import Tensor

Interval = tuple[float, float]
"""The lower and the upper end of a confidence interval."""


def rate(counted: Tensor) -> float:
    """Return the share that is true among one or more, bool (N,)."""
    return int(counted.sum()) / len(counted)


def exact_interval(counted: Tensor) -> Interval:
    """Return the Clopper-Pearson interval at 95 % of the share that is true among one or more, bool (N,)."""
    return interval_of(int(counted.sum()), len(counted))


def interval_of(count: int, total: int) -> Interval:
    """Return the Clopper-Pearson interval at 95 % of a share of one or more."""
    from scipy.stats import binomtest

    low, high = binomtest(count, total).proportion_ci(0.95, method="exact")
    return float(low), float(high)


@dataclass(frozen=True)
class CleanRow:
    """What a defense did to clean images.

    ``accuracy`` counts an answer as right whether or not it is alerted; ``accepted_accuracy`` counts an alert as an
    error. ``undefended_accuracy`` is the bare classifier's. ``false_positive_interval`` is the Clopper-Pearson
    interval at 95 %.
    """

    images: int
    undefended_accuracy: float
    accuracy: float
    accepted_accuracy: float
    false_positive_rate: float
    false_positive_interval: Interval

    @classmethod
    def count(cls, *, undefended_right: Tensor, right: Tensor, alerted: Tensor) -> Self:
        """Count one or more images from three bool tensors (N,)."""
        return cls(
            images=len(right),
            undefended_accuracy=rate(undefended_right),
            accuracy=rate(right),
            accepted_accuracy=rate(right & ~alerted),
            false_positive_rate=rate(alerted),
            false_positive_interval=exact_interval(alerted),
        )
