"""How a classifier is trained adversarially, and what that takes."""

import math
from dataclasses import dataclass

from defenses.attacks import Attack, attack

LEAST_VALIDATION = 50
"""The fewest images by whose accuracy under PGD a collapse can be told."""


class ImagesTooFew(ValueError):
    """A data set has too few images to train or to validate on; ``expected`` and ``found`` count them."""

    def __init__(self, what: str, expected: int, found: int) -> None:
        super().__init__(f"Expected at least {expected} {what}, got {found}.")
        self.expected, self.found = expected, found


@dataclass(frozen=True)
class AdversarialPlan:
    """Say how a classifier is trained adversarially.

    ``epochs`` are trained, unless ``minutes`` are given, which hold one at least. ``epsilon`` bounds the perturbations
    in the L-infinity norm, for images in [0, 1]; ``alpha`` is the one step's size, None for 1.25 ``epsilon``.
    ``learning_rate`` is the highest, in the middle of the training. ``flip`` mirrors half of the images.
    The accuracy under PGD is measured on the first ``validation_examples`` after each epoch and on the first
    ``test_examples`` at the end. Raises ``ValueError`` for values that cannot be.
    """

    epochs: int = 15
    minutes: float | None = None
    epsilon: float = 8 / 255
    alpha: float | None = None
    batch_size: int = 128
    learning_rate: float = 0.2
    flip: bool = True
    validation_examples: int = 512
    test_examples: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.epsilon < 1:
            raise ValueError(f"Expected epsilon above 0 and below 1, got {self.epsilon:g}.")
        if self.alpha is not None and not 0 < self.alpha <= 2 * self.epsilon:
            raise ValueError(
                f"Expected alpha above 0 and at most twice epsilon, {2 * self.epsilon:g}, got {self.alpha:g}."
            )
        for name, least in (("epochs", 1), ("batch_size", 2), ("validation_examples", LEAST_VALIDATION), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"Expected {name} of {least} or more, got {getattr(self, name)}.")
        for name in ("minutes", "learning_rate", "test_examples"):
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf:
                raise ValueError(f"Expected {name} above 0 and finite, got {value:g}.")

    @property
    def step_size(self) -> float:
        """The size of the one step of an example in training."""
        return 1.25 * self.epsilon if self.alpha is None else self.alpha

    @property
    def measured_by(self) -> Attack:
        """The attack that the accuracy is measured under: PGD of 10 steps of a fourth of epsilon."""
        return attack(f"pgd:epsilon={self.epsilon!r},step_size={self.epsilon / 4!r},steps=10")


def check_feasible(plan: AdversarialPlan, *, fit: int, validation: int) -> None:
    """Refuse a plan for which a split has too few images; raises ``ImagesTooFew``."""
    if fit < plan.batch_size:
        raise ImagesTooFew("images to fit on, as many as are in a batch", plan.batch_size, fit)
    if validation < LEAST_VALIDATION:
        raise ImagesTooFew("images to validate on", LEAST_VALIDATION, validation)
