"""The Inspector: one logistic regression per class over a layer's activations (CoopHANCE, section 3.2)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from defenses.detector import Detector

FEWEST_EXAMPLES = 10
"""Below so many examples of either kind a class shares the detector fitted on all classes together."""

MOST_POOLED = 2000
"""How many examples of each kind the detector for all classes together is fitted on at most."""


@dataclass(frozen=True)
class InspectorConfig:
    """Say what an Inspector looks at: the layer by name, its flattened width, and from which pass it comes."""

    layer: str
    features: int
    classes: int
    inspects: Literal["raw", "purified"] = "raw"

    def as_json(self) -> dict[str, Any]:
        """Return the configuration as JSON values."""
        return {
            "layer": self.layer,
            "features": self.features,
            "classes": self.classes,
            "inspects": self.inspects,
        }


class Inspector(Detector):
    """Score activations with the regression of the class that the protected classifier predicts.

    Takes activations (N, ...) that flatten to ``features`` values and logits (N, K); returns scores (N,), the
    decision function of the predicted class's regression: higher means more likely adversarial.
    """

    def __init__(self, config: InspectorConfig) -> None:
        super().__init__(config.layer, config.inspects)
        self.config = config
        self.weight = nn.Parameter(torch.zeros(config.classes, config.features))
        self.bias = nn.Parameter(torch.zeros(config.classes))

    def forward(self, activations: Tensor, logits: Tensor) -> Tensor:
        decisions = nn.functional.linear(activations.flatten(1), self.weight, self.bias)
        return decisions.gather(1, logits.argmax(1, keepdim=True)).squeeze(1)


@dataclass(frozen=True)
class InspectorReport:
    """Count what each class's regression was fitted on, and name the classes that share the pooled one."""

    negatives: tuple[int, ...]
    positives: tuple[int, ...]
    pooled: tuple[int, ...]


def fit_inspector(
    config: InspectorConfig,
    activations_of: Callable[[Tensor], Tensor],
    benign: tuple[Tensor, Tensor],
    adversarial: tuple[Tensor, Tensor],
    *,
    inverse_penalty: float = 1e-3,
    progress: Callable[[int, int], None],
) -> tuple[Inspector, InspectorReport]:
    """Fit the regressions and return the Inspector (in evaluation mode) with its report.

    ``benign`` is (images, their class), ``adversarial`` (images, the class that the protected classifier gives
    them); ``activations_of`` turns images into their
    activations. Each regression is L2-penalised with inverse strength C = ``inverse_penalty`` (the paper's code uses
    10) and weighs the two kinds inversely to their frequency. A class with fewer than ten examples of either kind
    takes the regression fitted on all classes together.
    Raises ``ValueError`` when there are too few examples altogether.
    """
    for kind, images in (("benign", benign[0]), ("adversarial", adversarial[0])):
        if len(images) < FEWEST_EXAMPLES:
            raise ValueError(f"An Inspector needs at least {FEWEST_EXAMPLES} {kind} images, got {len(images)}.")
    inspector = Inspector(config)
    negatives = [benign[0][benign[1] == c] for c in range(config.classes)]
    positives = [adversarial[0][adversarial[1] == c] for c in range(config.classes)]
    pooled = [c for c in range(config.classes) if min(len(negatives[c]), len(positives[c])) < FEWEST_EXAMPLES]
    total = config.classes - len(pooled) + bool(pooled)
    done = 0
    if pooled:
        weight, bias = _regress(
            activations_of(_thinned(benign[0])), activations_of(_thinned(adversarial[0])), inverse_penalty
        )
        inspector.weight.data[pooled], inspector.bias.data[pooled] = weight, bias
        done += 1
        progress(done, total)
    for c in range(config.classes):
        if c not in pooled:
            weight, bias = _regress(activations_of(negatives[c]), activations_of(positives[c]), inverse_penalty)
            inspector.weight.data[c], inspector.bias.data[c] = weight, bias
            done += 1
            progress(done, total)
    report = InspectorReport(
        tuple(len(images) for images in negatives), tuple(len(images) for images in positives), tuple(pooled)
    )
    return inspector.eval(), report


def _thinned(images: Tensor) -> Tensor:
    """Return at most ``MOST_POOLED`` of the images, evenly spaced."""
    return images[torch.linspace(0, len(images) - 1, min(len(images), MOST_POOLED)).round().long()]


def _regress(negatives: Tensor, positives: Tensor, inverse_penalty: float) -> tuple[Tensor, Tensor]:
    from sklearn.linear_model import LogisticRegression

    features = torch.cat([negatives, positives]).flatten(1).cpu().numpy()
    adversarial = torch.cat([torch.zeros(len(negatives)), torch.ones(len(positives))]).numpy()
    # The same optimum as the paper's liblinear, which needs over a thousand passes over so many features.
    regression = LogisticRegression(C=inverse_penalty, class_weight="balanced", max_iter=1000)
    regression.fit(features, adversarial)
    return torch.from_numpy(regression.coef_[0]).float(), torch.tensor(regression.intercept_[0]).float()
