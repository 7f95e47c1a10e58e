"""The Inspector: one logistic regression per class over a layer's activations (CoopHANCE, section 3.2)."""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defenses.coophance.fusion import Fusion
from defenses.detector import Detector, Evidence


@dataclass(frozen=True)
class InspectorConfig:
    """Say what an Inspector looks at.

    ``layer`` is the layer's name, ``shape`` that of one image's activations there, ``inspects`` the pass they come
    from. Maps (C, H, W) are averaged over squares of ``pool`` by ``pool`` positions before they are flattened.
    ``fusion`` says whether the regression's decision is weighed with the rest of the evidence; the published Inspector
    takes it alone. ``asks`` says whose class' regression is asked: that of the purified image's answer or of the raw
    one's.
    """

    layer: str
    shape: tuple[int, ...]
    classes: int
    inspects: Literal["raw", "purified"] = "raw"
    pool: int = 1
    fusion: bool = False
    asks: Literal["raw", "purified"] = "purified"

    @property
    def features(self) -> int:
        """How many features a regression has."""
        return pooled_features(self.shape, self.pool)

    def as_json(self) -> dict[str, Any]:
        """Return the configuration as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Return the configuration that ``as_json`` described."""
        return cls(**{**values, "shape": tuple(values["shape"])})


def pooled_features(shape: tuple[int, ...], pool: int) -> int:
    """Return how many features are left of activations of that shape."""
    if pool == 1:
        return math.prod(shape)
    return shape[0] * (shape[1] // pool) * (shape[2] // pool)


def pool_within(shape: tuple[int, ...], most_features: int) -> int:
    """Return the least pooling that leaves at most so many features; 1 where the activations are no maps (C, H, W)."""
    if len(shape) != 3:
        return 1
    widest = min(shape[1:])
    return next((pool for pool in range(1, widest) if pooled_features(shape, pool) <= most_features), widest)


class Inspector(Detector):
    """Score images by the regression of the class that is predicted, by default of the purified image (section 3.2).

    Returns scores (N,): that regression's decision function, higher meaning more likely adversarial; with a fusion,
    the log odds that the fusion makes of it and of the rest of the evidence.
    """

    def __init__(self, config: InspectorConfig) -> None:
        super().__init__(config.layer, config.inspects)
        self.config = config
        self.weight = nn.Parameter(torch.zeros(config.classes, config.features))
        self.bias = nn.Parameter(torch.zeros(config.classes))
        self.fusion = Fusion() if config.fusion else None

    def features(self, activations: Tensor) -> Tensor:
        """Return the regressions' features (N, D) of activations (N, ...)."""
        if self.config.pool > 1:
            activations = F.avg_pool2d(activations, self.config.pool)
        return activations.flatten(1)

    def decisions(self, activations: Tensor, logits: Tensor) -> Tensor:
        """Return (N,) the decision function of the regression of the class that the logits (N, K) give each image."""
        decisions = F.linear(self.features(activations), self.weight, self.bias)
        return decisions.gather(1, logits.argmax(1, keepdim=True)).squeeze(1)

    def forward(self, activations: Tensor, logits: Tensor, undefended_logits: Tensor, distance: Tensor) -> Tensor:
        decisions = self.decisions(activations, logits if self.config.asks == "purified" else undefended_logits)
        if self.fusion is None:
            return decisions
        seen = Evidence(activations, logits, undefended_logits, distance)
        scores: Tensor = self.fusion(decisions, seen)
        return scores
