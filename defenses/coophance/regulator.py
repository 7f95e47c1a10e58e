"""The Regulator: a nine-stage UNet that purifies images (CoopHANCE, section 3.1, figure 3)."""

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defenses.coophance.confusion import ConfusionLayer
from defenses.noise import gaussian_like
from defenses.purifier import Purifier


@dataclass(frozen=True)
class RegulatorConfig:
    """Describe a Regulator's structure and noise.

    ``image_shape`` is (C, H, W). ``channels`` are the widths of the down stages, one halving each (the paper's four),
    ``skip_channels`` those of the skips at full resolution, 1/2, 1/4 and so on, where 0 leaves a skip out. ``output``
    says what the network gives: the image itself, behind a sigmoid as published, or what is added to its input
    (``residual``). ``training_noise`` and ``inference_noise`` are standard deviations of Gaussian noise on the input,
    for images in [0, 1]. ``alpha`` multiplies the measured fluctuation in the confusion layers; ``confusion`` false
    makes those layers the identity at inference. ``strength`` in (0, 1] is the share of the purified image in what is
    returned; the rest is the image as it came. Raises ``ValueError`` for what no network can be built from.
    """

    image_shape: tuple[int, int, int]
    channels: tuple[int, ...] = (16, 32, 64, 128)
    skip_channels: tuple[int, ...] = (4, 8, 16, 32)
    batch_norm: bool = True
    dropout: float = 0.5
    output: Literal["image", "residual"] = "image"
    training_noise: float = 15 / 255
    inference_noise: float = 0.0
    confusion: bool = True
    alpha: float = 1.0
    strength: float = 1.0

    def __post_init__(self) -> None:
        if not self.channels or min(self.channels) < 1:
            raise ValueError(f"Expected at least one stage, each of a channel or more, got channels {self.channels}.")
        if len(self.skip_channels) != len(self.channels) or min(self.skip_channels) < 0:
            raise ValueError(
                f"Expected a skip width of 0 or more for each of the {len(self.channels)} stages, "
                f"got {self.skip_channels}."
            )
        if not 0 < self.strength <= 1:
            raise ValueError(f"Expected a strength above 0 and at most 1, got {self.strength}.")

    @classmethod
    def plain(cls, image_shape: tuple[int, int, int]) -> Self:
        """Return the form published for CIFAR-10: no batch norm, three narrow skips, input noise left on."""
        noise = 10 / 255
        return cls(
            image_shape,
            skip_channels=(0, 2, 4, 8),
            batch_norm=False,
            training_noise=noise,
            inference_noise=noise,
        )

    def as_json(self) -> dict[str, Any]:
        """Return the configuration as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Return the configuration that ``as_json`` described."""
        fields: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
        }
        return cls(**fields)


class Regulator(Purifier):
    """Map an image (N, C, H, W) in [0, 1] to a purified image of the same shape and range.

    Confusion layers stand at the positions of figure 3, eight for four down stages: after each down-sampling and before
    each up-sampling. Dropout follows the last down stage and the bottleneck. Sides that the halvings do not divide are
    padded at the right and bottom by repeating the edge, and cropped again.
    """

    def __init__(self, config: RegulatorConfig) -> None:
        super().__init__()
        self.config = config
        widths, skips = config.channels, config.skip_channels
        self.down = nn.ModuleList(
            _stage(before, width, config.batch_norm)
            for before, width in zip((config.image_shape[0], *widths), widths, strict=False)
        )
        self.skips = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, skip, 3, padding=1), nn.ReLU()) if skip else nn.Identity()
            for width, skip in zip(widths, skips, strict=True)
        )
        self.bottleneck = _stage(widths[-1], widths[-1], config.batch_norm)
        self.enlarge = nn.ModuleList(
            nn.Sequential(
                nn.Upsample(scale_factor=2, mode="nearest"),
                nn.ZeroPad2d((0, 1, 0, 1)),
                nn.Conv2d(before, width, 2),
                nn.ReLU(),
            )
            for before, width in zip((widths[-1], *widths[::-1]), widths[::-1], strict=False)
        )
        self.up = nn.ModuleList(
            _stage(width + skip, width, config.batch_norm)
            for width, skip in zip(widths[::-1], skips[::-1], strict=True)
        )
        before_up = (widths[-1], *widths[:0:-1])
        self.confusion = nn.ModuleList(ConfusionLayer(width, config.alpha) for width in (*widths, *before_up))
        self.set_confusion(config.confusion)
        self.dropout = nn.Dropout(config.dropout)
        self.to_image = nn.Conv2d(widths[0], config.image_shape[0], 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module.bias is not None:
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)
        if config.output == "residual":
            nn.init.zeros_(self.to_image.weight)

    def set_confusion(self, enabled: bool) -> None:
        """Switch every confusion layer on or off."""
        for layer in self.confusion_layers:
            layer.enabled = enabled

    @property
    def confusion_layers(self) -> list[ConfusionLayer]:
        """The confusion layers, in the order in which an image passes them."""
        return [layer for layer in self.confusion if isinstance(layer, ConfusionLayer)]

    def set_strength(self, strength: float) -> None:
        """Set the share of the purified image in what is returned, in (0, 1]."""
        self.config = replace(self.config, strength=strength)

    def forward(self, x: Tensor, noise_scale: Tensor) -> Tensor:
        """Return the purified image; ``noise_scale`` is a scalar that multiplies all noise, 0 switching it off."""
        sigma = self.config.training_noise if self.training else self.config.inference_noise
        noisy = (x + noise_scale * sigma * gaussian_like(x)).clamp(0, 1) if sigma else x
        purified = self.finish(noisy, self.reconstruct(noisy, noise_scale))
        strength = self.config.strength
        return purified if strength == 1 else x + strength * (purified - x)

    def finish(self, x: Tensor, reconstruction: Tensor) -> Tensor:
        """Turn what ``reconstruct`` gave for x into an image in [0, 1]."""
        if self.config.output == "residual":
            return (x + reconstruction).clamp(0, 1)
        return torch.sigmoid(reconstruction)

    def reconstruct(self, x: Tensor, noise_scale: Tensor) -> Tensor:
        """Return what the network gives for x without input noise: an image before its sigmoid, or a residual."""
        height, width = self.config.image_shape[1:]
        depth = len(self.down)
        pad_height, pad_width = -height % 2**depth, -width % 2**depth
        a = F.pad(x, (0, pad_width, 0, pad_height), mode="replicate") if pad_height or pad_width else x
        kept = []
        for index, stage in enumerate(self.down):
            a = stage(a)
            if index == depth - 1:
                a = self.dropout(a)
            kept.append(self.skips[index](a) if self.config.skip_channels[index] else None)
            a = self.confusion[index](F.max_pool2d(a, 2), noise_scale)
        a = self.dropout(self.bottleneck(a))
        for index, (enlarge, stage) in enumerate(zip(self.enlarge, self.up, strict=True)):
            a = enlarge(self.confusion[depth + index](a, noise_scale))
            skip = kept.pop()
            a = stage(a if skip is None else torch.cat([a, skip], 1))
        a = self.to_image(a)
        cropped: Tensor = a[:, :, :height, :width] if pad_height or pad_width else a
        return cropped


def _stage(before: int, width: int, batch_norm: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (before, width):
        layers.append(nn.Conv2d(channels, width, 3, padding=1))
        if batch_norm:
            layers.append(nn.BatchNorm2d(width))
        layers.append(nn.ReLU())
    return nn.Sequential(*layers)
