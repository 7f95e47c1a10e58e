"""What a step of fast adversarial training is made of: images, their perturbation, and the learning rate."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Normalised(nn.Module):
    """Answer images in [0, 1] by a network that wants each channel's mean and standard deviation taken out."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.network = network
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values).reshape(-1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, K) for images (N, C, H, W) in [0, 1]."""
        logits: Tensor = self.network((x - self.mean) / self.std)
        return logits


def triangle(step: int, steps: int) -> float:
    """Return the share of the highest learning rate at a step: up to 1 until the middle, then down (section 4.2)."""
    return 1 - abs(2 * (step + 0.5) / steps - 1)


def augmented(images: Tensor, *, flip: bool) -> Tensor:
    """Return images, uint8 (N, C, H, W), shifted by up to an eighth of their sides, and half of them mirrored.

    What comes in from outside is 0. Draws from the global generator; the result is laid out channels last.
    """
    count, _, height, width = images.shape
    down, right = height // 8, width // 8
    padded = F.pad(images, (right, right, down, down))
    rows = torch.randint(2 * down + 1, (count, 1)) + torch.arange(height)
    columns = torch.randint(2 * right + 1, (count, 1)) + torch.arange(width)
    if flip:
        columns = torch.where(torch.rand(count, 1) < 0.5, columns.flip(1), columns)
    which = torch.arange(count)[:, None, None]
    return padded[which, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def perturbed(
    logits_of: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, *, epsilon: float, step_size: float
) -> Tensor:
    """Return images after one step of FGSM from a random start (algorithm 3): (N, C, H, W), as x and in [0, 1].

    They are within ``epsilon`` of x in the L-infinity norm. ``y`` (N,) are the true classes. Draws from the global
    generator of the device.
    """
    # Drawn in the order in which the values lie in memory: in that of the indices takes ten times as long.
    random = torch.empty_like(x.movedim(1, -1)).uniform_(-epsilon, epsilon).movedim(-1, 1)
    start = (x + random).clamp(0, 1).requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits_of(start), y), start)
    stepped = start.detach() + step_size * gradient.sign()
    return torch.clamp(stepped, x - epsilon, x + epsilon).clamp(0, 1)
