"""Images as bytes, and as what classifiers take."""

from torch import Tensor, uint8


def to_float(images: Tensor) -> Tensor:
    """Return images, uint8 or already float in [0, 1], as float32 in [0, 1]; any shape."""
    return images.float() / 255 if images.dtype == uint8 else images


def to_8_bits(images: Tensor) -> Tensor:
    """Return images, float in [0, 1], rounded to uint8; any shape."""
    return (images * 255).round().to(uint8)
