"""Total variation minimisation (Guo et al. 2018, Countering Adversarial Images using Input Transformations)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from defenses.purifier import Purifier

STEP = 0.25
"""The step of the projection, which converges up to this size (Chambolle 2005)."""


class TotalVariationMinimisation(Purifier):
    """Map each image x to u of the least |u - x|^2 / 2 + ``weight`` TV(u) (Rudin, Osher and Fatemi 1992).

    TV is the isotropic total variation of each channel on its own. It takes ``steps`` of Chambolle's projection
    (Chambolle 2004, equation 9), a fixed number of operations that can be differentiated and exported; what Guo et al.
    drop of the pixels at random is kept here.
    """

    gradient_kernel: Tensor
    divergence_kernel: Tensor

    def __init__(self, weight: float, steps: int) -> None:
        super().__init__()
        self.weight = weight
        self.steps = steps
        forward = torch.tensor([[[-1.0, 1.0], [0.0, 0.0]], [[-1.0, 0.0], [1.0, 0.0]]])
        backward = torch.tensor([[[0.0, 0.0], [-1.0, 1.0]], [[0.0, -1.0], [0.0, 1.0]]])
        self.register_buffer("gradient_kernel", STEP * forward.unsqueeze(1), persistent=False)
        self.register_buffer("divergence_kernel", backward.unsqueeze(0), persistent=False)

    def forward(self, x: Tensor, noise_scale: Tensor) -> Tensor:
        channels = x.flatten(0, 1).unsqueeze(1)
        divergence = torch.zeros_like(channels)
        dual = torch.zeros_like(channels)  # as two components from the first step on
        for _ in range(self.steps):
            # Beyond the edge the image repeats itself, where its gradient and so the dual are zero.
            ascent = F.conv2d(F.pad(divergence - channels, (0, 1, 0, 1), mode="replicate"), self.gradient_kernel)
            length = torch.linalg.vector_norm(ascent, dim=1, keepdim=True)
            dual = (dual + ascent) / (1 + length / self.weight)
            divergence = F.conv2d(F.pad(dual, (1, 0, 1, 0)), self.divergence_kernel)
        return (channels - divergence).reshape(x.shape).clamp(0, 1)


def total_variation(x: Tensor) -> Tensor:
    """Return (N,) the isotropic total variation of images (N, C, H, W), summed over the channels."""
    padded = F.pad(x, (0, 1, 0, 1), mode="replicate")
    across, down = padded[..., :-1, 1:] - x, padded[..., 1:, :-1] - x
    length: Tensor = torch.linalg.vector_norm(torch.stack([across, down]), dim=0)
    return length.flatten(1).sum(1)
