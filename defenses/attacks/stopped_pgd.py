"""PGD that stops, image by image, at the first step that succeeds."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
