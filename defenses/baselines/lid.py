"""Local intrinsic dimensionality as a detector (Ma et al. 2018)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defenses.classifier import Classifier, Layer
from defenses.coophance.inspector import pool_within, pooled_features
from defenses.detector import Detector
from defenses.layers import passed_by_all
from defenses.onnx_import import IMAGE, LOGITS

MOST_FEATURES = 8192
"""How many features of a layer are compared at most; wider maps are averaged over squares of positions."""

DEPTHS = 5
"""How many layers are looked at where none are named."""

SMALLEST = 1e-12
"""The least squared distance, so that its logarithm is finite."""

FLATTEST = 1e-3
"""The least mean log ratio of distances; the estimate is at most its inverse."""


@dataclass(frozen=True)
class Watch:
    """A layer that is looked at, by name, and the ``shape`` of one image's activations there."""

    name: str
    shape: tuple[int, ...]

    @property
    def pool(self) -> int:
        """The side of the squares that maps are averaged over."""
        return pool_within(self.shape, MOST_FEATURES)

    @property
    def features(self) -> int:
        """How many features are compared."""
        return pooled_features(self.shape, self.pool)


class LidDetector(Detector):
    """Score images by a logistic regression over local intrinsic dimensionalities, one of each layer (algorithm 1).

    A layer's dimensionality is that of the image's activations among those of ``references`` benign images, by its
    ``neighbors`` nearest (equation 4). The paper compares with the other images of a minibatch; here the minibatch
    is fixed, so that an answer depends on its own image alone. Returns the log odds of an attack.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, watched: Sequence[Watch], references: int, neighbors: int) -> None:
        super().__init__(watched[0].name, "raw", [each.name for each in watched[1:]])
        self.watched = tuple(watched)
        self.neighbors = neighbors
        self.references = nn.ParameterList(
            nn.Parameter(torch.zeros(references, each.features), requires_grad=False) for each in watched
        )
        self.register_buffer("mean", torch.zeros(len(watched)))
        self.register_buffer("scale", torch.ones(len(watched)))
        self.weight = nn.Parameter(torch.zeros(len(watched)), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(()), requires_grad=False)

    def forward(self, activations: Tensor, logits: Tensor, undefended_logits: Tensor, distance: Tensor) -> Tensor:
        return (self.dimensionalities(activations) - self.mean) / self.scale @ self.weight + self.bias

    def dimensionalities(self, activations: Tensor) -> Tensor:
        """Return the estimates (N, L), one for each layer, of the activations that the detector is shown."""
        each = zip(self.features(activations), self.references, strict=True)
        return torch.stack([local_dimensionality(found, known, self.neighbors) for found, known in each], 1)

    def features(self, activations: Tensor) -> list[Tensor]:
        """Return each layer's features (N, D) of the activations that the detector is shown."""
        parts = activations.flatten(1).split([math.prod(each.shape) for each in self.watched], 1)
        return [_pooled(part, each) for part, each in zip(parts, self.watched, strict=True)]


def local_dimensionality(features: Tensor, references: Tensor, neighbors: int) -> Tensor:
    """Return (N,) the maximum likelihood estimate of the dimensionality around features (N, D).

    It is -1 / mean(log(r_i / r_k)) over the distances r_i to the k nearest of the ``references`` (R, D), k being
    ``neighbors`` (Amsaleg et al. 2015; Ma et al. 2018, equation 4).
    """
    squared = (
        features.square().sum(1, keepdim=True) + references.square().sum(1) - 2 * features @ references.T
    ).clamp_min(SMALLEST)
    nearest = squared.topk(neighbors, dim=1, largest=False).values.log()
    # Of squared distances, so that the logarithms are twice those of the distances.
    spread = (nearest.amax(1, keepdim=True) - nearest).mean(1) / 2
    return 1 / spread.clamp_min(FLATTEST)


def watched_layers(classifier: Classifier, names: Sequence[str]) -> tuple[Watch, ...]:
    """Return the layers of those names, or where none are named five of the layers that every path goes through.

    These are spread evenly over the depth, the logits being the last. Raises ``LayerNotFound``.
    """
    if names:
        found: list[Layer] = [classifier.resolve_layer(name) for name in names]
    else:
        known = {layer.name: layer for layer in classifier.layers()}
        passed = [known[name] for name in passed_by_all(classifier.graph.nodes, IMAGE, LOGITS) if name in known]
        count = min(DEPTHS, len(passed))
        found = [passed[(place + 1) * len(passed) // count - 1] for place in range(count)]
    return tuple(Watch(each.name, each.shape) for each in dict.fromkeys(found))


def _pooled(part: Tensor, watch: Watch) -> Tensor:
    if watch.pool == 1:
        return part
    return F.avg_pool2d(part.unflatten(1, watch.shape), watch.pool).flatten(1)
