"""Adversarial examples with our own definition of success."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from defenses.attacks.attack import Attack
from defenses.pixels import to_8_bits, to_float
from defenses.precision import full_precision

Form = Literal["as crafted", "rounded"]
"""Adversarial examples as they were crafted, or rounded to 8 bits, as a file or a client would send them."""


@dataclass(frozen=True)
class AdversarialExamples:
    """Hold what an attack made of N images that the model classified correctly, on the CPU.

    ``x`` uint8 (N, C, H, W) are the clean images, ``x_adv`` float32 in [0, 1] of the same shape what was made of them,
    as crafted; ``y`` int64 (N,) the true classes, ``rows`` int64 (N,) which of the given images were attacked.
    ``fooled`` bool (N,) says whether the model misclassifies the image as crafted, ``fooled_rounded`` the image
    rounded to 8 bits. An image takes 5 bytes per value: 2,000 of 3x32x32 take 31 MB, of 3x224x224 1.5 GB.
    """

    attack: Attack
    x: Tensor
    x_adv: Tensor
    y: Tensor
    rows: Tensor
    fooled: Tensor
    fooled_rounded: Tensor

    def fooling(self, form: Form) -> tuple[Tensor, Tensor]:
        """Return bool (N,) which images fool the model in a form, and those (M, C, H, W): float, or rounded uint8."""
        if form == "as crafted":
            return self.fooled, self.x_adv[self.fooled]
        return self.fooled_rounded, to_8_bits(self.x_adv[self.fooled_rounded])

    @property
    def rounded(self) -> Tensor:
        """The examples rounded to 8 bits, as a file or a client would send them: uint8 (N, C, H, W)."""
        return to_8_bits(self.x_adv)

    @property
    def success_rate(self) -> float:
        """The share of the images that fool the model as crafted."""
        return float(self.fooled.float().mean())

    @property
    def success_rate_rounded(self) -> float:
        """The share of the images that fool the model after rounding to 8 bits."""
        return float(self.fooled_rounded.float().mean())

    @property
    def distortion(self) -> float | None:
        """The mean L2 distance, for images in [0, 1], of those that fool the model as crafted; None if none does."""
        return mean_distance(self.x[self.fooled], self.x_adv[self.fooled])

    @property
    def distortion_rounded(self) -> float | None:
        """The mean L2 distance of those that fool the model after rounding; None if none does."""
        kept = self.fooled_rounded
        return mean_distance(self.x[kept], to_8_bits(self.x_adv[kept]))


def mean_distance(x: Tensor, x_adv: Tensor, order: float = 2) -> float | None:
    """Return the mean distance of two sets of images, each uint8 or float in [0, 1], in the L norm of an order.

    It is None where there are none.
    """
    if not len(x):
        return None
    return float((to_float(x_adv) - to_float(x)).flatten(1).norm(order, dim=1).mean())


@torch.no_grad()
def fools(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return (N,) whether the model's answer to x is another class than y."""
    wrong: Tensor = model(x).argmax(1) != y
    return wrong


class NothingToAttack(ValueError):
    """A classifier gets none of its images right; `count` is how many there are."""

    def __init__(self, count: int) -> None:
        super().__init__(f"The classifier gets none of the {count} images right, so there is nothing to attack.")
        self.count = count


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

    ``images`` is uint8 (N, C, H, W), ``targets`` (N,) int64; the model is in evaluation mode on ``device``. The same
    seed gives the same examples, and the global random state is left as it was.
    Raises ``NothingToAttack`` when the model classifies none of the images correctly.
    """
    examples = craft_any(
        attack,
        model,
        images,
        targets,
        limit=limit,
        device=device,
        seed=seed,
        batch_size=batch_size,
        progress=progress,
    )
    if not len(examples.y):
        raise NothingToAttack(len(images))
    return examples


def craft_any(
    attack: Attack,
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    *,
    limit: int,
    device: torch.device,
    seed: int,
    batch_size: int,
    progress: Callable[[int, int], None],
) -> AdversarialExamples:
    """Attack as ``craft`` does, but return no examples where the model classifies none of the images correctly."""
    none = torch.zeros(0, dtype=torch.bool)
    parts: list[tuple[Tensor, ...]] = [
        (images[:0], to_float(images[:0]), targets[:0], torch.arange(0), none, none),
    ]
    count = 0
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda), full_precision():
        torch.manual_seed(seed)
        for rows in torch.arange(len(images)).split(batch_size):
            x, y = to_float(images[rows].to(device)), targets[rows].to(device)
            right = (~fools(model, x, y)).nonzero().flatten()[: limit - count]
            if right.numel() == 0:
                continue
            attacked = rows[right.cpu()]
            x, y = x[right], y[right]
            x_adv = attack.run(model, x, y).detach().clamp(0, 1)
            rounded = to_float(to_8_bits(x_adv))
            success = (fools(model, x_adv, y), fools(model, rounded, y))
            parts.append(tuple(t.cpu() for t in (images[attacked], x_adv, y, attacked, *success)))
            count += len(attacked)
            progress(count, limit)
            if count >= limit:
                break
    return AdversarialExamples(attack, *(torch.cat(column) for column in zip(*parts, strict=True)))
