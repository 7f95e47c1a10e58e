"""Median smoothing (Xu et al. 2018, Feature Squeezing, section II-B)."""

import torch.nn.functional as F
from torch import Tensor

from defenses.purifier import Purifier


class MedianSmoothing(Purifier):
    """Replace every value by the median of the ``kernel`` by ``kernel`` values of its channel around it."""

    def __init__(self, kernel: int) -> None:
        super().__init__()
        self.kernel = kernel

    def forward(self, x: Tensor, noise_scale: Tensor) -> Tensor:
        return median_filter(x, self.kernel)


def median_filter(x: Tensor, kernel: int) -> Tensor:
    """Return images (N, C, H, W) with each value at the median of a square of values around it.

    What lies beyond the edge repeats it. The square of an even ``kernel`` reaches further up and left, and of the two
    values in the middle of its even number the larger is taken.
    """
    before = kernel // 2
    after = kernel - 1 - before
    _, channels, height, width = x.shape
    padded = F.pad(x, (before, after, before, after), mode="replicate")
    values = F.unfold(padded, kernel).reshape(-1, channels, kernel**2, height * width).movedim(2, -1)
    lower = values.topk(kernel**2 // 2 + 1, dim=-1, largest=False).values
    return lower.amax(-1).reshape(-1, channels, height, width)
