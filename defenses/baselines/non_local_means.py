"""Non-local means (Buades, Coll and Morel 2005)."""

import torch.nn.functional as F
from torch import Tensor


def non_local_means(x: Tensor, search: int, patch: int, strength: float) -> Tensor:
    """Return images (N, C, H, W) in [0, 1] with each pixel at a mean of those in a square around it.

    The square is ``search`` by ``search``, both sizes being odd. A pixel counts exp(-d / ``strength``^2), where d is
    the mean squared difference of the ``patch`` by ``patch`` values around the two, over all channels; ``strength`` is
    in units of a value. What lies beyond the edge repeats it. All shifts are computed at once, which takes ``search``^2
    times the memory of the images.
    """
    _, channels, height, width = x.shape
    beyond = search // 2
    padded = F.pad(x, (beyond,) * 4, mode="replicate")
    shifted = F.unfold(padded, search).reshape(-1, channels, search**2, height, width)
    squared = (shifted - x.unsqueeze(2)).square().mean(1)
    around = F.pad(squared, (patch // 2,) * 4, mode="replicate")
    weights = (F.avg_pool2d(around, patch, stride=1) / -(strength**2)).exp()
    return (shifted * weights.unsqueeze(1)).sum(2) / weights.sum(1, keepdim=True)
