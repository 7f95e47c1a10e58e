"""A protected classifier as an attacker sees it who knows all of it (CoopHANCE, section 2.3, scenario B)."""

import copy
import math

import torch
from torch import Tensor, nn

from defenses.protected import Output, ProtectedClassifier
from defenses.purifier import Purifier


class Victim(nn.Module):
    """Answer with logits that gradients go through, over the purifier's noise and what stands in its way.

    Each call draws ``samples`` fresh noises for every image and answers with the logarithm of the mean of the
    probabilities, so that its gradient is that of the expectation over the noise (EOT, Athalye et al. 2018); 1 will do
    for a defense without noise. A purifier that has no useful derivative is passed backward as if it gave back its
    input (BPDA). The protected classifier given is copied, and the copy is in evaluation mode.
    """

    def __init__(self, protected: ProtectedClassifier, samples: int = 1) -> None:
        super().__init__()
        if samples < 1:
            raise ValueError(f"Expected at least 1 sample of the noise, got {samples}.")
        self.protected = copy.deepcopy(protected).eval().requires_grad_(False)
        if not self.protected.purifier.differentiable:
            self.protected.purifier = StraightThrough(self.protected.purifier)
        self.samples = samples

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, K) for images (N, C, H, W) in [0, 1]."""
        log_probabilities = self.output(x).logits.log_softmax(1).unflatten(0, (-1, self.samples))
        return log_probabilities.logsumexp(1) - math.log(self.samples)

    def output(self, x: Tensor) -> Output:
        """Return the ``Output`` of each image under ``samples`` noises: rows (N * samples, ...), an image's together."""
        output: Output = self.protected(x.repeat_interleave(self.samples, 0))
        return output

    def activations(self, x: Tensor) -> Tensor:
        """Return what the detector is shown of images (N, C, H, W), under one noise."""
        return self.protected.activations(x)


class StraightThrough(Purifier):
    """Purify as another does, and hand gradients back as if nothing had been done (BPDA, Athalye et al. 2018)."""

    def __init__(self, purifier: Purifier) -> None:
        super().__init__()
        self.purifier = purifier
        self.layer = purifier.layer

    def forward(self, x: Tensor, noise_scale: Tensor, *shown: Tensor) -> Tensor:
        with torch.no_grad():
            purified: Tensor = self.purifier(x, noise_scale, *shown)
        return x + (purified - x).detach()
