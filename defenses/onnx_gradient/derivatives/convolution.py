"""Convolution by constant weights."""

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from defenses.onnx_gradient.derivatives.windows import Windows
from defenses.onnx_gradient.step import Derivative, Step


def convolution(step: Step, place: int) -> str:
    """Conv: a transposed convolution, with stride 1 written as the convolution by turned weights, which is faster."""
    kernel = step.sizes(range(2, len(step.shape(1))), 1)
    windows = Windows.of(step, kernel)
    group = step.node.get("group", 1)
    pads = [
        [reach - 1 - pad for reach, pad in zip(windows.reach, side, strict=True)]
        for side in (windows.before, windows.after)
    ]
    if set(windows.strides) == {1} and min(*pads[0], *pads[1]) >= 0:
        weight = _turned(step, group, kernel)
        return step.write(
            "Conv", step.gradient, weight, pads=[*pads[0], *pads[1]], dilations=windows.dilations, group=group
        )
    return windows.scatter(step, step.gradient, step.input(1), group)


def _turned(step: Step, group: int, kernel: tuple[int, ...]) -> str:
    """Return weights (I, O / group, ...) of those (O, I / group, ...): channels exchanged, the kernel reversed."""
    weight, (out, each) = step.input(1), step.sizes((0, 1), 1)
    spatial = range(2, 2 + len(kernel))
    if group == 1:
        weight = step.write("Transpose", weight, perm=[1, 0, *spatial])
    elif out > group or each > 1:
        grouped = step.write("Reshape", weight, step.integers([group, out // group, each, *kernel]))
        exchanged = step.write("Transpose", grouped, perm=[0, 2, 1, *(axis + 1 for axis in spatial)])
        weight = step.write("Reshape", exchanged, step.integers([group * each, out // group, *kernel]))
    if set(kernel) == {1}:
        return weight
    last, first = [-1] * len(kernel), [int(np.iinfo(np.int64).min)] * len(kernel)
    return step.write("Slice", weight, *map(step.integers, (last, first, list(spatial), last)))


DERIVATIVES: Mapping[str, Derivative] = MappingProxyType({"Conv": Derivative(convolution)})
