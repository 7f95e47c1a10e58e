"""Resize and its predecessor Upsample: interpolation axis by axis, exactly as the graph asks for it."""

import math
from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from defenses.onnx_torch.node import Node, Operator, integers


def upsample(node: Node, x: Tensor, scales: Tensor | None = None) -> Tensor:
    """Upsample (opset 7 to 9), and Resize as of opset 10."""
    factors = [float(value) for value in (scales.tolist() if scales is not None else node.get("scales"))]
    for axis, factor in enumerate(factors):
        nearest = "floor" if factor >= 1 else "ceil"  # as ONNX Runtime has it: the text of opset 10 leaves it open
        x = _interpolate(node, x, axis, math.floor(x.shape[axis] * factor), factor, "asymmetric", nearest)
    return x


def resize(
    node: Node, x: Tensor, roi: Tensor | None = None, scales: Tensor | None = None, sizes: Tensor | None = None
) -> Tensor:
    """Resize to sizes or by scales, in every coordinate mode but ``tf_crop_and_resize``."""
    if node.opset < 11:
        return upsample(node, x, roi)
    coordinates = node.get("coordinate_transformation_mode", "half_pixel")
    axes = [axis % x.ndim for axis in node.get("axes", range(x.ndim))]
    wanted = integers(sizes)
    factors = [float(value) for value in scales.tolist()] if scales is not None and not wanted else None
    for place, axis in enumerate(axes):
        before = x.shape[axis]
        after = wanted[place] if factors is None else math.floor(before * factors[place])
        factor = after / before if factors is None else factors[place]
        x = _interpolate(node, x, axis, after, factor, coordinates, node.get("nearest_mode", "round_prefer_floor"))
    return x


def refuse_resize(node: Node) -> str | None:
    """Refuse crops, antialiasing and sizes that keep the aspect ratio."""
    if node.get("coordinate_transformation_mode") == "tf_crop_and_resize":
        return "its coordinate mode tf_crop_and_resize is not supported"
    if node.get("antialias", 0):
        return "antialiasing is not supported"
    if node.get("exclude_outside", 0):
        return "exclude_outside is not supported"
    if node.get("keep_aspect_ratio_policy", "stretch") != "stretch":
        return "its keep_aspect_ratio_policy is not supported"
    return None


def _interpolate(node: Node, x: Tensor, axis: int, after: int, factor: float, coordinates: str, nearest: str) -> Tensor:
    before = x.shape[axis]
    if before == after and factor == 1.0:
        return x
    source = _source(torch.arange(after, dtype=torch.float64), before, after, factor, coordinates)
    match node.get("mode", "nearest"):
        case "nearest":
            taps = [(_nearest(source, nearest), torch.ones_like(source))]
        case "linear":
            floor = source.floor()
            taps = [(floor, 1 - (source - floor)), (floor + 1, source - floor)]
        case _:
            floor = source.floor()
            weights = _cubic_weights(source - floor, node.get("cubic_coeff_a", -0.75))
            taps = [(floor + place - 1, weight) for place, weight in enumerate(weights)]
    shape = [1] * x.ndim
    shape[axis] = after
    parts = [
        x.index_select(axis, index.clamp(0, before - 1).long().to(x.device)) * weight.to(x).reshape(shape)
        for index, weight in taps
    ]
    return sum(parts[1:], parts[0])


def _source(target: Tensor, before: int, after: int, factor: float, coordinates: str) -> Tensor:
    match coordinates:
        case "align_corners":
            return target * ((before - 1) / (after - 1)) if after > 1 else torch.zeros_like(target)
        case "asymmetric":
            return target / factor
        case "pytorch_half_pixel":
            return (target + 0.5) / factor - 0.5 if after > 1 else torch.zeros_like(target)
        case "half_pixel_symmetric":
            offset = before / 2 * (1 - after / (factor * before))
            return offset + (target + 0.5) / factor - 0.5
    return (target + 0.5) / factor - 0.5


def _nearest(source: Tensor, mode: str) -> Tensor:
    match mode:
        case "floor":
            return source.floor()
        case "ceil":
            return source.ceil()
        case "round_prefer_ceil":
            return (source + 0.5).floor()
    return (source - 0.5).ceil()


def _cubic_weights(t: Tensor, a: float) -> list[Tensor]:
    """Return the weights of the four neighbours at distances 1 + t, t, 1 - t, 2 - t (Keys 1981)."""

    def near(s: Tensor) -> Tensor:
        return ((a + 2) * s - (a + 3)) * s * s + 1

    def far(s: Tensor) -> Tensor:
        return ((a * s - 5 * a) * s + 8 * a) * s - 4 * a

    return [far(1 + t), near(t), near(1 - t), far(2 - t)]


OPERATORS: Mapping[str, Operator] = MappingProxyType(
    {
        "Resize": Operator(resize, host=(1, 2, 3), refuse=refuse_resize, since=10),
        "Upsample": Operator(upsample, host=(1,), since=7),
    }
)
