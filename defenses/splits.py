"""The parts of a data set that a defense is fitted on, as tensors."""

from typing import NamedTuple

from torch import Tensor


class LabelledImages(NamedTuple):
    """Images uint8 (N, C, H, W) and their classes int64 (N,)."""

    images: Tensor
    targets: Tensor


class Splits(NamedTuple):
    """The parts of a data set, which share no image: to fit on, to choose by, to calibrate on, to measure on."""

    fit: LabelledImages
    validation: LabelledImages
    calibration: LabelledImages
    test: LabelledImages
