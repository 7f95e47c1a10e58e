"""Images on their way to an engine: uint8, which stand for themselves divided by 255, or float32 in [0, 1]."""

from collections.abc import Sequence

import numpy as np


def as_float(images: np.ndarray) -> np.ndarray:
    """Return images of any shape as float32 in [0, 1], uint8 divided by 255; float32 come back as they are."""
    if images.dtype != np.uint8:
        return images
    scaled = np.empty(images.shape, np.float32)
    np.divide(images, np.float32(255), out=scaled)
    return scaled


def as_batch(images: Sequence[np.ndarray]) -> np.ndarray:
    """Return one or more arrays of images (N, C, H, W) in one: uint8 where all of them are, else float32."""
    if len(images) == 1:
        return images[0]
    alike = len({array.dtype for array in images}) == 1
    return np.concatenate(images if alike else [as_float(array) for array in images])
