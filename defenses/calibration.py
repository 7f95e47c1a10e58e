"""Thresholds for a false-positive budget, from scores of benign images that nothing was fitted on."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class CalibrationTooSmall(ValueError):
    """The calibration sample cannot support the false-positive budget."""

    def __init__(self, count: int, budget: float, answered: int | None = None) -> None:
        self.count = count
        self.budget = budget
        self.needed = math.ceil(1 / budget) - 1
        where = "" if answered is None else f" that are given class {answered}"
        super().__init__(
            f"A false-positive budget of {budget:g} needs at least {self.needed} benign calibration images{where}, "
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


def check_class_budgets(counts: Sequence[int], budget: float) -> None:
    """Refuse so many calibration images of each class as cannot support a threshold for each; raises as above."""
    for c, count in enumerate(counts):
        try:
            check_budget(count, budget)
        except CalibrationTooSmall:
            raise CalibrationTooSmall(count, budget, c) from None


def calibrate_classes(scores: Tensor, predicted: Tensor, classes: int, budget: float) -> list[float]:
    """Return a threshold for each class that a benign image may be given, each with the guarantee of ``calibrate``.

    ``scores`` (n,) and ``predicted`` int64 (n,) are those of the calibration images. A further benign image that is
    given class c is alerted with probability at most ``budget``, for every c. Raises as ``calibrate`` does, with the
    class that too few images are given.
    """
    check_class_budgets(torch.bincount(predicted, minlength=classes).tolist(), budget)
    return [calibrate(scores[predicted == c], budget) for c in range(classes)]


def p_values(scores: Tensor, calibration_scores: Tensor) -> Tensor:
    """Return (N,) how likely a benign image has a score as high as each of ``scores`` (N,), at most.

    With n calibration scores it is (1 + those not below) / (n + 1): for a further benign image the probability that
    it comes out at most p is at most p, for every p (conformal p-value). It cannot come out below 1 / (n + 1).
    """
    ascending = calibration_scores.sort().values
    not_below = len(ascending) - torch.searchsorted(ascending, scores.contiguous())
    return (1 + not_below) / (len(ascending) + 1)
