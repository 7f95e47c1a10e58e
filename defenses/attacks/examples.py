"""Adversarial examples with our own definition of success."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from defenses.attacks.registry import Attack


@dataclass(frozen=True)
class AdversarialExamples:
    """Hold what an attack made of images that the model classified correctly, on the CPU.

    ``x`` and ``x_adv`` are (N, C, H, W) float in [0, 1], ``x_adv`` rounded to 8 bits; ``y`` the true classes (N,);
    ``fooled`` (N,) whether the model misclassifies the rounded image, ``fooled_unrounded`` the image as crafted.
    """

    attack: Attack
    x: Tensor
    x_adv: Tensor
    y: Tensor
    fooled: Tensor
    fooled_unrounded: Tensor

    @property
    def success_rate(self) -> float:
        """The share of the images that fool the model after rounding to 8 bits."""
        return float(self.fooled.float().mean())

    @property
    def distortion(self) -> float:
        """The mean L2 distance of the examples that fool the model; NaN when none does."""
        return float((self.x_adv - self.x)[self.fooled].flatten(1).norm(dim=1).mean())


@torch.no_grad()
def fools(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return (N,) whether the model's answer to x is another class than y."""
    wrong: Tensor = model(x).argmax(1) != y
    return wrong


def craft(
    attack: Attack,
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    *,
    limit: int,
    device: torch.device,
    seed: int,
    batch_size: int = 128,
    progress: Callable[[int, int], None],
) -> AdversarialExamples:
    """Attack the first ``limit`` images that the model classifies correctly.

    ``images`` is uint8 (N, C, H, W), ``targets`` (N,) int64; the model is in evaluation mode on ``device``.
    Raises ``ValueError`` when the model classifies none of the images correctly.
    """
    parts: list[tuple[Tensor, ...]] = []
    count = 0
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for batch, classes in zip(images.split(batch_size), targets.split(batch_size), strict=True):
            x, y = batch.to(device).float() / 255, classes.to(device)
            right = (~fools(model, x, y)).nonzero().flatten()[: limit - count]
            if right.numel() == 0:
                continue
            x, y = x[right], y[right]
            crafted = attack.run(model, x, y).detach().clamp(0, 1)
            x_adv = (crafted * 255).round() / 255
            parts.append(tuple(t.cpu() for t in (x, x_adv, y, fools(model, x_adv, y), fools(model, crafted, y))))
            count += len(x)
            progress(count, limit)
            if count >= limit:
                break
    if not parts:
        raise ValueError(f"The classifier gets none of the {len(images)} images right, so there is nothing to attack.")
    return AdversarialExamples(attack, *(torch.cat(column) for column in zip(*parts, strict=True)))
