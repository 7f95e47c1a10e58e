"""MagNet: an autoencoder reforms, and what it changes is held against benign images (Meng and Chen 2017)."""

import torch
from torch import Tensor, nn

from defenses.baselines.exceedance import Exceedance
from defenses.detector import Detector, Evidence
from defenses.purifier import Purifier

TEMPERATURES = (10.0, 40.0)
"""The T of the two detectors by probability divergence (section 5.3)."""

WIDTH = 32
"""The channels of the two inner layers, as published for CIFAR-10 (table 4)."""


class Reformer(Purifier):
    """Map images of so many ``channels`` to their reconstruction by a convolutional autoencoder (section 4.3).

    Three convolutions of 3 by 3, the inner two of 32 channels. Those are followed by ReLU and not by the published
    sigmoid, which takes its hundreds of epochs to come as far.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, WIDTH, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(WIDTH, WIDTH, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(WIDTH, channels, 3, padding=1),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor, noise_scale: Tensor) -> Tensor:
        reconstruction: Tensor = self.layers(x)
        return reconstruction


class MagNetDetector(Detector):
    """Score images by the most unusual of MagNet's statistics (section 4.2).

    They are the reconstruction error, and for two temperatures T the Jensen-Shannon divergence of softmax(logits / T)
    between the image and its reconstruction. The paper gives each a threshold of its own, for the same share of benign
    images; here each becomes -log2 of the share of benign images that exceed it, and the score is the largest, so that
    one threshold holds for all.
    """

    def __init__(self) -> None:
        super().__init__(None, "raw")
        self.exceedance = Exceedance(1 + len(TEMPERATURES))

    def forward(self, activations: Tensor, logits: Tensor, undefended_logits: Tensor, distance: Tensor) -> Tensor:
        unusual: Tensor = self.exceedance(self.statistics(Evidence(activations, logits, undefended_logits, distance)))
        return unusual.amax(1).to(distance.dtype)

    def statistics(self, evidence: Evidence) -> Tensor:
        """Return the reconstruction error, and the divergence for each temperature, (N, 3) float64."""
        divergences = [divergence(evidence.undefended_logits, evidence.logits, each) for each in TEMPERATURES]
        return torch.stack([evidence.distance.double(), *divergences], 1)


def divergence(logits: Tensor, others: Tensor, temperature: float) -> Tensor:
    """Return (N,) the Jensen-Shannon divergence, float64 in nats, of the probabilities of two logits (N, K) each."""
    first, second = ((each.double() / temperature).log_softmax(1) for each in (logits, others))
    middle = ((first.exp() + second.exp()) / 2).log()
    apart = first.exp() * (first - middle) + second.exp() * (second - middle)
    return (apart.sum(1) / 2).clamp_min(0)
