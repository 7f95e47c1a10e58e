"""Attacks that see nothing but the class that a model answers with: the boundary attack and the pointwise attack."""

import warnings
from typing import Any

import torch
from foolbox.attacks.blended_noise import LinearSearchBlendedUniformNoiseAttack
from foolbox.attacks.boundary_attack import BoundaryAttack
from foolbox.attacks.pointwise import PointwiseAttack
from foolbox.attacks.saltandpepper import SaltAndPepperNoiseAttack
from foolbox.criteria import Misclassification
from foolbox.models.pytorch import PyTorchModel
from torch import Tensor, nn

from defenses.attacks.isolation import frozen, seeded

DRAWS = 100
"""How many uniform noises are tried as the boundary attack's starting point, before another image is."""

BLENDS = 50
"""In how many steps an image is blended with the noise found."""


def boundary(model: nn.Module, x: Tensor, y: Tensor, *, steps: int) -> Tensor:
    """Return misclassified images that walked along the boundary towards x (Brendel et al. 2018).

    ``x`` is (N, C, H, W) in [0, 1], ``y`` (N,) int64; each of ``steps`` asks about it once, and every tenth twice.
    An image starts at the first misclassified blend of it with uniform noise, as in the paper; where all noises are
    taken for its own class it starts at an image of this batch that the model takes for another. With none of those,
    and where the model misclassifies the image itself, it comes back unchanged. The images of a batch share the
    directions that are drawn.
    """
    with frozen(model):
        asked = PyTorchModel(model, bounds=(0, 1), device=x.device)
        noise = LinearSearchBlendedUniformNoiseAttack(directions=DRAWS, steps=BLENDS)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*failed to draw sufficient random")
            blended = noise.run(asked, x, Misclassification(y))
        misclassified = asked(blended).argmax(1) != y
        differs = asked(x).argmax(1) != y.unsqueeze(1)  # (N, N): which image may stand in for which
        start = torch.where(misclassified.reshape(-1, 1, 1, 1), blended, x[differs.int().argmax(1)])
        found = misclassified | differs.any(1)
        return _walked(BoundaryAttack(steps=steps), asked, x, y, start, found)


def pointwise(model: nn.Module, x: Tensor, y: Tensor, *, steps: int) -> Tensor:
    """Return misclassified images in which as few values differ from x as can be reset one by one (Schott et al. 2019).

    ``x`` is (N, C, H, W) in [0, 1], ``y`` (N,) int64. The start is the least salt-and-pepper noise found in ``steps``;
    then value by value, in random order and over and over, what may be as in x without the image being recognised is.
    An image that no such noise gets misclassified comes back unchanged.
    """
    with frozen(model), seeded(x.device):
        asked = PyTorchModel(model, bounds=(0, 1), device=x.device)
        start = SaltAndPepperNoiseAttack(steps=steps).run(asked, x, Misclassification(y))
        return _walked(
            PointwiseAttack(l2_binary_search=False), asked, x, y, start, torch.ones_like(y, dtype=torch.bool)
        )


class Underway(Misclassification):
    """Misclassification that takes the first images asked about, the starting points, as adversarial.

    Both attacks ask about those once more, and refuse all of them if one is recognised, as noise in a model will have.
    """

    def __init__(self, labels: Tensor) -> None:
        super().__init__(labels)
        self.started = False

    def __call__(self, perturbed: Any, outputs: Any) -> Any:
        misclassified = super().__call__(perturbed, outputs)
        if self.started:
            return misclassified
        self.started = True
        return misclassified.logical_or(misclassified.logical_not())


def _walked(
    attack: BoundaryAttack | PointwiseAttack, asked: PyTorchModel, x: Tensor, y: Tensor, start: Tensor, found: Tensor
) -> Tensor:
    """Return what an attack makes of its starting points (N, C, H, W), and x where none was ``found`` (N,) beside x."""
    found = found & (start != x).flatten(1).any(1)
    x_adv = x.clone()
    if found.any():
        x_adv[found] = attack.run(asked, x[found], Underway(y[found]), starting_points=start[found])
    return x_adv
