"""The joint attack: one loss for the label and for the detector's score."""

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn

from defenses.attacks.attack import Entry, Facts, Run
from defenses.attacks.evasion import Furthest
from defenses.attacks.victim import Seen, as_victim


def joint(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    epsilon: float,
    step_size: float,
    steps: int,
    weight: float,
    kappa: float,
    slack: float,
) -> Tensor:
    """Return x changed until it is misclassified and not alerted (Carlini and Wagner 2017, on ten detection methods).

    What rises is the mean over the victim's own samples of

        min(margin, ``kappa``) - ``weight`` * max(excess + ``slack``, 0)

    where the margin is the highest logit of another class less that of y, and the excess the detector's score less its
    threshold (that of the class answered, where each has its own). Beyond ``kappa`` and ``slack``, in the units of the
    logits and of the score, nothing more is gained, so that the steps go where something is still wanting. Without a
    detector the label alone is attacked.

    ``x`` is (N, C, H, W) in [0, 1], ``y`` (N,) int64. Each of ``steps`` from x goes ``step_size`` along the gradient's
    sign, within an L-infinity ball of ``epsilon``. Each image is returned in the form in which it got furthest (see
    ``Furthest``). Raises ``DefenseOpaque`` for a model that is no ``Victim``.
    """
    victim = as_victim(model, "detector's scores")
    low, high = (x - epsilon).clamp(min=0), (x + epsilon).clamp(max=1)
    furthest, x_adv = Furthest(x), x.detach()
    for _ in range(steps):
        x_adv = x_adv.detach().requires_grad_()
        with torch.enable_grad():
            seen = victim.seen(x_adv, y)
            gain = _gain(seen, weight, kappa, slack)
            (gradient,) = torch.autograd.grad(gain.sum(), x_adv)
        furthest.offer(x_adv.detach(), seen, gain)
        x_adv = (x_adv.detach() + step_size * gradient.sign()).clamp(low, high)
    with torch.no_grad():
        seen = victim.seen(x_adv, y)
        furthest.offer(x_adv, seen, _gain(seen, weight, kappa, slack))
    return furthest.x_adv


def _gain(seen: Seen, weight: float, kappa: float, slack: float) -> Tensor:
    return (seen.margin.clamp(max=kappa) - weight * (seen.excess + slack).clamp(min=0)).mean(1)


def _build(parameters: Mapping[str, float]) -> Run:
    steps = int(parameters["steps"])
    options = {name: value for name, value in parameters.items() if name != "steps"}
    return lambda model, x, y: joint(model, x, y, steps=steps, **options)


JOINT: Mapping[str, Entry] = MappingProxyType(
    {
        "joint": Entry(
            {"epsilon": 8 / 255, "step_size": 1 / 255, "steps": 100, "weight": 1.0, "kappa": 5.0, "slack": 1.0},
            _build,
            Facts("linf", "gradients", 201, "Carlini and Wagner 2017, on ten detection methods", on="defense"),
        )
    }
)
"""The attack on label and score in one loss, which needs a ``Victim``."""
