"""What every detector is, and what it is shown."""

from typing import Literal, NamedTuple

from torch import Tensor, nn


class Evidence(NamedTuple):
    """What the protected pass leaves behind of N images, for a detector to look at.

    ``activations`` (N, ...) of the detector's layer, (N, 0) where it names none, ``logits`` (N, K) of the purified
    images, ``undefended_logits`` (N, K) of the raw ones, and ``distance`` (N,), the L2 distance between the two images,
    for values in [0, 1].
    """

    activations: Tensor
    logits: Tensor
    undefended_logits: Tensor
    distance: Tensor


class Detector(nn.Module):
    """Map the four tensors of an ``Evidence``, in that order, to scores (N,).

    A higher score means more likely adversarial. ``layer`` names the classifier's layer, None where no activations are
    needed, and ``inspects`` the pass that its activations come from: that of the raw or of the purified image.
    """

    def __init__(self, layer: str | None, inspects: Literal["raw", "purified"]) -> None:
        super().__init__()
        self.layer = layer
        self.inspects = inspects


class NoDetector(Detector):
    """Score every image 0: a defense that only purifies, whose threshold is infinite and which never alerts."""

    def __init__(self) -> None:
        super().__init__(None, "raw")

    def forward(self, activations: Tensor, logits: Tensor, undefended_logits: Tensor, distance: Tensor) -> Tensor:
        return logits.new_zeros(len(logits))
