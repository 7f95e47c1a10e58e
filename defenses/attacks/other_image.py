"""The attack without any bound: another class's image in place of the one that is attacked."""

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn

from defenses.attacks.attack import Entry, Facts, Run
from defenses.attacks.victim import Victim


def other_image(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return in place of each image the first of the batch that is answered with another class than its own.

    ``x`` is (N, C, H, W) in [0, 1], ``y`` (N,) int64. Of a ``Victim`` one that is not alerted either is taken. An image
    for which the batch has none comes back unchanged. No defense can resist this, so that one that seems to shows a
    fault of the evaluation.
    """
    with torch.no_grad():
        if isinstance(model, Victim):
            output = model.output(x)
            answered = output.logits.argmax(1).reshape(len(x), -1)[:, 0]
            usable = ~output.alerts.reshape(len(x), -1).any(1)
        else:
            answered, usable = model(x).argmax(1), torch.ones_like(y, dtype=torch.bool)
    suits = (answered != y.unsqueeze(1)) & usable & (y != y.unsqueeze(1))
    chosen = torch.where(suits.any(1), suits.to(torch.uint8).argmax(1), torch.arange(len(y), device=y.device))
    return x[chosen]


def _build(parameters: Mapping[str, float]) -> Run:
    return other_image


OTHER_IMAGE: Mapping[str, Entry] = MappingProxyType(
    {"other-image": Entry({}, _build, Facts("none", "labels", 1, "Carlini et al. 2019, section 4"))}
)
"""The attack that must succeed."""
