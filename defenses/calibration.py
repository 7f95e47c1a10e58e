"""Thresholds for a false-positive budget, from scores of benign images that nothing was fitted on."""

import math

import torch
from torch import Tensor


class CalibrationTooSmall(ValueError):
    """The calibration sample cannot support the false-positive budget."""

    def __init__(self, count: int, budget: float) -> None:
        self.count = count
        self.budget = budget
        self.needed = math.ceil(1 / budget) - 1
        super().__init__(
            f"A false-positive budget of {budget:g} needs at least {self.needed} benign calibration images, "
            f"got {count}."
        )


def calibrate(scores: Tensor, budget: float) -> float:
    """Return the lowest threshold that keeps the false-positive rate within ``budget``.

    ``scores`` are those of n exchangeable benign images, (n,). The threshold is their k-th smallest,
    k = ceil((n + 1) (1 - budget)), and an alert is a score above it: a further benign image is then alerted with
    probability at most ``budget``, whatever the distribution of the scores (split conformal prediction). The rate
    realised on one test set still varies around its mean, with a standard deviation near sqrt(budget / n).
    Raises ``CalibrationTooSmall`` when n < 1 / budget - 1, and ``ValueError`` for a budget outside (0, 1) or a score
    that is not finite.
    """
    if not torch.isfinite(scores).all():
        raise ValueError("Every calibration score must be finite.")
    rank = check_budget(scores.numel(), budget)
    return float(scores.flatten().kthvalue(rank).values)


def check_budget(count: int, budget: float) -> int:
    """Return the rank, from 1, of the score that ``calibrate`` takes among ``count``; raises as it does."""
    if not 0 < budget < 1:
        raise ValueError(f"A false-positive budget lies between 0 and 1, got {budget:g}.")
    # Rounded, since (n + 1) (1 - budget) may come out a hair above the whole number that it is.
    rank = math.ceil(round((count + 1) * (1 - budget), 9))
    if rank > count:
        raise CalibrationTooSmall(count, budget)
    return rank
