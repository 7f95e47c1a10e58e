"""Pixels and floats that mean the same image are the same image, alone and in one batch."""

import numpy as np
import pytest

from service.pixels import as_batch, as_float

PIXELS = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 5), np.uint8)


def test_full_and_no_light_are_exactly_one_and_zero() -> None:
    scaled = as_float(np.array([0, 255], np.uint8))
    assert scaled.dtype == np.float32
    np.testing.assert_array_equal(scaled, np.array([0, 1], np.float32))


def test_floats_are_not_copied_and_pixels_come_out_in_one_piece() -> None:
    images = as_float(PIXELS)
    assert as_float(images) is images
    assert as_float(PIXELS.transpose(0, 1, 3, 2)).flags.c_contiguous


@pytest.mark.parametrize("images", [[PIXELS], [as_float(PIXELS)]])
def test_one_request_is_its_own_batch(images: list[np.ndarray]) -> None:
    assert as_batch(images) is images[0]


def test_pixels_stay_pixels_and_meet_floats_as_floats() -> None:
    together = as_batch([PIXELS, PIXELS[:1]])
    assert together.dtype == np.uint8
    np.testing.assert_array_equal(together, np.concatenate([PIXELS, PIXELS[:1]]))
    mixed = as_batch([PIXELS, as_float(PIXELS[:1]), PIXELS])
    assert mixed.dtype == np.float32
    np.testing.assert_array_equal(mixed, as_float(np.concatenate([PIXELS, PIXELS[:1], PIXELS])))
