"""How a response is fitted."""

import math
from dataclasses import dataclass

from defenses.nip.response import PushKind
from defenses.nip.substitute_training import SubstitutePlan

ATTACKS = ("fgsm", "pgd-stop", "pgd:epsilon=8/255,steps=20", "deepfool")


@dataclass(frozen=True)
class ResponsePlan:
    """Say how images are pushed, and how much of the clean accuracy the response to it may cost.

    ``push`` is a blur of weight ``weight`` (``smoothing``, see ``Smoothing``), or the mean inverse perturbation of the
    predicted class (``inverse``), of ``candidates`` benign images, of a ``layer`` that is found by itself when None
    (``Classifier.head_layer``), with ``k1`` front and ``k2`` tail neurons, at a root mean square of ``size``. With a
    ``substitute`` it is made of that classifier's gradients, and the one that is defended is only asked. At most a
    share ``accuracy_loss`` of the clean calibration images may be lost. ``attacks`` are what the defense is measured
    against, on ``test_examples`` images each; nothing is fitted on them. Raises ``ValueError`` for what cannot be.
    """

    push: PushKind = "smoothing"
    weight: float = 0.15
    size: float = 7 / 255
    layer: str | None = None
    k1: int = 5
    k2: int = 5
    candidates: int = 5000
    substitute: SubstitutePlan | None = None
    accuracy_loss: float = 0.01
    attacks: tuple[str, ...] = ATTACKS
    test_examples: int = 300
    batch_size: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.k1, self.k2) < 0 or not self.k1 + self.k2:
            raise ValueError(f"Expected k1 and k2 of 0 or more, and not both 0, got {self.k1} and {self.k2}.")
        for name in ("size", "candidates", "test_examples", "batch_size"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"Expected {name} above 0, got {getattr(self, name)}.")
        if self.substitute and (self.push != "inverse" or self.layer):
            raise ValueError("A substitute is there to make inverse perturbations of, of the layer found by itself.")
        if not 0 < self.weight <= 1 / 3:
            raise ValueError(f"Expected a weight above 0 and at most a third, got {self.weight}.")
        if not 0 <= self.accuracy_loss < 1:
            raise ValueError(f"Expected an accuracy_loss of 0 or more and below 1, got {self.accuracy_loss}.")
