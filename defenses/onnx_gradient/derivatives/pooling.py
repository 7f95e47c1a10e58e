"""Pooling over windows and over whole maps."""

import itertools
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
import torch

from defenses.onnx_gradient.derivatives.windows import Windows
from defenses.onnx_gradient.step import Derivative, Step
from defenses.onnx_torch.graph import call
from defenses.onnx_torch.node import Node


def pool_max(step: Step, place: int) -> str:
    """MaxPool: the gradient goes to the window's first maximum in the order of rows, as in torch.

    The cells of every window lie side by side, one strided slice for each place in it; the largest is found by ArgMax,
    and a transposed convolution by ones puts the gradients back and adds up those of windows that overlap.
    """
    windows = Windows.of(step, step.node.get("kernel_shape"))
    places = list(itertools.product(*(range(extent) for extent in windows.kernel)))
    spatial = [1] * len(windows.kernel)
    cells = step.write("Concat", *_cells(step, windows, places), axis=1)
    largest = step.write("ArgMax", cells, axis=1, keepdims=1)
    order = step.writer.constant(np.arange(len(places)).reshape(1, -1, *spatial))
    gradient = step.write("Reshape", step.gradient, step.integers([-1, 1, *windows.count]))
    chosen = step.write("Mul", gradient, step.mask("Equal", largest, order))
    weight = step.constant(np.eye(len(places)).reshape(-1, 1, *windows.kernel))
    return step.shaped_as(windows.scatter(step, chosen, weight))


def _cells(step: Step, windows: Windows, places: Sequence[tuple[int, ...]]) -> list[str]:
    """Return for each place in a window what lies there in every window, (N C, 1, ...)."""
    x = step.write("Reshape", step.input(), step.integers([-1, 1, *windows.size]))
    if any((*windows.before, *windows.after)):
        pads = [0, 0, *windows.before, 0, 0, *windows.after]
        x = step.write("Pad", x, step.integers(pads), -math.inf)
    axes, strides = step.integers(range(2, 2 + len(windows.kernel))), step.integers(windows.strides)
    cells = []
    for offsets in places:
        starts = [offset * dilation for offset, dilation in zip(offsets, windows.dilations, strict=True)]
        ends = [
            start + (count - 1) * stride + 1
            for start, count, stride in zip(starts, windows.count, windows.strides, strict=True)
        ]
        cells.append(step.write("Slice", x, step.integers(starts), step.integers(ends), axes, strides))
    return cells


def refuse_indices(node: Node) -> str | None:
    """Refuse a MaxPool that counts its columns first."""
    return "its storage order by columns is not supported" if node.get("storage_order", 0) else None


def pool_average(step: Step, place: int) -> str:
    """AveragePool: each window's gradient, divided by what the window counts, goes to all that it covers."""
    windows = Windows.of(step, step.node.get("kernel_shape"))
    (means,) = call(step.node, [torch.ones(1, 1, *windows.size)])
    shares = means.numpy() / _covered(windows)
    gradient = step.write("Reshape", step.gradient, step.integers([-1, 1, *windows.count]))
    weight = step.constant(np.ones((1, 1, *windows.kernel)))
    return step.shaped_as(windows.scatter(step, step.write("Mul", gradient, step.constant(shares)), weight))


def _covered(windows: Windows) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    """Return how many cells of the input each window covers."""
    counts = np.ones((), np.int64)
    for axis, number in enumerate(windows.count):
        starts = np.arange(number) * windows.strides[axis] - windows.before[axis]
        cells = starts[:, None] + np.arange(windows.kernel[axis]) * windows.dilations[axis]
        inside = ((cells >= 0) & (cells < windows.size[axis])).sum(1)
        counts = np.multiply.outer(counts, inside)
    return counts


def pool_average_whole(step: Step, place: int) -> str:
    """GlobalAveragePool."""
    cells = math.prod(step.sizes(range(2, len(step.shape()))))
    return step.expanded(step.write("Mul", step.gradient, 1 / cells))


DERIVATIVES: Mapping[str, Derivative] = MappingProxyType(
    {
        "AveragePool": Derivative(pool_average),
        "GlobalAveragePool": Derivative(pool_average_whole),
        "MaxPool": Derivative(pool_max, refuse=refuse_indices),
    }
)
