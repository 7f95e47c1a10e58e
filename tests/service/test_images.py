"""Images and tensors as clients send them, real files made by Pillow."""

import io
import struct
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, ImageFile

from model_store import InputSpec
from service.images import (
    ImageRefused,
    TensorRefused,
    decode_pixels,
    npy_to_tensor,
    render_pixels,
    tensor_to_npy,
    validate_tensor,
)

WIDTH, HEIGHT = 12, 8
RGB = InputSpec(shape=(3, HEIGHT, WIDTH), mode="RGB")
GREY = InputSpec(shape=(1, HEIGHT, WIDTH), mode="L")
LIMIT = 1_000_000


def noise(*shape: int, high: int = 256, dtype: type = np.uint8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, high, shape).astype(dtype)


def saved(image: Image.Image, name: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, name, **options)
    return buffer.getvalue()


def pixels_of(data: bytes, spec: InputSpec = RGB) -> np.ndarray:
    return decode_pixels(data, spec, max_pixels=LIMIT)


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


@pytest.mark.parametrize(("name", "options"), [("PNG", {}), ("WEBP", {"lossless": True})])
def test_a_lossless_image_is_decoded_exactly(name: str, options: dict[str, object]) -> None:
    array = noise(HEIGHT, WIDTH, 3)
    image = pixels_of(saved(Image.fromarray(array), name, **options))
    assert image.shape == (3, HEIGHT, WIDTH)
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, array.transpose(2, 0, 1))


@pytest.mark.parametrize("options", [{"quality": 95}, {"quality": 95, "progressive": True}])
def test_a_jpeg_is_decoded(options: dict[str, object]) -> None:
    gradient = np.linspace(0, 255, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).astype(np.uint8)
    image = pixels_of(saved(Image.fromarray(gradient), "JPEG", **options))
    assert np.abs(image.astype(int) - gradient).max() < 8


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"", "nothing came"),
        (b"hello", "5 bytes that begin with b'hello' came"),
        (saved(Image.new("RGB", (WIDTH, HEIGHT)), "BMP"), "begin with b'BM"),
        (saved(Image.new("RGB", (WIDTH, HEIGHT)), "GIF"), "begin with b'GIF8"),
        (saved(Image.new("RGB", (WIDTH, HEIGHT)), "TIFF"), "begin with b'II"),
        (b"<svg></svg>", "begin with b'<svg"),
    ],
    ids=["nothing", "text", "bmp", "gif", "tiff", "svg"],
)
def test_other_content_is_refused(data: bytes, found: str) -> None:
    with pytest.raises(ImageRefused, match=f"A PNG, JPEG or WebP image was expected, but .*{found}"):
        pixels_of(data)


@pytest.mark.parametrize("name", ["PNG", "JPEG", "WEBP"])
def test_a_truncated_image_is_refused_at_every_length_that_lacks_pixels(name: str) -> None:
    data = saved(Image.fromarray(noise(HEIGHT, WIDTH, 3)), name)
    # A PNG ends with two checksums and an empty chunk, 20 bytes without any pixel.
    for length in range(len(data) - (20 if name == "PNG" else 1)):
        with pytest.raises(ImageRefused, match=r"damaged or truncated|was expected"):
            pixels_of(data[:length])


def test_damage_raises_nothing_but_refusals() -> None:
    generator = np.random.default_rng(3)
    picture = Image.fromarray(noise(HEIGHT, WIDTH, 3))
    exif = Image.Exif()
    exif[0x0112] = 6
    originals = [
        saved(picture, "PNG", exif=exif),
        saved(picture.convert("P"), "PNG", transparency=3),
        saved(picture, "JPEG", exif=exif),
        saved(picture, "WEBP", exif=exif),
    ]
    refused = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of damaged EXIF.
        for turn in range(2000):
            data = bytearray(originals[turn % len(originals)])
            for _ in range(generator.integers(1, 5)):
                data[generator.integers(len(data))] = generator.integers(256)
            try:
                pixels_of(bytes(data), RGB.model_copy(update={"resize": "bilinear"}))
            except ImageRefused:
                refused += 1
    assert 100 < refused < 2000


@pytest.mark.parametrize("name", ["PNG", "JPEG", "WEBP"])
def test_a_decompression_bomb_is_refused_before_it_is_decoded(name: str) -> None:
    side = 10_000 if name == "PNG" else 4_000
    bomb = saved(Image.new("L", (side, side)), name, **({"method": 0, "quality": 1} if name == "WEBP" else {}))
    started = time.process_time()
    with pytest.raises(ImageRefused, match=f"at most 1000000 pixels, but the .* has {side} x {side}"):
        pixels_of(bomb)
    assert time.process_time() - started < 0.1


def test_a_bomb_that_no_memory_could_hold_is_refused_by_its_header() -> None:
    header = struct.pack(">IIBBBBB", 2**31 - 1, 2**31 - 1, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", b"") + png_chunk(b"IEND", b"")
    with pytest.raises(ImageRefused, match="2147483647 x 2147483647"):
        pixels_of(bomb)


def test_decoding_changes_none_of_pillows_settings() -> None:
    before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
    pixels_of(saved(Image.fromarray(noise(HEIGHT, WIDTH, 3))))
    assert before == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)


@pytest.mark.parametrize("name", ["PNG", "WEBP"])
def test_an_animation_is_refused(name: str) -> None:
    frames = [Image.new("RGB", (WIDTH, HEIGHT), colour) for colour in ("red", "blue")]
    with pytest.raises(ImageRefused, match=r"A single image was expected, but the .* is an animation"):
        pixels_of(saved(frames[0], name, save_all=True, append_images=frames[1:]))


def test_a_jpeg_with_further_pictures_counts_as_its_first() -> None:
    first, second = (Image.new("RGB", (WIDTH, HEIGHT), colour) for colour in ("red", "blue"))
    data = saved(first, "MPO", save_all=True, append_images=[second])
    np.testing.assert_array_equal(pixels_of(data), pixels_of(saved(first, "JPEG")))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_an_opaque_alpha_channel_is_dropped(mode: str) -> None:
    image = Image.fromarray(noise(HEIGHT, WIDTH, 3)).convert(mode)
    np.testing.assert_array_equal(pixels_of(saved(image)), pixels_of(saved(image.convert("RGB"))))


def transparent_images() -> list[Image.Image]:
    colour = Image.fromarray(noise(HEIGHT, WIDTH, 3))
    veiled = colour.convert("RGBA")
    veiled.putpixel((3, 2), (1, 2, 3, 254))
    palette = colour.convert("P")
    palette.info["transparency"] = palette.getpixel((0, 0))
    keyed = colour.copy()
    keyed.info["transparency"] = keyed.getpixel((0, 0))
    deep = Image.fromarray(noise(HEIGHT, WIDTH, high=2**16, dtype=np.uint16))
    deep.info["transparency"] = deep.getpixel((0, 0))
    return [veiled, veiled.convert("LA"), palette, keyed, deep]


@pytest.mark.parametrize("image", transparent_images(), ids=lambda image: image.mode)
def test_transparency_is_refused(image: Image.Image) -> None:
    with pytest.raises(ImageRefused, match="An opaque image was expected"):
        pixels_of(saved(image, transparency=image.info.get("transparency")))


def test_a_palette_is_resolved() -> None:
    image = Image.fromarray(noise(HEIGHT, WIDTH, 3)).quantize(16)
    expected = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
    np.testing.assert_array_equal(pixels_of(saved(image)), expected)


def test_sixteen_bit_grey_keeps_its_upper_eight_bits() -> None:
    deep = noise(HEIGHT, WIDTH, high=2**16, dtype=np.uint16)
    assert deep.max() > 255
    np.testing.assert_array_equal(pixels_of(saved(Image.fromarray(deep)), GREY), (deep >> 8)[np.newaxis])


def test_a_bitmap_becomes_black_and_white() -> None:
    bitmap = noise(HEIGHT, WIDTH, high=2, dtype=bool)
    np.testing.assert_array_equal(pixels_of(saved(Image.fromarray(bitmap)), GREY)[0], bitmap * 255)


def test_cmyk_becomes_rgb() -> None:
    image = Image.new("CMYK", (WIDTH, HEIGHT), (255, 0, 0, 0))
    channels = pixels_of(saved(image, "JPEG")).mean(axis=(1, 2))
    assert channels[0] < 5
    assert channels[1:].min() > 250


def test_colour_becomes_grey_by_luma_and_grey_fills_every_channel() -> None:
    green = pixels_of(saved(Image.new("RGB", (WIDTH, HEIGHT), (0, 255, 0))), GREY)
    assert green.shape == (1, HEIGHT, WIDTH)
    assert set(green.ravel()) == {150}
    grey = noise(HEIGHT, WIDTH)
    np.testing.assert_array_equal(pixels_of(saved(Image.fromarray(grey))), np.stack([grey] * 3))


@pytest.mark.parametrize("name", ["PNG", "JPEG", "WEBP"])
def test_exif_orientation_is_applied(name: str) -> None:
    upright = Image.new("L", (WIDTH, HEIGHT))
    upright.paste(255, (0, 0, WIDTH, HEIGHT // 2))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter to the right
    lying = upright.rotate(90, expand=True)
    image = pixels_of(saved(lying, name, exif=exif, quality=100), GREY)[0]
    assert image[: HEIGHT // 2].min() > 240
    assert image[HEIGHT // 2 :].max() < 15


def test_another_size_is_refused_without_a_filter() -> None:
    with pytest.raises(ImageRefused, match="must be 12 pixels wide and 8 high, but is 8 wide and 12 high"):
        pixels_of(saved(Image.new("RGB", (HEIGHT, WIDTH))))


@pytest.mark.parametrize("resize", ["bilinear", "bicubic"])
def test_resizing_is_antialiased(resize: str) -> None:
    checkers = (np.indices((HEIGHT * 8, WIDTH * 8)).sum(axis=0) % 2 * 255).astype(np.uint8)
    small = pixels_of(saved(Image.fromarray(checkers)), GREY.model_copy(update={"resize": resize}))
    assert small.shape == (1, HEIGHT, WIDTH)
    assert small.min() >= 120
    assert small.max() <= 136


def test_an_image_of_the_right_size_is_not_resampled() -> None:
    array = noise(HEIGHT, WIDTH, 3)
    spec = RGB.model_copy(update={"resize": "bicubic"})
    np.testing.assert_array_equal(pixels_of(saved(Image.fromarray(array)), spec), array.transpose(2, 0, 1))


def test_threads_decode_the_same_pixels() -> None:
    files = [
        saved(Image.fromarray(np.roll(noise(HEIGHT, WIDTH, 3), shift, axis=0)), name)
        for shift in range(8)
        for name in ("PNG", "JPEG", "WEBP")
    ]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(pixels_of, files * 10))
    for image, data in zip(together, files * 10, strict=True):
        np.testing.assert_array_equal(image, pixels_of(data))


def test_rendering_leaves_the_image_it_is_given() -> None:
    image = Image.fromarray(noise(HEIGHT * 2, WIDTH, 4), "RGBA")
    image.putalpha(255)
    before = image.tobytes()
    render_pixels(image, RGB.model_copy(update={"resize": "bilinear"}))
    assert (image.mode, image.size, image.tobytes()) == ("RGBA", (WIDTH, HEIGHT * 2), before)


def batch(count: int = 2) -> np.ndarray:
    return np.random.default_rng(1).random((count, 3, HEIGHT, WIDTH), dtype=np.float32)


def test_a_valid_fp32_batch_is_returned_without_a_copy() -> None:
    images = batch()
    images.flags.writeable = False
    assert validate_tensor(images, "FP32", RGB, max_batch=2) is images


def test_a_view_at_an_odd_offset_is_aligned() -> None:
    images = batch()
    odd = np.frombuffer(b"\0" + images.tobytes(), dtype=np.float32, offset=1).reshape(images.shape)
    assert not odd.flags.aligned
    checked = validate_tensor(odd, "FP32", RGB, max_batch=2)
    assert checked.flags.aligned
    np.testing.assert_array_equal(checked, images)


def test_a_uint8_batch_stays_what_decoded_images_are() -> None:
    array = noise(2, 3, HEIGHT, WIDTH)
    files = [saved(Image.fromarray(image.transpose(1, 2, 0))) for image in array]
    checked = validate_tensor(array, "UINT8", RGB, max_batch=2)
    assert checked is array
    np.testing.assert_array_equal(checked, np.stack([pixels_of(data) for data in files]))


@pytest.mark.parametrize("datatype", ["FP64", "FP16", "INT8", "BOOL"])
def test_another_datatype_is_refused(datatype: str) -> None:
    with pytest.raises(TensorRefused, match=f"must be FP32 or UINT8, not {datatype}"):
        validate_tensor(batch(), datatype, RGB, max_batch=2)


@pytest.mark.parametrize(
    "shape", [(3, HEIGHT, WIDTH), (2, 1, HEIGHT, WIDTH), (2, 3, WIDTH, HEIGHT), (2, HEIGHT, WIDTH, 3), ()]
)
def test_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(TensorRefused) as caught:
        validate_tensor(np.zeros(shape, dtype=np.float32), "FP32", RGB, max_batch=2)
    assert str(caught.value) == f"The tensor must have the shape (N, 3, 8, 12), not {shape}."


@pytest.mark.parametrize("count", [0, 3])
@pytest.mark.parametrize("datatype", ["FP32", "UINT8"])
def test_a_batch_of_none_or_too_many_is_refused(count: int, datatype: str) -> None:
    with pytest.raises(TensorRefused, match=f"must hold 1 to 2 images, not {count}"):
        validate_tensor(
            batch(count).astype(np.uint8 if datatype == "UINT8" else np.float32), datatype, RGB, max_batch=2
        )


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_refused(value: float) -> None:
    images = batch()
    images[0, 0, 0, 1] = 7
    images[1, 2, 3, 4] = images[1, 2, 3, 5] = value
    with pytest.raises(TensorRefused) as caught:
        validate_tensor(images, "FP32", RGB, max_batch=2)
    assert str(caught.value) == (
        f"The tensor must be finite, but 2 of its values are not; the first is {value} at [1, 2, 3, 4]."
    )


@pytest.mark.parametrize("value", [-1e-7, 1.0000001, 255.0])
def test_values_outside_the_range_are_refused_with_where_and_how_far(value: float) -> None:
    images = np.full((1, 3, HEIGHT, WIDTH), 0.5, dtype=np.float32)
    images[0, 1, 2, 3] = value
    extremes = sorted([0.5, np.float32(value)])
    with pytest.raises(TensorRefused) as caught:
        validate_tensor(images, "FP32", RGB, max_batch=1)
    assert str(caught.value) == (
        f"The tensor must be in [0, 1], but has values from {extremes[0]} to {extremes[1]}; "
        f"the first is {np.float32(value)} at [0, 1, 2, 3]."
    )


def test_the_ends_of_the_range_are_in_it() -> None:
    images = batch()
    images[0, 0, 0, 0], images[1, 2, 7, 11] = 0, 1
    assert validate_tensor(images, "FP32", RGB, max_batch=2) is images


@pytest.mark.parametrize("dtype", [np.float32, np.uint8])
def test_a_tensor_comes_back_from_npy_bit_by_bit(dtype: type) -> None:
    row = (batch()[0] * (1 if dtype == np.float32 else 255)).astype(dtype)
    data = tensor_to_npy(row)
    back = npy_to_tensor(data)
    assert back.dtype == row.dtype
    np.testing.assert_array_equal(back, row)
    np.testing.assert_array_equal(np.load(io.BytesIO(data)), row)


@pytest.mark.parametrize("data", [b"", b"not an array", tensor_to_npy(batch())[:-1]])
def test_bytes_that_are_no_npy_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r".+"):
        npy_to_tensor(data)


def test_pickled_objects_are_refused_in_npy() -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle=False"):
        npy_to_tensor(buffer.getvalue())
