"""The attack that knows CoopHANCE: C&W that keeps the activations at the Inspector's layer (section 4.5, figure 6)."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from defenses.attacks.attack import Entry, Facts, Run
from defenses.attacks.victim import Victim, as_victim

WITHIN = 1 - 1e-6
"""What the range is shrunk to, so that black and white are no infinite way off in the tangent's space."""


class Least:
    """Keep for each image the misclassified form of the least cost; until there is one, x (N, C, H, W)."""

    def __init__(self, x: Tensor) -> None:
        self.x_adv = x.clone()
        self._cost = torch.full((len(x),), torch.inf, device=x.device)

    def offer(self, x_adv: Tensor, cost: Tensor, found: Tensor) -> None:
        """Take over the images that are ``found`` (N,) bool at a cost (N,) below that of what is kept."""
        cheaper = found & (cost < self._cost)
        self.x_adv = torch.where(cheaper.reshape(-1, 1, 1, 1), x_adv, self.x_adv)
        self._cost = torch.where(cheaper, cost, self._cost)


class Constants:
    """The constants (N,) that weigh the label: ten times more until a search succeeds, then by halving what is left."""

    def __init__(self, first: Tensor) -> None:
        self.current = first
        self._low, self._high = torch.zeros_like(first), torch.full_like(first, torch.inf)

    def narrow(self, found: Tensor) -> None:
        """Choose the next constants, knowing for which images (N,) bool the current ones succeeded."""
        self._high = torch.where(found, self.current, self._high)
        self._low = torch.where(found, self._low, self.current)
        between = (self._low + self._high) / 2
        self.current = torch.where(self._high.isinf(), self.current * 10, between)


def activation_preserving(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    w: float,
    searches: int,
    steps: int,
    step_size: float,
    initial_const: float,
    confidence: float,
) -> Tensor:
    """Return x changed until it is misclassified, near x both in itself and in what the detector is shown of it.

    What falls for each image is (C&W's L2 attack, Carlini and Wagner 2017, with the further term of CoopHANCE, 4.5)

        || x_adv - x ||^2 + ``w`` * || act(x_adv) - act(x) ||^2 + c * max(``confidence`` - margin, 0)

    act are the activations at the detector's layer, the ones that it is shown: the norm is the sum of squares over all
    values of the layer, neither divided by their number nor by their range. Where the detector looks at the purified
    pass, the term is the mean over the victim's samples, and act(x) the mean over as many. The margin is the highest
    logit of another class less that of y; the last term is the mean over the victim's own samples of the noise (EOT).

    ``x`` is (N, C, H, W) in [0, 1], ``y`` (N,) int64. Each of ``searches`` takes ``steps`` of Adam with a learning rate
    of ``step_size`` from x, in the space of the hyperbolic tangent; c begins at ``initial_const`` * (1 + ``w``), lest
    the label be outweighed from the start, and is searched for each image. Of the forms with a margin above 0 and of
    ``confidence`` or more under every sample, the one of the least distance and activation term together is returned:
    with fewer, the least would be those that were lucky once. An image of which none is found comes back unchanged.
    With a ``w`` of 0, or where the detector looks at no layer, this is C&W. Raises ``DefenseOpaque`` for a model that
    is no ``Victim``.
    """
    victim, x = as_victim(model, "activations"), x.detach()
    least = Least(x)
    constants = Constants(x.new_full((len(x),), initial_const * (1 + w)))
    with torch.no_grad():
        clean = victim.activations(x).mean(1, keepdim=True)
    search = Search(victim, x, y, clean, w, steps, step_size, confidence)
    for _ in range(searches):
        constants.narrow(search.run(constants.current, least))
    return least.x_adv


@dataclass(frozen=True)
class Search:
    """Look for the least form of each image, at given constants; the parameters are ``activation_preserving``'s.

    ``clean`` (N, 1, ...) are the activations that are to be kept.
    """

    victim: Victim
    x: Tensor
    y: Tensor
    clean: Tensor
    w: float
    steps: int
    step_size: float
    confidence: float

    @torch.enable_grad()
    def run(self, constants: Tensor, least: Least) -> Tensor:
        """Offer what is found with constants (N,), and return for which images (N,) bool anything was."""
        found = torch.zeros(len(self.x), dtype=torch.bool, device=self.x.device)
        unbounded = ((2 * self.x - 1) * WITHIN).atanh().requires_grad_()
        adam = torch.optim.Adam([unbounded], lr=self.step_size)
        for _ in range(self.steps):
            x_adv = (unbounded.tanh() / WITHIN + 1) / 2
            margin, cost = self.victim.seen(x_adv, self.y).margin, self.cost(x_adv)
            loss = cost + constants * (self.confidence - margin).clamp(min=0).mean(1)
            (unbounded.grad,) = torch.autograd.grad(loss.sum(), unbounded)
            success = ((margin > 0) & (margin >= self.confidence)).all(1)
            least.offer(x_adv.detach().clamp(0, 1), cost.detach(), success)
            found |= success
            adam.step()
        return found

    def cost(self, x_adv: Tensor) -> Tensor:
        """Return (N,) the squared distance and ``w`` times that of the activations."""
        distance = (x_adv - self.x).square().flatten(1).sum(1)
        if not self.w:
            return distance
        moved = (self.victim.activations(x_adv) - self.clean).square().flatten(2).sum(2).mean(1)
        return distance + self.w * moved


def _build(parameters: Mapping[str, float]) -> Run:
    counts = {name: int(parameters[name]) for name in ("searches", "steps")}
    rest: dict[str, Any] = {name: value for name, value in parameters.items() if name not in counts}
    return lambda model, x, y: activation_preserving(model, x, y, **counts, **rest)


AWARE_OF_INSPECTOR: Mapping[str, Entry] = MappingProxyType(
    {
        "coophance-adaptive": Entry(
            {"w": 1.0, "searches": 5, "steps": 200, "step_size": 0.01, "initial_const": 1.0, "confidence": 0.0},
            _build,
            Facts("l2", "gradients", 4001, "CoopHANCE, section 4.5", on="defense"),
        )
    }
)
"""CoopHANCE's adaptive attack, which needs a ``Victim``."""
