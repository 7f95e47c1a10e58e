"""A version's named outputs as one torch module, in the precision that was asked for."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from defenses.classifier import Classifier
from defenses.detector import Detector
from defenses.protected import Output, ProtectedClassifier

Version = Classifier | ProtectedClassifier
"""What a version is in torch: a bare classifier, or one behind its defense."""


class VersionOutputs(nn.Module):
    """Map images (N, C, H, W) in [0, 1] to the named outputs, in order: float32, and bool for ``alert``.

    ``outputs`` are names of ``service.engines.FIELDS``; the bare classifier alone runs where they ask for no more. With
    ``reduced`` convolutions and products are computed in bfloat16 or float16, sums over many values and the detector in
    float32, so that a score is compared with its threshold as finely as it is told. What a corrector would make of
    alerted images is left out (see ``TorchCorrection``). ``noise`` false switches all noise off. Raises ``ValueError``
    for an output that the version has not.
    """

    def __init__(self, version: Version, outputs: Sequence[str], *, noise: bool, reduced: torch.dtype | None) -> None:
        super().__init__()
        known = ("logits",) if isinstance(version, Classifier) else tuple(_FIELDS)
        if unknown := [name for name in outputs if name not in known]:
            raise ValueError(f"Expected outputs among {', '.join(known)}, got {', '.join(unknown)}.")
        self.reduced = reduced
        self._names = tuple(outputs)
        if isinstance(version, ProtectedClassifier) and self._names != ("undefended_logits",):
            self._model: Version = _uncorrected(version)
        else:
            self._model = version if isinstance(version, Classifier) else version.classifier
        self.register_buffer("noise_scale", torch.tensor(float(noise)))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast(x.device.type, self.reduced, enabled=self.reduced is not None):
            if isinstance(self._model, Classifier):
                return (self._model(x).float(),)
            output: Output = self._model(x, self.noise_scale)
        values = (getattr(output, _FIELDS[name]) for name in self._names)
        return tuple(value if value.dtype == torch.bool else value.float() for value in values)


_FIELDS = {
    "logits": "logits",
    "score": "scores",
    "alert": "alerts",
    "undefended_logits": "undefended_logits",
    "purified": "purified",
}


class _InFullPrecision(Detector):
    """A detector that is shown and computes float32, whatever the precision around it."""

    def __init__(self, detector: Detector) -> None:
        super().__init__(detector.layer, detector.inspects, detector.further)
        self._detector = detector

    def views(self, x: Tensor) -> Tensor:
        return self._detector.views(x)

    def forward(self, activations: Tensor, logits: Tensor, undefended_logits: Tensor, distance: Tensor) -> Tensor:
        shown = (value.float() for value in (activations, logits, undefended_logits, distance))
        with torch.autocast(activations.device.type, enabled=False):
            scores: Tensor = self._detector(*shown)
        return scores


def _uncorrected(protected: ProtectedClassifier) -> ProtectedClassifier:
    """Return the same parts without the corrector."""
    uncorrected = ProtectedClassifier(
        protected.classifier, protected.purifier, _InFullPrecision(protected.detector), judge=protected.judge
    )
    uncorrected.threshold = protected.threshold
    return uncorrected.eval()
