"""Gaussian noise, drawn as fast as the machine can."""

import torch
from torch import Tensor


def gaussian_like(x: Tensor) -> Tensor:
    """Return independent draws from N(0, 1) in the shape, type and memory layout of x (N, C, H, W).

    Values are drawn in the order in which they lie in memory. Torch draws in that of the indices, which for a tensor
    laid out channels last means one by one, at a tenth of the speed.
    """
    if x.is_contiguous():
        return torch.randn_like(x)
    return torch.randn_like(x.movedim(1, -1)).movedim(-1, 1)
