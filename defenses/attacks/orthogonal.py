"""Attacks that never trade the label against the detector's score: selective and orthogonal PGD."""

import math
from collections.abc import Mapping
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defenses.attacks.attack import Entry, Facts, Run
from defenses.attacks.evasion import Furthest
from defenses.attacks.victim import Seen, Victim, as_victim


def orthogonal_pgd(
    model: nn.Module, x: Tensor, y: Tensor, *, epsilon: float, step_size: float, steps: int, projected: bool
) -> Tensor:
    """Return x changed until it is misclassified and not alerted, by steps that serve one of the two at a time.

    While an image is recognised under half of the victim's samples or more, a step raises the label's margin; once it
    is not, a step lowers the detector's excess (see ``Seen``). That is selective PGD (Bryniarski et al. 2022, section
    3.1). When ``projected``, each step is first made orthogonal to the other's gradient, so that what it does not serve
    stays as it is to first order: orthogonal PGD (section 3.2). Both gradients are means over the samples. In place of
    the cross-entropy stands the margin, whose gradient does not vanish where the classifier is sure.

    A step is not signed, which would undo the orthogonality: its root mean square over an image's values is
    ``step_size``, the length of a signed one. What leaves the L-infinity ball of ``epsilon`` or the range is cut off.
    Each image is returned in the form in which it got furthest (see ``Furthest``); its gain is the margin less what
    there is of an excess. Raises ``DefenseOpaque`` for a model that is no ``Victim``.
    """
    victim = as_victim(model, "detector's scores")
    low, high = (x - epsilon).clamp(min=0), (x + epsilon).clamp(max=1)
    furthest, x_adv = Furthest(x), x.detach()
    for _ in range(steps):
        direction = _offered_direction(victim, x_adv, y, furthest, projected)
        x_adv = (x_adv + step_size * direction).clamp(low, high)
    with torch.no_grad():
        seen = victim.seen(x_adv, y)
    furthest.offer(x_adv, seen, _gain(seen))
    return furthest.x_adv


@torch.enable_grad()
def _offered_direction(victim: Victim, x: Tensor, y: Tensor, furthest: Furthest, projected: bool) -> Tensor:
    """Offer the images as they are, and return the directions (N, C, H, W) in which they go on."""
    x = x.detach().requires_grad_()
    seen = victim.seen(x, y)
    label = _gradient(seen.margin.mean(1), x)
    unseen = _gradient(-seen.excess.mean(1), x)
    furthest.offer(x.detach(), seen, _gain(seen))
    misclassified = seen.wrong.float().mean(1) > 0.5
    return direction(label, unseen, misclassified, projected=projected)


def _gain(seen: Seen) -> Tensor:
    return (seen.margin - seen.excess.clamp(min=0)).mean(1)


def direction(label: Tensor, unseen: Tensor, misclassified: Tensor, *, projected: bool) -> Tensor:
    """Return the directions (N, C, H, W) of a step, each of a root mean square of 1, or 0 where there is no gradient.

    ``label`` and ``unseen`` (N, C, H, W) are the gradients towards another label and towards a lower score,
    ``misclassified`` (N,) bool says which images go along the second. When ``projected`` the part along the other
    gradient is taken away (Bryniarski et al. 2022, section 3.2).
    """
    second = misclassified.unsqueeze(1)
    along_label, along_unseen = _unit(label.flatten(1)), _unit(unseen.flatten(1))
    along, other = torch.where(second, along_unseen, along_label), torch.where(second, along_label, along_unseen)
    if projected:
        along = _unit(along - (along * other).sum(1, keepdim=True) * other)
    return (along * math.sqrt(along.shape[1])).reshape_as(label)


def _unit(vectors: Tensor) -> Tensor:
    """Return vectors (N, D) of an L2 norm of 1; those of nothing stay nothing."""
    # Scaled first: the squares of a gradient of 1e-25 are 0 in float32.
    largest = vectors.abs().amax(1, keepdim=True)
    scaled = vectors / torch.where(largest > 0, largest, 1)
    return F.normalize(scaled, dim=1)


def _gradient(of: Tensor, x: Tensor) -> Tensor:
    """Return the gradient of a sum over the images, 0 where nothing depends on them: no detector, a constant score."""
    if not of.requires_grad:
        return torch.zeros_like(x)
    (gradient,) = torch.autograd.grad(of.sum(), x, retain_graph=True, allow_unused=True)
    return torch.zeros_like(x) if gradient is None else gradient


def _run(parameters: Mapping[str, float], projected: bool) -> Run:
    steps = int(parameters["steps"])
    options = {name: value for name, value in parameters.items() if name != "steps"}
    return lambda model, x, y: orthogonal_pgd(model, x, y, steps=steps, projected=projected, **options)


_PARAMETERS: Mapping[str, float] = MappingProxyType({"epsilon": 8 / 255, "step_size": 1 / 255, "steps": 100})

_FACTS = Facts("linf", "gradients", 301, "Bryniarski et al. 2022", on="defense")

ORTHOGONAL: Mapping[str, Entry] = MappingProxyType(
    {
        "orthogonal-pgd": Entry(_PARAMETERS, lambda parameters: _run(parameters, True), _FACTS),
        "selective-pgd": Entry(_PARAMETERS, lambda parameters: _run(parameters, False), _FACTS),
    }
)
"""Orthogonal PGD in both of its forms, which need a ``Victim``."""
