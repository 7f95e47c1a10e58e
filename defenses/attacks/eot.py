"""EOT-PGD: PGD on the mean of the gradients of a model that answers anew each time."""

from collections.abc import Mapping
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defenses.attacks.attack import Entry, Facts, Run


def eot_pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    epsilon: float,
    step_size: float,
    steps: int,
    samples: int,
    random_start: bool,
) -> Tensor:
    """Return x moved by signed steps along ``expected_gradient``, within an L-infinity ball of ``epsilon``.

    ``x`` is (N, C, H, W) in [0, 1], ``y`` (N,) int64; ``epsilon`` and ``step_size`` are in the image's units. With
    ``random_start`` the first step is taken from a uniformly drawn point of the ball, else from x. The images after the
    last step are returned. A ``Victim`` draws its own samples besides, for each of these.
    """
    low, high = (x - epsilon).clamp(min=0), (x + epsilon).clamp(max=1)
    x_adv = x.detach()
    if random_start:
        x_adv = (x_adv + epsilon * (2 * torch.rand_like(x_adv) - 1)).clamp(low, high)
    for _ in range(steps):
        gradient = expected_gradient(model, x_adv, y, samples)
        x_adv = (x_adv + step_size * gradient.sign()).clamp(low, high)
    return x_adv


@torch.enable_grad()
def expected_gradient(model: nn.Module, x: Tensor, y: Tensor, samples: int) -> Tensor:
    """Return (N, C, H, W) the mean of the cross-entropy's gradients over ``samples`` calls (Athalye et al. 2018).

    The calls are made as one, of a batch in which each image of x (N, C, H, W) stands ``samples`` times.
    """
    x = x.detach().requires_grad_()
    logits = model(x.repeat_interleave(samples, 0))
    loss = F.cross_entropy(logits, y.repeat_interleave(samples), reduction="sum") / samples
    (gradient,) = torch.autograd.grad(loss, x)
    return gradient


def _build(parameters: Mapping[str, float]) -> Run:
    options = {name: int(parameters[name]) for name in ("steps", "samples")}
    epsilon, step_size = parameters["epsilon"], parameters["step_size"]
    start = bool(parameters["random_start"])
    return lambda model, x, y: eot_pgd(model, x, y, epsilon=epsilon, step_size=step_size, random_start=start, **options)


EOT: Mapping[str, Entry] = MappingProxyType(
    {
        "eot-pgd": Entry(
            {"epsilon": 8 / 255, "step_size": 2 / 255, "steps": 20, "samples": 8, "random_start": True},
            _build,
            Facts("linf", "gradients", 320, "Athalye et al. 2018"),
        )
    }
)
"""PGD over the expectation of the noise, for any model."""
