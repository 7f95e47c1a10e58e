"""How a correction behind an Inspector's alert is fitted."""

import math
from dataclasses import dataclass

ATTACKS = ("fgsm", "pgd-stop", "pgd", "deepfool")


@dataclass(frozen=True)
class GatedPlan:
    """Say how alerted images are corrected, and how much of the clean accuracy that may cost.

    ``layer`` is found by itself when None (``Classifier.head_layer``); ``k1`` front and ``k2`` tail neurons of it are
    taken. The inverse perturbation changes a pixel's values by a root mean square of ``size``, after Gaussian noise of
    the standard deviation ``noise``. An image is alerted at a false-positive rate of at most ``budget``, and no more of
    them than costs a share ``accuracy_loss`` of the clean calibration images. The alert is fitted to ``attacks`` on
    ``validation_examples`` images each, and the whole measured against them on ``test_examples``. Raises ``ValueError``
    for what cannot be.
    """

    layer: str | None = None
    k1: int = 5
    k2: int = 5
    size: float = 3.7 / 255
    noise: float = 4.6 / 255
    budget: float = 0.05
    accuracy_loss: float = 0.01
    attacks: tuple[str, ...] = ATTACKS
    validation_examples: int = 400
    test_examples: int = 300
    batch_size: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.k1, self.k2) < 0 or not self.k1 + self.k2:
            raise ValueError(f"Expected k1 and k2 of 0 or more, and not both 0, got {self.k1} and {self.k2}.")
        for name in ("size", "validation_examples", "test_examples", "batch_size"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"Expected {name} above 0, got {getattr(self, name)}.")
        if not 0 <= self.noise < math.inf:
            raise ValueError(f"Expected noise of 0 or more, got {self.noise}.")
        if not 0 <= self.accuracy_loss < 1:
            raise ValueError(f"Expected an accuracy_loss of 0 or more and below 1, got {self.accuracy_loss}.")
        if not self.attacks:
            raise ValueError("Expected an attack or more to fit the alert to, got none.")
