"""Pushes: small changes of an image, by which the classifier's answer is tried."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defenses.noise import gaussian_like


class Push(nn.Module):
    """Map images (N, C, H, W) in [0, 1] with their bare logits (N, K) to images a small distance away, in [0, 1]."""


class Smoothing(Push):
    """Blur an image by three positions in each direction, the middle one counting 1 - 2 ``weight``.

    An additive perturbation is rougher than what it is added to: most of what a light blur takes away is of it.
    """

    kernel: Tensor

    def __init__(self, channels: int, weight: float) -> None:
        super().__init__()
        line = torch.tensor([weight, 1 - 2 * weight, weight])
        self.register_buffer("kernel", torch.outer(line, line).repeat(channels, 1, 1, 1), persistent=False)

    def forward(self, x: Tensor, logits: Tensor) -> Tensor:
        padded = F.pad(x, (1, 1, 1, 1), mode="reflect")
        smooth = F.conv2d(padded, self.kernel, groups=len(self.kernel))
        return torch.clamp(smooth, 0, 1)


class InversePush(Push):
    """Push an image along the mean inverse perturbation of the class that is predicted, by a fixed distance.

    ``directions`` (K, C, H, W) are of L2 norm 1; ``size`` is the root mean square of the change of a pixel's values.
    """

    directions: Tensor

    def __init__(self, classes: int, shape: tuple[int, int, int], size: float) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("directions", torch.zeros(classes, *shape))

    def forward(self, x: Tensor, logits: Tensor) -> Tensor:
        distance = self.size * x[0].numel() ** 0.5
        return torch.clamp(x + distance * self.directions.index_select(0, logits.argmax(1)), 0, 1)


class ReplacedPush(Push):
    """Go as far as another push does, in a direction that has nothing to do with the image: a control.

    It is Gaussian noise, or where ``candidates`` (M, C, H, W) are given one of these, drawn for each image.
    """

    def __init__(self, push: Push, candidates: Tensor | None = None) -> None:
        super().__init__()
        self.push = push
        self.candidates = candidates

    def forward(self, x: Tensor, logits: Tensor) -> Tensor:
        other: Tensor = self.push(x, logits)
        distance = (other - x).flatten(1).norm(dim=1)
        direction = drawn_direction(x, self.candidates)
        replaced: Tensor = (x + distance.reshape(-1, 1, 1, 1) * direction).clamp(0, 1)
        return replaced


def drawn_direction(x: Tensor, candidates: Tensor | None) -> Tensor:
    """Return (N, C, H, W) of L2 norm 1: Gaussian noise, or candidates (M, C, H, W) drawn at random."""
    if candidates is None:
        return unit(gaussian_like(x))
    drawn = torch.randint(len(candidates), (len(x),), device=x.device)
    return unit(candidates.index_select(0, drawn).to(x.dtype))


def unit(direction: Tensor) -> Tensor:
    """Return directions (N, C, H, W) at L2 norm 1; one of nothing stays as it is."""
    norms: Tensor = direction.flatten(1).norm(dim=1).clamp_min(1e-12)
    return direction / norms.reshape(-1, 1, 1, 1)
