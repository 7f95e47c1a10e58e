"""Additive Gaussian noise before the classifier."""

from torch import Tensor

from defenses.noise import gaussian_like
from defenses.purifier import Purifier


class AdditiveNoise(Purifier):
    """Add independent draws from N(0, ``sigma``^2) to every value, for values in [0, 1], and clip to that range.

    Each image has draws of its own, and new ones whenever it is seen.
    """

    def __init__(self, sigma: float) -> None:
        super().__init__()
        self.sigma = sigma

    def forward(self, x: Tensor, noise_scale: Tensor) -> Tensor:
        return (x + noise_scale * self.sigma * gaussian_like(x)).clamp(0, 1)
