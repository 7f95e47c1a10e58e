"""What every purifier is, and what it may be shown."""

from torch import nn


class PurifierNotExportable(ValueError):
    """A purifier cannot become a part of one ONNX graph."""


class Purifier(nn.Module):
    """Map images (N, C, H, W) in [0, 1], and a scalar ``noise_scale`` that multiplies all its noise, to such images.

    ``layer`` names a layer of the classifier, or is None. A purifier that names one is called with two tensors more:
    that layer's activations (N, ...) of the raw images, and their logits (N, K). ``differentiable`` says whether its
    derivative is of use to an attacker: that of rounding is zero.
    """

    differentiable = True

    def __init__(self, layer: str | None = None) -> None:
        super().__init__()
        self.layer = layer

    def check_exportable(self) -> None:
        """Raise ``PurifierNotExportable`` where this cannot become a part of one ONNX graph, as most purifiers can."""
