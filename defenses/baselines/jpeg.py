"""JPEG compression and decompression as tensor operations (ITU-T T.81; defense: Dziugaite et al. 2016)."""

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from defenses.purifier import Purifier

Subsampling = Literal["4:2:0", "4:4:4"]
SUBSAMPLINGS: tuple[str, ...] = get_args(Subsampling)

LUMINANCE = (
    *(16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55),
    *(14, 13, 16, 24, 40, 57, 69, 56, 14, 17, 22, 29, 51, 87, 80, 62),
    *(18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92),
    *(49, 64, 78, 87, 103, 121, 120, 101, 72, 92, 95, 98, 112, 100, 103, 99),
)
CHROMINANCE = (
    *(17, 18, 24, 47, 99, 99, 99, 99, 18, 21, 26, 66, 99, 99, 99, 99),
    *(24, 26, 56, 99, 99, 99, 99, 99, 47, 66, 99, 99, 99, 99, 99, 99),
    *(99,) * 32,
)
"""The standard's own quantisation tables (annex K.1), row by row."""

BLOCK = 8

TIE = 1e-4
"""What is added before rounding, so that a half is rounded up however its last bits came out."""


class JpegCompression(Purifier):
    """Compress and decompress images of 1 or 3 channels as baseline JPEG does, the entropy coding left out.

    ``quality`` from 1 to 100 scales the standard's tables as libjpeg does. With ``subsampling`` 4:2:0 the two colour
    channels are halved in height and width by the mean of four values, and interpolated on the way back. Images are
    rounded to 8 bits at both ends and repeat their edge up to whole blocks. What depends on rounding is computed in
    double precision, so that every runtime rounds alike.
    """

    differentiable = False

    cosines: Tensor
    luminance: Tensor
    chrominance: Tensor
    to_ycc: Tensor
    to_rgb: Tensor

    def __init__(self, quality: int, subsampling: Subsampling) -> None:
        super().__init__()
        self.quality = quality
        self.subsampling = subsampling
        for name, table in (("luminance", LUMINANCE), ("chrominance", CHROMINANCE)):
            self.register_buffer(name, quantisation_table(table, quality), persistent=False)
        for name, values in (("cosines", _cosines()), ("to_ycc", _to_ycc()), ("to_rgb", _to_ycc().inverse())):
            self.register_buffer(name, values, persistent=False)

    def forward(self, x: Tensor, noise_scale: Tensor) -> Tensor:
        pixels = _rounded(x.double() * 255)
        if x.shape[1] == 1:
            return self._recoded(pixels, self.luminance).to(x.dtype) / 255
        ycc = _mixed(pixels, self.to_ycc)
        ycc = torch.cat([ycc[:, :1], _rounded(ycc[:, 1:] + 128)], 1)
        luminance = self._recoded(_rounded(ycc[:, :1]), self.luminance)
        chrominance = self._chrominance(ycc[:, 1:]) - 128
        rgb = _mixed(torch.cat([luminance, chrominance], 1), self.to_rgb)
        return _rounded(rgb).clamp(0, 255).to(x.dtype) / 255

    def _chrominance(self, colours: Tensor) -> Tensor:
        """Return the colour channels (N, 2, H, W) from 0 to 255 after compression."""
        if self.subsampling == "4:4:4":
            return self._recoded(colours, self.chrominance)
        height, width = colours.shape[2:]
        even = F.pad(colours, (0, width % 2, 0, height % 2), mode="replicate")
        # The four corners' mean, as sums of slices: exact, and in double precision everywhere.
        halved = _rounded((_every_other(even, 0) + _every_other(even, 1)) / 4)
        recoded = self._recoded(halved, self.chrominance)
        return _rounded(_doubled(_doubled(recoded, 2), 3)[:, :, :height, :width])

    def _recoded(self, channels: Tensor, table: Tensor) -> Tensor:
        """Return channels (N, C, H, W) from 0 to 255, each block quantised in the frequencies by a table (8, 8)."""
        height, width = channels.shape[2:]
        rows, columns = -(-height // BLOCK), -(-width // BLOCK)
        whole = F.pad(channels, (0, columns * BLOCK - width, 0, rows * BLOCK - height), mode="replicate")
        blocks = whole.reshape(-1, channels.shape[1], rows, BLOCK, columns, BLOCK).transpose(3, 4) - 128
        # In eighths, as the integer transform of libjpeg leaves them.
        frequencies = _rounded(8 * (self.cosines @ blocks @ self.cosines.T)) / 8 / table
        quantised = frequencies.sign() * _rounded(frequencies.abs())
        decoded = self.cosines.T @ (quantised * table) @ self.cosines + 128
        joined = decoded.transpose(3, 4).reshape(-1, channels.shape[1], rows * BLOCK, columns * BLOCK)
        return _rounded(joined).clamp(0, 255)[:, :, :height, :width]


def quantisation_table(table: tuple[int, ...], quality: int) -> Tensor:
    """Return the table (8, 8) of a quality from 1 to 100, float64, scaled as the Independent JPEG Group does."""
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    scaled = [min(max((value * scale + 50) // 100, 1), 255) for value in table]
    return torch.tensor(scaled, dtype=torch.float64).reshape(BLOCK, BLOCK)


def _cosines() -> Tensor:
    """Return the orthonormal matrix (8, 8) of the discrete cosine transform, a row for each frequency."""
    frequency, place = torch.arange(BLOCK).double().unsqueeze(1), torch.arange(BLOCK).double()
    cosines = (math.pi * frequency * (2 * place + 1) / (2 * BLOCK)).cos() * math.sqrt(2 / BLOCK)
    cosines[0] /= math.sqrt(2)
    return cosines


def _to_ycc() -> Tensor:
    """Return the matrix (3, 3) from red, green, blue to luminance and the two colour differences (JFIF 1.02)."""
    luminance = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)
    blue, red = torch.eye(3, dtype=torch.float64)[2], torch.eye(3, dtype=torch.float64)[0]
    return torch.stack([luminance, (blue - luminance) / 1.772, (red - luminance) / 1.402])


def _mixed(channels: Tensor, matrix: Tensor) -> Tensor:
    """Return channels (N, 3, H, W) mixed by a matrix (3, 3)."""
    return (matrix @ channels.flatten(2)).reshape(channels.shape)


def _rounded(values: Tensor) -> Tensor:
    return (values + (0.5 + TIE)).floor()


def _every_other(channels: Tensor, row: int) -> Tensor:
    """Return the sums of neighbours in every other row, (N, C, H / 2, W / 2)."""
    return channels[:, :, row::2, 0::2] + channels[:, :, row::2, 1::2]


def _doubled(channels: Tensor, dim: int) -> Tensor:
    """Return channels twice as long along an axis, each value 3 parts of the nearest and 1 of the next one."""
    length = channels.shape[dim]
    first, last = channels.narrow(dim, 0, 1), channels.narrow(dim, length - 1, 1)
    before = torch.cat([first, channels.narrow(dim, 0, length - 1)], dim)
    after = torch.cat([channels.narrow(dim, 1, length - 1), last], dim)
    both = torch.stack([3 * channels + before, 3 * channels + after], dim + 1) / 4
    return both.flatten(dim, dim + 1)
