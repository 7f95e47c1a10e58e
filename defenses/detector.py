"""What every detector is, and what it is shown."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from torch import Tensor, nn

Inspected = Literal["raw", "purified", "views"]
"""The pass that a detector's activations come from: of the raw image, of the purified one, or of views of the raw."""


class Evidence(NamedTuple):
    """What the protected pass leaves behind of N images, for a detector to look at.

    ``activations`` (N, ...) of the detector's layer, (N, 0) where it names none, ``logits`` (N, K) of the purified
    images, ``undefended_logits`` (N, K) of the raw ones, and ``distance`` (N,), the L2 distance between the two images,
    for values in [0, 1]. Of several layers the activations are flattened and joined, (N, D); those of views are
    (N, V, ...).
    """

    activations: Tensor
    logits: Tensor
    undefended_logits: Tensor
    distance: Tensor


class Detector(nn.Module):
    """Map the four tensors of an ``Evidence``, in that order, to scores (N,).

    A higher score means more likely adversarial. ``layer`` names the classifier's layer, None where no activations are
    needed, ``further`` those that are looked at beside it, and ``inspects`` the pass that their activations come from.
    A detector that inspects ``views`` is shown those of V images that it makes of each raw one.
    """

    def __init__(self, layer: str | None, inspects: Inspected, further: Sequence[str] = ()) -> None:
        super().__init__()
        self.layer = layer
        self.inspects = inspects
        self.further = tuple(further)

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of all layers that are looked at."""
        return () if self.layer is None else (self.layer, *self.further)

    def views(self, x: Tensor) -> Tensor:
        """Return the views (N, V, C, H, W) in [0, 1] of images (N, C, H, W); the images themselves unless told."""
        return x.unsqueeze(1)


class NoDetector(Detector):
    """Score every image 0: a defense that only purifies, whose threshold is infinite and which never alerts."""

    def __init__(self) -> None:
        super().__init__(None, "raw")

    def forward(self, activations: Tensor, logits: Tensor, undefended_logits: Tensor, distance: Tensor) -> Tensor:
        return logits.new_zeros(len(logits))
