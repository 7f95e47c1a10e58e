"""Fewer bits for each value (Xu et al. 2018, Feature Squeezing, section II-A)."""

from torch import Tensor

from defenses.purifier import Purifier


class BitDepthReduction(Purifier):
    """Round every value in [0, 1] to the nearest of 2^``bits`` that are spread evenly over that range."""

    differentiable = False

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    def forward(self, x: Tensor, noise_scale: Tensor) -> Tensor:
        return reduce_bit_depth(x, self.bits)


def reduce_bit_depth(x: Tensor, bits: int) -> Tensor:
    """Return images in [0, 1], any shape, with each value at the nearest of 2^bits levels; its derivative is zero."""
    steps = 2**bits - 1
    reduced: Tensor = (x * steps).round() / steps
    return reduced
