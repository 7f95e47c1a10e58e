"""Random geometry for training batches, on the batch's own device."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Augmentation:
    """Rotate by up to ``rotation`` degrees, shift by a fraction of the side, zoom by a fraction, and flip.

    The defaults are the ones published for CIFAR-10; digits and signs are not to be flipped.
    """

    rotation: float = 15.0
    shift: float = 5 / 32
    zoom: float = 0.2
    flip: bool = True

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Return the transformed batch, (N, C, H, W); what comes in from outside repeats the edge."""
        count = len(x)

        def uniform(limit: float) -> Tensor:
            return (torch.rand(count, generator=generator) * 2 - 1) * limit

        angle, scale = uniform(math.radians(self.rotation)), 1 + uniform(self.zoom)
        mirror = torch.where(torch.rand(count, generator=generator) < 0.5 * self.flip, -1.0, 1.0)
        theta = torch.stack(
            [
                torch.stack([mirror * scale * angle.cos(), -scale * angle.sin(), uniform(2 * self.shift)], 1),
                torch.stack([mirror * scale * angle.sin(), scale * angle.cos(), uniform(2 * self.shift)], 1),
            ],
            1,
        ).to(x.device)
        grid = F.affine_grid(theta, list(x.shape), align_corners=False)
        return F.grid_sample(x, grid, padding_mode="border", align_corners=False)
