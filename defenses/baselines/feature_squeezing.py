"""Feature Squeezing as a detector (Xu et al. 2018, section V)."""

import torch
from torch import Tensor

from defenses.baselines.bit_depth import reduce_bit_depth
from defenses.baselines.non_local_means import non_local_means
from defenses.baselines.smoothing import median_filter
from defenses.detector import Detector
from defenses.onnx_import import LOGITS

PATCH = 3


class FeatureSqueezing(Detector):
    """Score images by how far squeezing them moves the classifier's probabilities.

    The score is the largest L1 distance, from 0 to 2, between the probabilities of the raw image and those of each
    squeezed one (equations 5 and 6). The squeezers are ``bits`` for each value, a median of ``kernel`` by ``kernel``
    values, and non-local means of ``search`` by ``search`` pixels by patches of 3 by 3, at a ``strength`` in units of a
    value. The gradients of the first go backward as if it gave back its input, since its own derivative is zero.
    """

    def __init__(self, bits: int, kernel: int, search: int, strength: float) -> None:
        super().__init__(LOGITS, "views")
        self.bits = bits
        self.kernel = kernel
        self.search = search
        self.strength = strength

    def views(self, x: Tensor) -> Tensor:
        """Return the squeezed images (N, 3, C, H, W)."""
        coarse = x + (reduce_bit_depth(x, self.bits) - x).detach()
        smooth = median_filter(x, self.kernel)
        denoised = non_local_means(x, self.search, PATCH, self.strength)
        return torch.stack([coarse, smooth, denoised], 1)

    def forward(self, activations: Tensor, logits: Tensor, undefended_logits: Tensor, distance: Tensor) -> Tensor:
        squeezed = activations.softmax(2)
        return (squeezed - undefended_logits.softmax(1).unsqueeze(1)).abs().sum(2).amax(1)
