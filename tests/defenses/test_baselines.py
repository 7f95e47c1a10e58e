"""Baselines that purify, each against a form of it that others wrote, and what they refuse to be told."""

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from scipy import ndimage
from sklearn.datasets import load_sample_image

from defenses.baselines import METHODS, BaselineConfig, BaselinePlan, MethodUnknown, OptionForeign, OptionOutOfRange
from defenses.baselines.jpeg import CHROMINANCE, LUMINANCE, quantisation_table
from defenses.baselines.non_local_means import non_local_means
from defenses.baselines.smoothing import median_filter
from defenses.baselines.total_variation import total_variation
from defenses.detector import NoDetector

ON, OFF = torch.ones(()), torch.zeros(())
PURIFIERS = [name for name, method in METHODS.items() if not method.detects]


def photographs(height: int = 32, width: int = 32, mode: str = "RGB") -> list[Image.Image]:
    """Eight pieces of a photograph."""
    whole = Image.fromarray(load_sample_image("flower.jpg")).convert(mode)
    return [whole.crop((60 * n, 45 * n, 60 * n + width, 45 * n + height)) for n in range(8)]


def tensor(pictures: list[Image.Image]) -> torch.Tensor:
    pixels = np.stack([np.array(picture) for picture in pictures])
    return torch.from_numpy(pixels.reshape(*pixels.shape[:3], -1)).permute(0, 3, 1, 2).float() / 255


def purified(method: str, x: torch.Tensor, scale: torch.Tensor = ON, **options) -> torch.Tensor:
    purifier, detector = BaselineConfig.from_json(
        {"method": method, "options": options, "image_shape": list(x.shape[1:]), "watched": []}
    ).parts()
    assert isinstance(detector, NoDetector)
    with torch.no_grad():
        return purifier(x, scale)


@pytest.mark.parametrize("method", PURIFIERS)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_purifier_gives_images_of_the_same_shape_in_the_range(method, channels):
    x = torch.rand(3, channels, 13, 18)
    found = purified(method, x)
    assert found.shape == x.shape
    assert found.dtype == torch.float32
    assert 0 <= found.min() <= found.max() <= 1
    assert torch.equal(found, x) == (method == "none")


@pytest.mark.parametrize("kernel", [3, 5])
def test_an_odd_median_is_pillows(kernel):
    pictures = photographs()
    expected = tensor([picture.filter(ImageFilter.MedianFilter(kernel)) for picture in pictures])
    torch.testing.assert_close(purified("smoothing", tensor(pictures), kernel=kernel), expected, rtol=0, atol=0)


def test_an_even_median_is_scipys():
    x = torch.rand(2, 3, 9, 7)
    expected = [[ndimage.median_filter(channel.numpy(), 2) for channel in image] for image in x]
    np.testing.assert_array_equal(median_filter(x, 2).numpy(), np.array(expected))


@pytest.mark.parametrize("bits", [1, 4, 7])
def test_fewer_bits_are_the_nearest_of_so_many_levels(bits):
    x = torch.arange(256).float().reshape(1, 1, 16, 16) / 255
    levels = np.linspace(0, 1, 2**bits)
    nearest = levels[np.abs(x.numpy()[..., None] - levels).argmin(-1)]
    found = purified("bit-depth", x, bits=bits)
    np.testing.assert_allclose(found.numpy(), nearest, atol=1e-6)
    assert len(found.unique()) == 2**bits


@pytest.mark.parametrize("quality", [1, 10, 49, 50, 75, 95, 100])
def test_quantisation_tables_are_those_that_pillow_writes(quality):
    buffer = io.BytesIO()
    photographs()[0].save(buffer, "JPEG", quality=quality)
    written = Image.open(buffer).quantization
    for place, table in enumerate((LUMINANCE, CHROMINANCE)):
        assert quantisation_table(table, quality).flatten().int().tolist() == list(written[place])


@pytest.mark.parametrize(
    ("quality", "subsampling", "mode", "size", "mean", "near"),
    [
        (75, "4:4:4", "RGB", (32, 32), 0.4, 0.95),
        (75, "4:2:0", "RGB", (32, 32), 1.0, 0.9),
        (75, "4:2:0", "RGB", (29, 27), 1.0, 0.9),
        (25, "4:4:4", "RGB", (29, 27), 0.4, 0.95),
        (75, "4:2:0", "L", (20, 37), 0.2, 0.98),
    ],
)
def test_jpeg_is_pillows_but_for_its_integer_arithmetic(quality, subsampling, mode, size, mean, near):
    # In levels of 255: libjpeg computes transform and colours in integers, so that a coefficient may round elsewhere.
    pictures = photographs(*size, mode)
    expected = []
    for picture in pictures:
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=quality, subsampling={"4:4:4": 0, "4:2:0": 2}[subsampling])
        expected.append(Image.open(buffer))
    found = purified("jpeg", tensor(pictures), quality=quality, subsampling=subsampling)
    apart = (255 * (found - tensor(expected))).abs()
    changed = (255 * (tensor(pictures) - tensor(expected))).abs()
    assert apart.mean() < mean
    assert (apart < 2.5).float().mean() > near
    assert apart.mean() < changed.mean() / 3


def test_jpeg_rounds_halves_alike_whatever_their_last_bits_are():
    # A block of one grey has a frequency 0 that lies half-way between two multiples of its quantum.
    x = torch.full((1, 1, 8, 8), 129 / 255)
    found = purified("jpeg", x, quality=50)
    assert torch.equal(found, torch.full_like(x, 130 / 255))
    for nudged in (x - 1e-6, x + 1e-6):
        assert torch.equal(purified("jpeg", nudged, quality=50), found)


def test_total_variation_falls_towards_the_least_of_its_objective():
    x, weight = tensor(photographs()), 0.1

    def objective(u):
        return ((u - x).square().flatten(1).sum(1) / 2 + weight * total_variation(u)).mean().item()

    values = [objective(purified("total-variation", x, weight=weight, steps=steps)) for steps in (1, 5, 20, 80)]
    assert objective(x) > values[0] > values[1] > values[2] > values[3]
    assert values[3] > 0.95 * values[2]


def test_total_variation_lowers_a_step_by_what_the_closed_form_says():
    # Of a step between halves of n columns each moves towards the other by weight / n.
    x = torch.full((1, 1, 6, 8), 0.2)
    x[..., 4:] = 0.8
    expected = torch.full_like(x, 0.2 + 0.1 / 4)
    expected[..., 4:] = 0.8 - 0.1 / 4
    torch.testing.assert_close(purified("total-variation", x, weight=0.1, steps=200), expected, rtol=0, atol=2e-3)


def test_total_variation_has_a_gradient_even_on_a_flat_image():
    config = BaselinePlan("total-variation", {"steps": 5}).options
    purifier, _ = BaselineConfig("total-variation", config, (1, 6, 6)).parts()
    x = torch.full((1, 1, 6, 6), 0.5, requires_grad=True)
    purifier(x, ON).square().sum().backward()
    assert torch.isfinite(x.grad).all()
    assert x.grad.abs().max() > 0


def test_noise_is_fresh_for_each_image_and_obeys_its_scale():
    torch.manual_seed(0)
    x = torch.full((2, 3, 64, 64), 0.5)
    first, second = (purified("noise", x, sigma=0.1) for _ in range(2))
    assert (first - x).std().item() == pytest.approx(0.1, rel=0.05)
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, second)
    assert torch.equal(purified("noise", x, OFF, sigma=0.1), x)
    assert (purified("noise", x, torch.tensor(0.5), sigma=0.1) - x).std().item() == pytest.approx(0.05, rel=0.05)


def test_non_local_means_are_the_weighted_means_of_their_definition():
    x, strength = torch.rand(1, 2, 6, 5), 0.3
    padded = np.pad(x[0].numpy().astype(float), ((0, 0), (2, 2), (2, 2)), mode="edge")
    shifted = [(padded[:, a : a + 6, b : b + 5]) for a in range(5) for b in range(5)]
    total, mean = 0.0, 0.0
    for each in shifted:
        squared = np.pad(((each - x[0].numpy()) ** 2).mean(0), 1, mode="edge")
        patches = sum(squared[a : a + 6, b : b + 5] for a in range(3) for b in range(3)) / 9
        weight = np.exp(-patches / strength**2)
        total, mean = total + weight, mean + weight * each
    np.testing.assert_allclose(non_local_means(x, 5, 3, strength)[0].numpy(), mean / total, atol=1e-5)


def test_only_what_rounds_is_of_no_use_to_a_gradient():
    x = torch.rand(1, 3, 8, 8)
    for method in PURIFIERS:
        purifier, _ = BaselineConfig(method, BaselinePlan(method).options, (3, 8, 8)).parts()
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(purifier(leaf, ON).sum(), leaf)
        assert purifier.differentiable == bool(gradient.any()), method
    rounding = {
        name
        for name in PURIFIERS
        if not BaselineConfig(name, BaselinePlan(name).options, (3, 8, 8)).parts()[0].differentiable
    }
    assert rounding == {"bit-depth", "jpeg"}


def test_a_plan_completes_what_is_not_given():
    plan = BaselinePlan.chosen("jpeg", {"quality": 30, "bits": None})
    assert plan.options == {"quality": 30, "subsampling": "4:2:0"}
    assert BaselinePlan.chosen("lid", {"attacks": ("fgsm",), "neighbors": 5}).attacks == ("fgsm",)


@pytest.mark.parametrize(
    ("method", "given", "error", "sentence"),
    [
        ("blur", {}, MethodUnknown, "Expected a method among none, smoothing, .*, got 'blur'"),
        ("smoothing", {"quality": 75}, OptionForeign, "smoothing no other options than kernel, got quality"),
        ("none", {"sigma": 0.1}, OptionForeign, "Expected no options of none, got sigma"),
        ("jpeg", {"budget": 0.05}, OptionForeign, "jpeg no other options than quality, subsampling, got budget"),
        ("magnet", {"attacks": ("fgsm",)}, OptionForeign, "epochs, sigma, budget, got attacks"),
        ("jpeg", {"quality": 0}, OptionOutOfRange, "quality to be a whole number from 1 to 100, got 0"),
        ("jpeg", {"subsampling": "4:2:2"}, OptionOutOfRange, "subsampling to be 4:2:0 or 4:4:4, got '4:2:2'"),
        ("bit-depth", {"bits": 8}, OptionOutOfRange, "bits to be a whole number from 1 to 7, got 8"),
        ("noise", {"sigma": float("nan")}, OptionOutOfRange, "sigma to be a number above 0 and at most 1, got nan"),
        ("feature-squeezing", {"search": 10}, OptionOutOfRange, "search to be an odd number from 3 to 21, got 10"),
        ("lid", {"neighbors": 30, "references": 20}, ValueError, "no more neighbors than references, got 30 of 20"),
        ("lid", {"attacks": ()}, ValueError, "Expected an attack to fit to, got none"),
        ("lid", {"examples": 0}, ValueError, "Expected examples of 1 or more, got 0"),
    ],
)
def test_what_a_method_cannot_be_told_is_refused_with_what_was_expected(method, given, error, sentence):
    with pytest.raises(error, match=sentence):
        BaselinePlan.chosen(method, given)
