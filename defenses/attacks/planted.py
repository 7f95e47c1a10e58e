"""Attacks that are broken on purpose, so that what looks for broken attacks can be seen to find them."""

from collections.abc import Mapping
from types import MappingProxyType

from torch import Tensor, nn

from defenses.attacks.attack import Entry, Facts, Run
from defenses.attacks.from_foolbox import FROM_FOOLBOX
from defenses.attacks.victim import Victim


class Blind(nn.Module):
    """Answer as a model does, with a gradient that is zero everywhere, as behind a rounding that nobody allowed for."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.train(model.training)

    def forward(self, x: Tensor) -> Tensor:
        """Return the model's logits (N, K) for images (N, C, H, W)."""
        logits: Tensor = self.model(x.detach())
        return logits + 0 * x.flatten(1).sum(1, keepdim=True)


def _blind_pgd(parameters: Mapping[str, float]) -> Run:
    pgd = FROM_FOOLBOX["pgd"].build(parameters)
    return lambda model, x, y: pgd(Blind(model), x, y)


def _detached_pgd(parameters: Mapping[str, float]) -> Run:
    pgd = FROM_FOOLBOX["pgd"].build(parameters)
    return lambda model, x, y: pgd(Blind(model) if isinstance(model, Victim) else model, x, y)


_FACTS = Facts("linf", "gradients", FROM_FOOLBOX["pgd"].facts.passes, "a planted failure")

PLANTED: Mapping[str, Entry] = MappingProxyType(
    {
        "pgd-blind": Entry({**FROM_FOOLBOX["pgd"].defaults}, _blind_pgd, _FACTS),
        "pgd-detached": Entry({**FROM_FOOLBOX["pgd"].defaults}, _detached_pgd, _FACTS),
    }
)
"""PGD that sees no gradient, and PGD that sees none of a defense alone."""
