"""Reductions along axes."""

import math
from collections.abc import Mapping
from types import MappingProxyType

from defenses.onnx_gradient.step import Derivative, Step
from defenses.onnx_torch.node import axes_of


def total(step: Step, place: int) -> str:
    """ReduceSum."""
    axes = _axes(step)
    return step.expanded(_kept(step, step.gradient, axes))


def average(step: Step, place: int) -> str:
    """ReduceMean."""
    axes = _axes(step)
    scaled = step.write("Mul", step.gradient, 1 / math.prod(step.sizes(axes)))
    return step.expanded(_kept(step, scaled, axes))


def norm(step: Step, place: int) -> str:
    """ReduceL2."""
    axes = _axes(step)
    scaled = step.write("Div", step.gradient, step.output)
    return step.write("Mul", step.input(), _kept(step, scaled, axes))


def extreme(step: Step, place: int) -> str:
    """ReduceMax and ReduceMin: equal ones share the gradient, as in torch."""
    axes = _axes(step)
    return _shared(step, axes, _kept(step, step.output, axes), _kept(step, step.gradient, axes))


def pool_max_whole(step: Step, place: int) -> str:
    """GlobalMaxPool: equal ones share the gradient."""
    axes = list(range(2, len(step.shape())))
    return _shared(step, axes, step.output, step.gradient)


def _shared(step: Step, axes: list[int], output: str, gradient: str) -> str:
    """Return a gradient shared by all elements that equal the output along axes."""
    equal = step.mask("Equal", step.input(), output)
    count = step.write("ReduceSum", equal, step.integers(axes), keepdims=1)
    return step.write("Mul", equal, step.write("Div", gradient, count))


def _axes(step: Step) -> list[int]:
    """Return the axes that are reduced, from 0 up; refuse the batch's."""
    rank = len(step.shape())
    axes = axes_of(step.node, step.fixed(1))
    if not axes:
        axes = [] if step.node.get("noop_with_empty_axes", 0) else list(range(rank))
    axes = sorted(axis % rank for axis in axes)
    step.sizes(axes)
    return axes


def _kept(step: Step, value: str, axes: list[int]) -> str:
    """Return a reduced value with the reduced axes kept at size 1."""
    if not axes or step.node.get("keepdims", 1):
        return value
    return step.write("Unsqueeze", value, step.integers(axes))


DERIVATIVES: Mapping[str, Derivative] = MappingProxyType(
    {
        "GlobalMaxPool": Derivative(pool_max_whole),
        "ReduceL2": Derivative(norm),
        "ReduceMax": Derivative(extreme),
        "ReduceMean": Derivative(average),
        "ReduceMin": Derivative(extreme),
        "ReduceSum": Derivative(total),
    }
)
