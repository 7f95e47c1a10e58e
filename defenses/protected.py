"""The spine: a protected classifier is a classifier, with a purifier before it and a detector beside it."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from defenses.classifier import Classifier
from defenses.detector import Detector


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
    ``threshold`` is the score above which an image is alerted. The raw pass through the classifier is shared by the
    detector and the bare answer.
    """

    threshold: Tensor

    def __init__(self, classifier: Classifier, purifier: nn.Module, detector: Detector, threshold: float) -> None:
        super().__init__()
        self.classifier = classifier
        self.purifier = purifier
        self.detector = detector
        self.register_buffer("threshold", torch.tensor(threshold))

    def forward(self, x: Tensor, noise_scale: Tensor | None = None) -> Output:
        """Return the ``Output`` for images (N, C, H, W) in [0, 1]; ``noise_scale`` (scalar, 1 unless given)."""
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
        scores = self.detector(activations, logits)
        return Output(logits, scores, scores > self.threshold, x_purified, undefended_logits)
