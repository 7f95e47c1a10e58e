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
    for step in range(steps + 1):
        active = torch.arange(len(x), device=x.device) if step == 0 else active[still]
        current = x_adv[active].requires_grad_(True)
        with torch.enable_grad():
            logits = model(current)
            still = logits.argmax(1) == y[active]
            if step == steps or not still.any():
                break
            loss = F.cross_entropy(logits, y[active], reduction="sum")
        (gradient,) = torch.autograd.grad(loss, current)
        moved = (current.detach() + step_size * gradient.sign()).clamp(0, 1)
        x_adv[active[still]] = moved[still]
    return x_adv
