"""The own inverse perturbation: an alerted image is moved against what speaks for the class that it was given."""

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from defenses.classifier import Classifier
from defenses.corrector import Corrected, Corrector
from defenses.nip.head import AutogradHead, Head
from defenses.nip.influence import log_odds_influence
from defenses.nip.neurons import select_neurons
from defenses.nip.push import drawn_direction, unit
from defenses.noise import gaussian_like
from defenses.onnx_import import LOGITS
from defenses.purifier import PurifierNotExportable


@dataclass(frozen=True)
class CorrectionConfig:
    """Say how an alerted image is corrected.

    ``layer`` is the layer's name and ``shape`` that of one image's activations there, ``k1`` and ``k2`` how many front
    and tail neurons are taken. ``size`` is the root mean square by which the inverse perturbation changes a pixel's
    values, ``noise`` the standard deviation of the Gaussian noise that is added before it.
    """

    layer: str
    shape: tuple[int, ...]
    classes: int
    k1: int
    k2: int
    size: float
    noise: float

    def as_json(self) -> dict[str, Any]:
        """Return the configuration as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Return the configuration that ``as_json`` described."""
        return cls(**{**values, "shape": tuple(values["shape"])})


class Replaced(NamedTuple):
    """A direction to take in place of the inverse perturbation, a control: Gaussian noise, or one of candidates."""

    candidates: Tensor | None = None


class InverseCorrection(Corrector):
    """Weaken the neurons that speak most for the class that the bare classifier gave, and strengthen the least.

    The purified image, with noise added, is moved against the gradient of the front neurons' outputs less the tail's
    (NIP, equations 5 and 6, with the sign of the authors' program), by a fixed distance. Front and tail are by the
    influence on the log odds of the class that the bare classifier gave the image as it came in, which an alert says is
    wrong. What the classifier says of the moved image is answered. It takes two passes of the classifier and one back.

    ``replaced`` takes another direction, for measurement.
    """

    def __init__(self, config: CorrectionConfig, classifier: Classifier, head: Head) -> None:
        super().__init__()
        self.config = config
        self.head = head
        self.replaced: Replaced | None = None
        self._classifier = (classifier,)  # in a tuple: it is the protected classifier's, and no part of this one

    def check_exportable(self) -> None:
        """Raise ``HeadUnsuitable`` for a head that needs autograd, ``PurifierNotExportable`` for a control."""
        if isinstance(self.head, AutogradHead):
            raise self.head.reason
        if self.replaced is not None:
            raise PurifierNotExportable("A control direction is there to be measured and not to be served.")

    def forward(self, purified: Tensor, undefended_logits: Tensor, noise_scale: Tensor) -> Corrected:
        """Return what is made of the purified images; no gradient passes through the choice of the direction."""
        (classifier,) = self._classifier
        start = self.start(purified, noise_scale)
        if self.replaced is None:
            direction = unit(self.gradient(classifier, start.detach(), undefended_logits.detach()))
        else:
            direction = drawn_direction(start, self.replaced.candidates)
        moved = self.moved(start, direction)
        return Corrected(classifier(moved), moved)

    def start(self, purified: Tensor, noise_scale: Tensor) -> Tensor:
        """Return the images from which the inverse perturbation is taken."""
        noisy: Tensor = (purified + noise_scale * self.config.noise * gaussian_like(purified)).clamp(0, 1)
        return noisy

    def moved(self, start: Tensor, direction: Tensor) -> Tensor:
        """Return images moved against a direction of L2 norm 1."""
        return torch.clamp(start - self.config.size * start[0].numel() ** 0.5 * direction, 0, 1)

    def gradient(self, classifier: Classifier, start: Tensor, undefended_logits: Tensor) -> Tensor:
        """Return (N, C, H, W) the gradient of the front neurons' outputs less the tail's."""
        x = start.requires_grad_()
        with torch.enable_grad():
            activations, logits = classifier.graph(x, (self.config.layer, LOGITS))
            weights = self.neuron_weights(start.detach(), activations.detach(), logits.detach(), undefended_logits)
            (gradient,) = torch.autograd.grad((activations * weights).sum(), x)
        return gradient

    def neuron_weights(self, start: Tensor, activations: Tensor, logits: Tensor, undefended_logits: Tensor) -> Tensor:
        """Return (N, ...) what each activation counts: 1 of a front neuron, -1 of a tail neuron, shared by its map."""
        influence = log_odds_influence(self.head, start, activations, logits, undefended_logits.argmax(1))
        neurons = select_neurons(influence, self.config.k1, self.config.k2)
        places = torch.arange(influence.shape[1], device=logits.device)
        front, tail = ((each.unsqueeze(2) == places).any(1).to(logits.dtype) for each in (neurons.front, neurons.tail))
        weights: Tensor = front - tail
        if activations.ndim == 4:
            weights = weights.reshape(*weights.shape, 1, 1).expand_as(activations) / activations[0, 0].numel()
        return weights
