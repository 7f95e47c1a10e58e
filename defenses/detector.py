"""What every detector is, and what it is shown."""

from typing import Literal, NamedTuple

from torch import Tensor, nn


class Evidence(NamedTuple):
    """What the protected pass leaves behind of N images, for a detector to look at.

    ``activations`` (N, ...) of the detector's layer, ``logits`` (N, K) of the purified images, ``undefended_logits``
    (N, K) of the raw ones, and ``distance`` (N,), the L2 distance between the two images, for values in [0, 1].
    """

    activations: Tensor
    logits: Tensor
    undefended_logits: Tensor
    distance: Tensor


class Detector(nn.Module):
    """Map the four tensors of an ``Evidence``, in that order, to scores (N,).

    A higher score means more likely adversarial. ``layer`` names the classifier's layer, and ``inspects`` the pass
    that its activations come from: that of the raw or of the purified image.
    """

    def __init__(self, layer: str, inspects: Literal["raw", "purified"]) -> None:
        super().__init__()
        self.layer = layer
        self.inspects = inspects
