"""The spine: a protected classifier is a classifier, with a purifier before it and a detector beside it."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from defenses.classifier import Classifier
from defenses.detector import Detector, Evidence


class Output(NamedTuple):
    """What a protected classifier says of a batch of N images.

    ``logits`` (N, K) of the purified images, ``scores`` (N,) with higher meaning more likely adversarial, ``alerts``
    (N,) bool, ``purified`` (N, C, H, W) in [0, 1], and the bare classifier's ``undefended_logits`` (N, K).
    """

    logits: Tensor
    scores: Tensor
    alerts: Tensor
    purified: Tensor
    undefended_logits: Tensor


class ProtectedClassifier(nn.Module):
    """Put a classifier behind a purifier and a detector.

    The purifier maps images (N, C, H, W) in [0, 1], and a scalar that scales all its noise, to such images.
    ``threshold`` is the score above which an image is alerted: one for all, or one for each class that the protected
    classifier may answer, (K,). The raw pass through the classifier is shared by the
    detector and the bare answer.
    """

    threshold: Tensor

    def __init__(
        self, classifier: Classifier, purifier: nn.Module, detector: Detector, threshold: float | Sequence[float]
    ) -> None:
        super().__init__()
        self.classifier = classifier
        self.purifier = purifier
        self.detector = detector
        self.register_buffer("threshold", torch.tensor(threshold))

    def forward(self, x: Tensor, noise_scale: Tensor | None = None) -> Output:
        """Return the ``Output`` for images (N, C, H, W) in [0, 1]; ``noise_scale`` (scalar, 1 unless given)."""
        x_purified, evidence = self._look(x, noise_scale)
        scores = self.detector(*evidence)
        threshold = self.threshold[evidence.logits.argmax(1)] if self.threshold.ndim else self.threshold
        return Output(evidence.logits, scores, scores > threshold, x_purified, evidence.undefended_logits)

    def evidence(self, x: Tensor) -> Evidence:
        """Return what the detector is shown of images (N, C, H, W) in [0, 1], noise on."""
        return self._look(x, None)[1]

    def activations(self, x: Tensor) -> Tensor:
        """Return the activations that the detector is shown of images (N, C, H, W) in [0, 1], and no more; noise on."""
        detector = self.detector
        watched = x if detector.inspects == "raw" else self.purifier(x, torch.ones((), device=x.device))
        return self.classifier.features(watched, detector.layer)

    def _look(self, x: Tensor, noise_scale: Tensor | None) -> tuple[Tensor, Evidence]:
        if noise_scale is None:
            noise_scale = torch.ones((), device=x.device)
        x_purified = self.purifier(x, noise_scale)
        layer = self.detector.layer
        if self.detector.inspects == "raw":
            undefended_logits, activations = self.classifier.logits_and_features(x, layer)
            logits = self.classifier(x_purified)
        else:
            undefended_logits = self.classifier(x)
            logits, activations = self.classifier.logits_and_features(x_purified, layer)
        distance = (x_purified - x).flatten(1).norm(dim=1)
        return x_purified, Evidence(activations, logits, undefended_logits, distance)
