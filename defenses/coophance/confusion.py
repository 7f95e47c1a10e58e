"""Confusion layers and the statistics they are set from (CoopHANCE, section 3.1.2, algorithm 1)."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from defenses.noise import gaussian_like


class Fluctuation(NamedTuple):
    """How the channels of one layer move under attack: mean and standard deviation, each (C,) float32."""

    mean: Tensor
    standard_deviation: Tensor


class ConfusionLayer(nn.Module):
    """Add channel-wise Gaussian noise that imitates what an attack does to its input.

    Channel j of the input (N, C, H, W) becomes ``a + noise_scale * (mu_j + alpha * sigma_j * g)`` with ``g`` drawn
    afresh from N(0, 1) for every image and position, in training and at inference alike (section 3.1.2). ``mu`` and
    ``sigma`` are in units of the activation, with no division by its range, so ``alpha = 1`` is the fluctuation as it
    was measured. Until ``imitate`` is called the layer is the identity.
    """

    mu: Tensor
    sigma: Tensor

    def __init__(self, channels: int, alpha: float) -> None:
        super().__init__()
        self.alpha = alpha
        self.enabled = True
        self.register_buffer("mu", torch.zeros(channels))
        self.register_buffer("sigma", torch.zeros(channels))

    def imitate(self, fluctuation: Fluctuation) -> None:
        """Take over a measured fluctuation of as many channels."""
        self.mu.copy_(fluctuation.mean)
        self.sigma.copy_(fluctuation.standard_deviation)

    def forward(self, activation: Tensor, noise_scale: Tensor) -> Tensor:
        if not self.enabled:
            return activation
        mu = self.mu.reshape(1, -1, 1, 1)
        sigma = self.sigma.reshape(1, -1, 1, 1)
        return activation + noise_scale * (mu + self.alpha * sigma * gaussian_like(activation))


class FluctuationStatistics:
    """Accumulate the mean and standard deviation per channel of ``adversarial - clean`` activations.

    Every image pair and every position counts once. The standard deviation is the population's (no Bessel
    correction). Section 3.1.2 prints "variance" and clean - adversarial; the standard deviation keeps the units and
    the sign used here lets ``mu`` imitate the attack instead of undoing it.
    """

    def __init__(self, channels: int) -> None:
        self.count = 0
        self._sum = torch.zeros(channels, dtype=torch.float64)
        self._sum_of_squares = torch.zeros(channels, dtype=torch.float64)

    def add(self, clean: Tensor, adversarial: Tensor) -> None:
        """Count a batch of activation pairs, each (N, C, H, W)."""
        distance = (adversarial - clean).double().transpose(0, 1).flatten(1)
        self.count += distance.shape[1]
        self._sum += distance.sum(1).cpu()
        self._sum_of_squares += distance.square().sum(1).cpu()

    def fluctuation(self) -> Fluctuation:
        """Return the mean and the population standard deviation per channel, on the CPU."""
        mean = self._sum / self.count
        variance = self._sum_of_squares / self.count - mean.square()
        return Fluctuation(mean.float(), variance.clamp_min(0).sqrt().float())


@torch.no_grad()
def measure_fluctuations(
    sample_model: nn.Module,
    layers: Iterable[ConfusionLayer],
    batches: Iterable[tuple[Tensor, Tensor]],
) -> list[Fluctuation]:
    """Measure, at every confusion layer's input, how the sample model's activations move under attack.

    ``batches`` yields pairs (x, x_adv), each (N, C, H, W) in [0, 1]; the sample model must be in evaluation mode.
    Returns one ``Fluctuation`` for each layer, in order (algorithm 1, lines 4 to 9). Raises ``ValueError``
    when there are no pairs: a confusion layer without statistics would be no confusion at all.
    """
    layers = list(layers)
    statistics = [FluctuationStatistics(layer.mu.numel()) for layer in layers]
    seen: list[Tensor] = []
    hooks = [layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])) for layer in layers]
    quiet = torch.zeros(())
    try:
        for x, x_adv in batches:
            sample_model(x, quiet.to(x.device))
            clean, seen = seen, []
            sample_model(x_adv, quiet.to(x.device))
            adversarial, seen = seen, []
            for statistic, before, after in zip(statistics, clean, adversarial, strict=True):
                statistic.add(before, after)
    finally:
        for hook in hooks:
            hook.remove()
    if any(statistic.count == 0 for statistic in statistics):
        raise ValueError("The fluctuation statistics need at least one pair of a clean and an adversarial image.")
    return [statistic.fluctuation() for statistic in statistics]
