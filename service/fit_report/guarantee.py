"""What calibration promises of the false-positive rate, before anything is measured."""

from dataclasses import dataclass

from defenses.calibration import check_budget
from defenses.evaluation.rates import Interval


@dataclass(frozen=True)
class Guarantee:
    """What split conformal calibration on ``calibrated_on`` clean images promises.

    A further clean image is alerted with probability at most ``budget``. Over all calibration samples, the rate on
    ``measured_on`` further images has the mean ``expected``, the standard deviation ``standard_deviation`` and lies in
    ``interval`` with 95 % probability (beta-binomial distribution, for scores without ties). Those three are None
    where each class has a threshold of its own: the promise then holds class by class.
    """

    budget: float
    calibrated_on: int
    measured_on: int
    expected: float | None = None
    standard_deviation: float | None = None
    interval: Interval | None = None


def guarantee_of(budget: float, *, calibrated_on: int, measured_on: int, per_class: bool) -> Guarantee:
    """Return what calibration on so many clean images promises of the rate on so many others, each at least 1.

    Raises ``CalibrationTooSmall``, and ``ValueError`` for a budget outside (0, 1).
    """
    if per_class:
        return Guarantee(budget, calibrated_on, measured_on)
    from scipy.stats import betabinom

    rank = check_budget(calibrated_on, budget)
    alerted = betabinom(measured_on, calibrated_on + 1 - rank, rank)
    return Guarantee(
        budget,
        calibrated_on,
        measured_on,
        expected=(calibrated_on + 1 - rank) / (calibrated_on + 1),
        standard_deviation=float(alerted.std()) / measured_on,
        interval=(float(alerted.ppf(0.025)) / measured_on, float(alerted.ppf(0.975)) / measured_on),
    )
