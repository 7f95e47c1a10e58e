"""What becomes of an adversarial training."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

FALL = 0.2
"""The fall of the accuracy under PGD that the paper's program takes for a collapse."""


class TrainingDiverged(ArithmeticError):
    """The loss of an epoch, counted from 1, is not finite."""

    def __init__(self, epoch: int, learning_rate: float) -> None:
        super().__init__(
            f"The training diverged: expected a finite loss, got none in epoch {epoch} at a highest learning rate of "
            f"{learning_rate:g}; a smaller one may do."
        )
        self.epoch, self.learning_rate = epoch, learning_rate


@dataclass(frozen=True)
class Epoch:
    """What became of an epoch, counted from 1: mean loss and accuracy on its own examples, and on validation images.

    ``robust_accuracy`` is the share that is answered rightly both as it is and under PGD.
    """

    number: int
    loss: float
    training_accuracy: float
    clean_accuracy: float
    robust_accuracy: float


@dataclass(frozen=True)
class AdversarialTraining:
    """What became of a training; the weights are those of the epoch ``kept``.

    ``planned`` is how many epochs there were to be. ``collapsed`` is the epoch in which the accuracy under PGD fell,
    None where it never did. ``clean_accuracy`` is that on all test images, ``robust_accuracy`` on the first
    ``attacked`` of them.
    """

    planned: int
    epochs: tuple[Epoch, ...]
    kept: int
    collapsed: int | None
    precision: Literal["float32", "bfloat16"]
    clean_accuracy: float
    robust_accuracy: float
    attacked: int
    seconds: Mapping[str, float]


def has_collapsed(epochs: Sequence[Epoch]) -> bool:
    """Say whether the last epoch has learnt the one-step attack alone ("catastrophic overfitting", section 5.4).

    So it is where its accuracy under PGD is by more than 0.2 below that of the best epoch before it, or below half of
    that and of the accuracy on its own examples: a classifier that is not robust yet may lose half of little by chance,
    but then does so on those as well.
    """
    *before, last = epochs
    best = max((each.robust_accuracy for each in before), default=0.0)
    return last.robust_accuracy < max(best - FALL, min(best, last.training_accuracy) / 2)
