"""What every detector is."""

from typing import Literal

from torch import nn


class Detector(nn.Module):
    """Map activations (N, ...) of one layer and the protected logits (N, K) to scores (N,).

    A higher score means more likely adversarial. ``layer`` names the classifier's layer, and ``inspects`` the pass
    that its activations come from: that of the raw or of the purified image.
    """

    def __init__(self, layer: str, inspects: Literal["raw", "purified"]) -> None:
        super().__init__()
        self.layer = layer
        self.inspects = inspects
