"""How resistance and false positives trade as the threshold sweeps."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

MOST_POINTS = 200


@dataclass(frozen=True, eq=False)
class ResistanceCurve:
    """The resistance rate over the false-positive rate, each (P,) float64, for every threshold there can be.

    Both rise from the threshold that alerts of nothing to the one that alerts of everything.
    """

    false_positive_rate: Tensor
    resistance_rate: Tensor

    @classmethod
    def sweep(cls, clean_scores: Tensor, scores: Tensor, corrected: Tensor) -> Self:
        """Sweep the threshold over all scores (CoopHANCE, section 4.1.1).

        ``clean_scores`` (M,) are those of clean images, ``scores`` (N,) those of adversarial examples, M and N at least
        1, and ``corrected`` bool (N,) says which of the examples are answered with the true class: they are resisted at
        any threshold, so that the curve starts at their share. Where none is, this is the detector's ROC curve.
        Raises ``ValueError`` for a score that is not finite.
        """
        clean, adversarial = clean_scores.double(), scores.double()
        if not (torch.isfinite(clean).all() and torch.isfinite(adversarial).all()):
            raise ValueError("Every score must be finite, and some are not.")
        thresholds = torch.cat([clean, adversarial]).unique()
        adversarial = adversarial.masked_fill(corrected, torch.inf)
        return cls(*(_rates_above(thresholds, each) for each in (clean, adversarial)))

    @property
    def area(self) -> float:
        """The area under the curve; a tie of a clean and an adversarial score counts half."""
        return float(torch.trapezoid(self.resistance_rate, self.false_positive_rate))

    def thinned(self) -> tuple[tuple[float, float], ...]:
        """Return at most 200 of the points (false-positive rate, resistance rate), spread evenly along the curve."""
        passed = self.false_positive_rate + self.resistance_rate
        wanted = torch.linspace(float(passed[0]), float(passed[-1]), MOST_POINTS, dtype=torch.float64)
        kept = torch.searchsorted(passed, wanted).clamp_max(len(passed) - 1).unique()
        return tuple(zip(self.false_positive_rate[kept].tolist(), self.resistance_rate[kept].tolist(), strict=True))


def _rates_above(thresholds: Tensor, scores: Tensor) -> Tensor:
    """Return the share of scores above each of the ascending thresholds, from the highest down, then 1."""
    above = len(scores) - torch.searchsorted(scores.sort().values, thresholds, right=True)
    return torch.cat([above.flip(0), torch.tensor([len(scores)])]).double() / len(scores)
