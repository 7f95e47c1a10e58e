"""Images, and differences of images, as PNG inside a page."""

import base64
import io

from PIL import Image
from torch import Tensor

from defenses.pixels import to_8_bits

MOST_SIDE = 128
"""Pixels of a picture's longer side at most."""

TIMES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
"""By how much a difference may be multiplied to be seen."""


def picture(image: Tensor) -> str:
    """Return an image (C, H, W) of one or three channels in [0, 1] as the data URI of a PNG, reduced where large."""
    return _data_uri(image, Image.Resampling.BOX)


def difference_picture(difference: Tensor) -> tuple[str, int]:
    """Return a difference (C, H, W) of images in [0, 1] as a picture, and by how much it is multiplied there.

    No change is middle grey; nearly all values lie within the range, and the rest is clipped.
    """
    values = difference.abs().flatten()
    large = float(values.kthvalue(max(1, round(0.995 * len(values)))).values)
    times = max((times for times in TIMES if times * large <= 0.5), default=TIMES[0])
    # Thinned and not averaged where it is large, which would make it look smaller than it is.
    return _data_uri(0.5 + times * difference, Image.Resampling.NEAREST), times


def _data_uri(image: Tensor, resampling: Image.Resampling) -> str:
    pixels = to_8_bits(image.clamp(0, 1)).permute(1, 2, 0).numpy()
    shown = Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)
    share = MOST_SIDE / max(shown.size)
    if share < 1:
        width, height = (max(1, round(share * side)) for side in shown.size)
        shown = shown.resize((width, height), resampling)
    buffer = io.BytesIO()
    shown.save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
