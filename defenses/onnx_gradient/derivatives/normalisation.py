"""Normalisations at inference, and softmax."""

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from defenses.onnx_gradient.step import Derivative, Step
from defenses.onnx_torch.node import Node

EPSILON = 1e-5


def batch(step: Step, place: int) -> str:
    """BatchNormalization by constant statistics: one factor for each channel."""
    scale, variance = step.fixed(1), step.fixed(4)
    assert scale is not None
    assert variance is not None
    factor = scale * (variance + step.node.get("epsilon", EPSILON)).rsqrt()
    shape = (-1, *(1,) * (len(step.shape()) - 2))
    return step.write("Mul", step.gradient, step.constant(factor.reshape(shape).numpy()))


def layer(step: Step, place: int) -> str:
    """LayerNormalization over the axes from ``axis`` on."""
    rank = len(step.shape())
    axes = range(step.node.get("axis", -1) % rank, rank)
    scaled = step.write("Mul", step.gradient, step.input(1))
    return _standardised(step, step.input(), scaled, axes)


def instance(step: Step, place: int) -> str:
    """InstanceNormalization: over the map of each channel."""
    rank = len(step.shape())
    scale = step.fixed(1)
    assert scale is not None
    factor = step.constant(scale.reshape(-1, *(1,) * (rank - 2)).numpy())
    return _standardised(step, step.input(), step.write("Mul", step.gradient, factor), range(2, rank))


def group(step: Step, place: int) -> str:
    """GroupNormalization since opset 21: over the channels of each group and their maps."""
    rank, groups = len(step.shape()), step.node.get("num_groups")
    scale, cells = step.fixed(1), math.prod(step.sizes(range(1, rank)))
    assert scale is not None
    factor = step.constant(scale.reshape(-1, *(1,) * (rank - 2)).numpy())
    flat = step.integers([-1, groups, cells // groups])
    x, scaled = (
        step.write("Reshape", value, flat) for value in (step.input(), step.write("Mul", step.gradient, factor))
    )
    return step.shaped_as(_standardised(step, x, scaled, [2]))


def refuse_groups(node: Node) -> str | None:
    """Refuse a scale for each group instead of each channel."""
    return "its meaning before opset 21 is not supported" if node.opset < 21 else None


def _standardised(step: Step, x: str, gradient: str, axes: Sequence[int]) -> str:
    """Return the gradient by x of (x - mean) / deviation: (g - mean(g) - z mean(g z)) / deviation."""

    def mean(value: str) -> str:
        return step.write("ReduceMean", value, step.integers(axes), keepdims=1)

    centred = step.write("Sub", x, mean(x))
    variance = mean(step.write("Mul", centred, centred))
    deviation = step.write("Sqrt", step.write("Add", variance, step.node.get("epsilon", EPSILON)))
    z = step.write("Div", centred, deviation)
    along = step.write("Mul", z, mean(step.write("Mul", gradient, z)))
    rest = step.write("Sub", step.write("Sub", gradient, mean(gradient)), along)
    return step.write("Div", rest, deviation)


def softmax(step: Step, place: int) -> str:
    """Softmax: y (g - sum(g y))."""
    total = _sum(step, step.write("Mul", step.gradient, step.output))
    return step.write("Mul", step.output, step.write("Sub", step.gradient, total))


def log_softmax(step: Step, place: int) -> str:
    """LogSoftmax: g - exp(y) sum(g)."""
    share = step.write("Mul", step.write("Exp", step.output), _sum(step, step.gradient))
    return step.write("Sub", step.gradient, share)


def _sum(step: Step, value: str) -> str:
    return step.write("ReduceSum", value, step.integers([step.node.get("axis", -1)]), keepdims=1)


DERIVATIVES: Mapping[str, Derivative] = MappingProxyType(
    {
        "BatchNormalization": Derivative(batch),
        "GroupNormalization": Derivative(group, refuse=refuse_groups),
        "InstanceNormalization": Derivative(instance),
        "LayerNormalization": Derivative(layer),
        "LogSoftmax": Derivative(log_softmax),
        "Softmax": Derivative(softmax),
    }
)
