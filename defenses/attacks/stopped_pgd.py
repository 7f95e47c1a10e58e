"""PGD that stops, image by image, at the first step that succeeds."""

from collections.abc import Mapping
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defenses.attacks.attack import Entry, Facts, Run


def stopped_pgd(model: nn.Module, x: Tensor, y: Tensor, *, step_size: float, steps: int) -> Tensor:
    """Return x moved by signed gradient steps, each image only until the model no longer answers y.

    There is no ball: the distance is what the steps come to. ``x`` is (N, C, H, W) in [0, 1], ``y`` (N,) int64;
    ``step_size`` in the image's units. Images that the model misclassifies from the start come back unchanged, and
    those still recognised after ``steps`` come back as they then stand.
    """
    x_adv = x.clone()
    active = torch.arange(len(x), device=x.device)
    for _ in range(steps):
        current = x_adv[active].requires_grad_(True)
        with torch.enable_grad():
            logits = model(current)
            loss = F.cross_entropy(logits, y[active], reduction="sum")
        recognised = logits.argmax(1) == y[active]
        if not recognised.any():
            break
        (gradient,) = torch.autograd.grad(loss, current)
        active = active[recognised]
        x_adv[active] = (current.detach() + step_size * gradient.sign()).clamp(0, 1)[recognised]
    return x_adv


def _build(parameters: Mapping[str, float]) -> Run:
    step_size, steps = parameters["step_size"], int(parameters["steps"])
    return lambda model, x, y: stopped_pgd(model, x, y, step_size=step_size, steps=steps)


STOPPED_PGD: Mapping[str, Entry] = MappingProxyType(
    {
        "pgd-stop": Entry(
            {"step_size": 1 / 255, "steps": 50}, _build, Facts("none", "gradients", 100, "CoopHANCE, section 4.1.2")
        )
    }
)
"""PGD stopped at success, without a ball."""
