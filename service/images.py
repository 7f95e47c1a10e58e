"""Images and tensors as clients send them, checked and brought to the array a classifier takes."""

import io
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from PIL import Image, ImageFile, ImageOps
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from model_store import InputSpec

# The formats' own classes, not Image.open: it warns, process-wide, about sizes that are checked against a limit here.
_OPENERS: Mapping[str, tuple[str, Callable[[io.BytesIO], ImageFile.ImageFile]]] = {
    "image/png": ("PNG", PngImageFile),
    "image/jpeg": ("JPEG", JpegImageFile),
    "image/webp": ("WebP", WebPImageFile),
}
ORIENTATION = 0x0112
"""The EXIF tag that says how to turn an image to see it upright; 1 for not at all."""

_RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


class ImageRefused(ValueError):
    """The bytes are no image that can be classified; the message says what was expected and what came."""


class TensorRefused(ValueError):
    """The array is no batch of images that can be classified; the message says what was expected and what came."""


def decode_pixels(data: bytes, spec: InputSpec, *, max_pixels: int) -> np.ndarray:
    """Decode a PNG, JPEG or WebP image into uint8 (C, H, W), as `render_pixels` says.

    The content alone tells the format. A JPEG that carries further pictures (MPO) counts as its first one.

    Raises ImageRefused for other content, damage, missing pixels, an animation, more than `max_pixels` pixels (told
    from the header, before any is decoded), and for what `render_pixels` refuses.
    """
    return read_pixels(open_image(data, max_pixels=max_pixels), spec)


def open_image(data: bytes, *, max_pixels: int) -> ImageFile.ImageFile:
    """Read the header of a PNG, JPEG or WebP image, and no pixel.

    Raises ImageRefused for other content, a damaged header, and more than `max_pixels` pixels.
    """
    name, opener = _OPENERS[media_type_of(data)]
    try:
        image = opener(io.BytesIO(data))
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders meet damage with errors of many classes.
        raise _damaged(name, error) from error
    width, height = image.size
    if width * height > max_pixels:
        raise ImageRefused(f"An image may have at most {max_pixels} pixels, but the {name} has {width} x {height}.")
    return image


def read_pixels(image: ImageFile.ImageFile, spec: InputSpec) -> np.ndarray:
    """Decode an image that `open_image` opened into uint8 (C, H, W), as `render_pixels` says.

    Raises ImageRefused for damage, missing pixels, an animation, and for what `render_pixels` refuses.
    """
    name = _OPENERS[f"image/{str(image.format).lower()}"][0]
    try:
        if getattr(image, "n_frames", 1) > 1:
            raise ImageRefused(f"A single image was expected, but the {name} is an animation.")
        image.load()
        return render_pixels(image, spec)
    except (ImageRefused, MemoryError):
        raise
    except Exception as error:  # Pillow's decoders meet damage with errors of many classes.
        raise _damaged(name, error) from error


def _damaged(name: str, error: Exception) -> ImageRefused:
    return ImageRefused(f"The {name} image is damaged or truncated: {error or type(error).__name__}.")


def render_pixels(image: Image.Image, spec: InputSpec) -> np.ndarray:
    """Bring an image to uint8 (C, H, W) of the shape and mode of `spec`.

    EXIF orientation is applied, as viewers do. Palettes are resolved; CMYK becomes RGB without colour profiles; RGB
    becomes grey by ITU-R 601 luma; 16 bits keep the upper 8. An image of another size is resized, antialiased and
    without keeping its proportions, where `spec.resize` names a filter.

    Raises ImageRefused for transparency, since what is seen would depend on a background (an alpha channel that is
    opaque all over is dropped), and for another size where `spec.resize` is None.
    """
    image = ImageOps.exif_transpose(image) if image.getexif().get(ORIENTATION, 1) != 1 else image
    if image.has_transparency_data:
        if image.mode == "I;16" or image.convert("RGBA").getchannel("A").getextrema() != (255, 255):
            raise ImageRefused("An opaque image was expected, but this one has transparent pixels.")
        image = image.convert("RGBA")
    if image.mode == "I;16":
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode != spec.mode:
        image = image.convert(spec.mode)
    _, height, width = spec.shape
    if image.size != (width, height):
        if spec.resize is None:
            raise ImageRefused(
                f"The image must be {width} pixels wide and {height} high, but is {image.width} wide and "
                f"{image.height} high."
            )
        image = image.resize((width, height), _RESAMPLING[spec.resize])
    pixels = np.asarray(image)
    return pixels[np.newaxis] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def validate_tensor(data: np.ndarray, datatype: str, spec: InputSpec, *, max_batch: int) -> np.ndarray:
    """Check a batch of images given as a tensor and return it: uint8 or float32 in [0, 1], (N, C, H, W).

    `datatype` is the Open Inference Protocol's: UINT8, which stand for themselves divided by 255, or FP32. An array is
    returned as it is, without a copy, unless it is FP32 and not contiguous or not aligned; it is read-only where `data`
    is.

    Raises TensorRefused for another datatype, a shape that does not fit, N outside 1..`max_batch`, and values that are
    not finite or outside [0, 1].
    """
    if datatype not in ("FP32", "UINT8"):
        raise TensorRefused(f"The tensor must be FP32 or UINT8, not {datatype}.")
    if data.ndim != 4 or data.shape[1:] != spec.shape:
        raise TensorRefused(f"The tensor must have the shape (N, {str(spec.shape)[1:]}, not {data.shape}.")
    if not 1 <= data.shape[0] <= max_batch:
        raise TensorRefused(f"The tensor must hold 1 to {max_batch} images, not {data.shape[0]}.")
    if datatype == "UINT8":
        return data
    tensor = np.require(data, dtype=np.float32, requirements=["C_CONTIGUOUS", "ALIGNED"])
    lowest, highest = tensor.min(), tensor.max()
    if not (lowest >= 0 and highest <= 1):
        raise TensorRefused(_out_of_range(tensor))
    return tensor


def tensor_to_npy(tensor: np.ndarray) -> bytes:
    """Write an array as the bytes of an .npy file; `npy_to_tensor` gets the very same array back."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, tensor, allow_pickle=False)
    return buffer.getvalue()


def npy_to_tensor(data: bytes) -> np.ndarray:
    """Read an array from the bytes of an .npy file. Raises ValueError for other bytes and for pickled objects."""
    array: np.ndarray = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    return array


def media_type_of(data: bytes) -> str:
    """Return the media type of an image as its first bytes tell it; raises ImageRefused for all but three."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png"
    if data.startswith(b"\xff\xd8\xff"):
        return "image/jpeg"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image/webp"
    found = f"{len(data)} bytes that begin with {data[:12]!r}" if data else "nothing"
    raise ImageRefused(f"A PNG, JPEG or WebP image was expected, but {found} came.")


def _out_of_range(tensor: np.ndarray[Any, np.dtype[np.float32]]) -> str:
    finite = np.isfinite(tensor)
    wrong = ~finite if not finite.all() else (tensor < 0) | (tensor > 1)
    where = np.unravel_index(int(np.argmax(wrong)), tensor.shape)
    first = f"the first is {tensor[where]} at {[int(index) for index in where]}"
    if not finite.all():
        return f"The tensor must be finite, but {np.count_nonzero(wrong)} of its values are not; {first}."
    return f"The tensor must be in [0, 1], but has values from {tensor.min()} to {tensor.max()}; {first}."
