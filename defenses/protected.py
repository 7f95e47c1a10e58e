"""The spine: a protected classifier is a classifier, with a purifier before it and a detector beside it."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from defenses.classifier import Classifier
from defenses.corrector import Corrector
from defenses.detector import Detector, Evidence, Inspected, NoDetector
from defenses.judge import Judge, PurifiedAnswer
from defenses.onnx_import import LOGITS
from defenses.purifier import Purifier


class Output(NamedTuple):
    """What a protected classifier says of a batch of N images.

    ``logits`` (N, K) are what is answered, ``scores`` (N,) with higher meaning more likely adversarial, ``alerts`` (N,)
    bool, ``purified`` (N, C, H, W) in [0, 1], and the bare classifier's ``undefended_logits`` (N, K).
    """

    logits: Tensor
    scores: Tensor
    alerts: Tensor
    purified: Tensor
    undefended_logits: Tensor


class Pass(NamedTuple):
    """One pass of images through the classifier: its logits (N, K), and activations (N, ...) by the layer's name."""

    logits: Tensor
    activations: Mapping[str, Tensor]


class ProtectedClassifier(nn.Module):
    """Put a classifier behind a purifier and a detector.

    The ``judge`` says what is answered: unless told otherwise the logits of the purified image. A ``corrector`` takes
    its place on the images that are alerted, with a purified image and logits of its own. ``threshold`` is the score
    above which an image is alerted: one for all, or one for each class that the protected classifier may answer, (K,);
    with ``NoDetector`` it is infinite. The raw pass through the classifier is shared by the purifier, the detector and
    the bare answer, whichever layers they look at. Raises ``ValueError`` for a finite threshold without a detector, and
    for one for each class beside a judge, since the class that is answered is then known only after the alert.
    """

    threshold: Tensor

    def __init__(
        self,
        classifier: Classifier,
        purifier: Purifier,
        detector: Detector,
        threshold: float | Sequence[float] = math.inf,
        *,
        judge: Judge | None = None,
        corrector: Corrector | None = None,
    ) -> None:
        super().__init__()
        if isinstance(detector, NoDetector) and threshold != math.inf:
            raise ValueError(f"Expected an infinite threshold where there is no detector, got {threshold}.")
        if judge is not None and not isinstance(threshold, float):
            raise ValueError(f"Expected one threshold for all classes beside a judge, got {threshold}.")
        self.classifier = classifier
        self.purifier = purifier
        self.detector = detector
        self.judge = judge or PurifiedAnswer()
        self.corrector = corrector
        self.register_buffer("threshold", torch.tensor(threshold))

    def forward(self, x: Tensor, noise_scale: Tensor | None = None) -> Output:
        """Return the ``Output`` for images (N, C, H, W) in [0, 1]; ``noise_scale`` (scalar, 1 unless given)."""
        raw = self.raw_pass(x)
        judged = self.answer(x, self._purify(x, raw, noise_scale), raw)
        return judged if self.corrector is None else self._corrected(self.corrector, judged, noise_scale)

    def raw_pass(self, x: Tensor) -> Pass:
        """Return what the purifier, the detector and the bare answer need of the images as they are, from one pass."""
        return self._pass(x, self.purifier.layer, *self._watched("raw"))

    def answer(self, x: Tensor, x_purified: Tensor, raw: Pass) -> Output:
        """Return the ``Output`` for images whose purified form and ``raw_pass`` are known, none of them corrected."""
        evidence = self._look(x, x_purified, raw)
        scores = self.detector(*evidence)
        threshold = self.threshold[evidence.logits.argmax(1)] if self.threshold.ndim else self.threshold
        alerts = scores > threshold
        logits = self.judge(evidence.undefended_logits, evidence.logits, alerts)
        return Output(logits, scores, alerts, x_purified, evidence.undefended_logits)

    def evidence(self, x: Tensor) -> Evidence:
        """Return what the detector is shown of images (N, C, H, W) in [0, 1], noise on."""
        raw = self.raw_pass(x)
        return self._look(x, self._purify(x, raw, None), raw)

    def activations(self, x: Tensor, noise_scale: Tensor | None = None) -> Tensor:
        """Return the activations that the detector is shown of images (N, C, H, W) in [0, 1], and no more."""
        inspects = self.detector.inspects
        if not self.detector.layers:
            return _nothing(x)
        if inspects == "views":
            return self._views(x)
        if inspects == "raw":
            return self._activations(x)
        raw = None if self.purifier.layer is None else self._pass(x, self.purifier.layer)
        return self._activations(self._purify(x, raw, noise_scale))

    def _look(self, x: Tensor, x_purified: Tensor, raw: Pass) -> Evidence:
        layers, inspects = self.detector.layers, self.detector.inspects
        watched = self._watched("purified")
        unchanged = x_purified is x and not watched
        purified = raw if unchanged else self._pass(x_purified, *watched)
        if not layers:
            activations = _nothing(x)
        elif inspects == "views":
            activations = self._views(x)
        else:
            seen = raw if inspects == "raw" else purified
            activations = _joined([seen.activations[layer] for layer in layers])
        distance = (x_purified - x).flatten(1).norm(dim=1)
        return Evidence(activations, purified.logits, raw.logits, distance)

    def _watched(self, seen_pass: Inspected) -> tuple[str, ...]:
        """Return the layers that the detector looks at in a pass."""
        return self.detector.layers if self.detector.inspects == seen_pass else ()

    def _views(self, x: Tensor) -> Tensor:
        """Return the activations (N, V, ...) of the detector's views of images."""
        views = self.detector.views(x)
        activations: Tensor = self._activations(views.flatten(0, 1)).unflatten(0, views.shape[:2])
        return activations

    def _activations(self, x: Tensor) -> Tensor:
        """Return what the detector's layers make of images, and compute nothing after them."""
        names = tuple(self.classifier.resolve_layer(layer).name for layer in self.detector.layers)
        return _joined(self.classifier.graph(x, names))

    def _corrected(self, corrector: Corrector, judged: Output, noise_scale: Tensor | None) -> Output:
        (rows,) = judged.alerts.nonzero(as_tuple=True)
        if not len(rows):
            return judged
        corrected = corrector(
            judged.purified[rows], judged.undefended_logits[rows], _scale(noise_scale, judged.purified)
        )
        logits = judged.logits.index_copy(0, rows, corrected.logits)
        return judged._replace(logits=logits, purified=judged.purified.index_copy(0, rows, corrected.purified))

    def _purify(self, x: Tensor, raw: Pass | None, noise_scale: Tensor | None) -> Tensor:
        layer = self.purifier.layer
        shown = () if layer is None or raw is None else (raw.activations[layer], raw.logits)
        purified: Tensor = self.purifier(x, _scale(noise_scale, x), *shown)
        return purified

    def _pass(self, x: Tensor, *layers: str | None) -> Pass:
        """Run the classifier once for its logits and for the layers that are named."""
        values = {name: self.classifier.resolve_layer(name).name for name in layers if name is not None}
        wanted = tuple(dict.fromkeys((LOGITS, *values.values())))
        computed = dict(zip(wanted, self.classifier.graph(x, wanted), strict=True))
        return Pass(computed[LOGITS], {name: computed[value] for name, value in values.items()})


def _joined(activations: Sequence[Tensor]) -> Tensor:
    """Return the activations of one layer as they are, those of several flattened and joined (N, D)."""
    return activations[0] if len(activations) == 1 else torch.cat([each.flatten(1) for each in activations], 1)


def _nothing(x: Tensor) -> Tensor:
    return x.new_zeros(len(x), 0)


def _scale(noise_scale: Tensor | None, x: Tensor) -> Tensor:
    return torch.ones((), device=x.device) if noise_scale is None else noise_scale
