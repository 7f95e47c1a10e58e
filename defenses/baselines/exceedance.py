"""Statistics of different kinds made comparable by how rarely benign images exceed them."""

import torch
from torch import Tensor, nn

LEVELS = (0.0, 0.5, 0.75, 0.9, 0.95, 0.98, 0.99)
"""The benign quantiles that are kept; between them, and beyond the last two, it goes on in a straight line."""

APART = 1e-6
"""How far apart two quantiles are put at least, of the distance of the first and the last one."""

SMALLEST = 1e-6
"""What counts as that distance where benign images are all alike."""


class Exceedance(nn.Module):
    """Map S statistics of each image, (N, S), to -log2 of the share of benign images that exceed each, (N, S).

    It is 0 at the least benign value, 1 at the median, and rises by 1 wherever half as many benign images are left.
    """

    knots: Tensor
    levels: Tensor

    def __init__(self, statistics: int) -> None:
        super().__init__()
        self.register_buffer("knots", torch.arange(len(LEVELS)).double().repeat(statistics, 1))
        self.register_buffer("levels", -(1 - torch.tensor(LEVELS).double()).log2(), persistent=False)

    def fit(self, benign: Tensor) -> None:
        """Set the quantiles to those of benign images' statistics (n, S); raises ``ValueError`` without images."""
        if not len(benign):
            raise ValueError("Expected benign validation images to compare the detectors by, got none.")
        quantiles = benign.double().quantile(torch.tensor(LEVELS).double().to(benign.device), dim=0).T
        span = (quantiles[:, -1:] - quantiles[:, :1]).clamp_min(SMALLEST)
        self.knots.copy_(quantiles + APART * span * torch.arange(len(LEVELS), device=benign.device))

    def forward(self, statistics: Tensor) -> Tensor:
        above = (statistics.unsqueeze(2) >= self.knots[:, 1:-1]).sum(2)
        low, high = _picked(self.knots, above), _picked(self.knots, above + 1)
        share = (statistics - low) / (high - low)
        return self.levels[above] + share * (self.levels[above + 1] - self.levels[above])


def _picked(knots: Tensor, places: Tensor) -> Tensor:
    """Return (N, S) the knots (S, Q) of each statistic at places (N, S)."""
    return knots.T.gather(0, places)
