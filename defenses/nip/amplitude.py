"""The strength of the inverse perturbation, set by what it costs on clean images."""

from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
from torch import Tensor

from defenses.classifier import Classifier
from defenses.evaluation import Progress
from defenses.nip.inverse_perturbation import InversePerturbation, moved
from defenses.pixels import to_float


@dataclass(frozen=True)
class Tried:
    """One amplitude, and the share of the clean validation images that are then answered with their class."""

    amplitude: float
    accuracy: float


@dataclass(frozen=True)
class Strength:
    """Hold the amplitude that was taken, the bare classifier's accuracy on the same images, and all that were tried.

    ``within`` says whether the amplitude costs no more accuracy than allowed, None where no limit was set.
    """

    amplitude: float
    undefended_accuracy: float
    within: bool | None
    tried: tuple[Tried, ...]

    def as_json(self) -> dict[str, Any]:
        """Return the strength as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Return the strength that ``as_json`` described."""
        return cls(**{**values, "tried": tuple(Tried(**each) for each in values["tried"])})


def choose_amplitude(
    classifier: Classifier,
    purifier: InversePerturbation,
    images: Tensor,
    targets: Tensor,
    amplitudes: tuple[float, ...],
    accuracy_loss: float | None,
    *,
    batch_size: int,
    device: torch.device,
    progress: Progress,
) -> Strength:
    """Return the largest amplitude that costs at most a loss of accuracy on images, uint8 (N, C, H, W), N at least 1.

    Where each costs more it is the smallest. Without an ``accuracy_loss`` there is one amplitude, which is taken as it
    is. Classifier and purifier are in evaluation mode on ``device``. No adversarial example is looked at.
    """
    right, undefended = _count_right(
        classifier, purifier, images, targets, amplitudes, batch_size=batch_size, device=device, progress=progress
    )
    bare = undefended / len(targets)
    tried = tuple(Tried(*each) for each in zip(amplitudes, (count / len(targets) for count in right), strict=True))
    if accuracy_loss is None:
        return Strength(amplitudes[0], bare, None, tried)
    # Counts are compared, since of rates the difference may come out a hair above the loss that it is.
    most_lost = round(accuracy_loss * len(targets), 9)
    allowed = [each for each, count in zip(amplitudes, right, strict=True) if undefended - count <= most_lost]
    return Strength(max(allowed) if allowed else min(amplitudes), bare, bool(allowed), tried)


@torch.no_grad()
def _count_right(
    classifier: Classifier,
    purifier: InversePerturbation,
    images: Tensor,
    targets: Tensor,
    amplitudes: tuple[float, ...],
    *,
    batch_size: int,
    device: torch.device,
    progress: Progress,
) -> tuple[list[int], int]:
    """Return how many images are answered with their class at each amplitude, and by the bare classifier."""
    right, undefended = [0] * len(amplitudes), 0
    for place, (batch, y) in enumerate(zip(images.split(batch_size), targets.split(batch_size), strict=True)):
        x, y = to_float(batch.to(device)), y.to(device)
        logits, activations = classifier.logits_and_features(x, purifier.config.layer)
        undefended += int((logits.argmax(1) == y).sum())
        direction = purifier.direction(x, activations, logits)
        for index, amplitude in enumerate(amplitudes):
            right[index] += int((classifier(moved(x, direction, amplitude)).argmax(1) == y).sum())
        progress("amplitude", min((place + 1) * batch_size, len(targets)), len(targets))
    return right, undefended
