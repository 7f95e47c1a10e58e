"""Operators that move, cut, join and pad."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np

from defenses.onnx_gradient.step import Derivative, Step
from defenses.onnx_gradient.values import element_type
from defenses.onnx_torch.node import Node, axes_of, integers


def same(step: Step, place: int) -> str:
    """Identity and Dropout at inference."""
    return step.gradient


def cast(step: Step, place: int) -> str:
    """Cast between floating-point types."""
    before, after = (element_type(step.values, name) for name in (step.input(), step.output))
    return step.gradient if before == after else step.write("Cast", step.gradient, to=before)


def reshape(step: Step, place: int) -> str:
    """Reshape, Flatten, Squeeze and Unsqueeze."""
    return step.shaped_as(step.gradient)


def transpose(step: Step, place: int) -> str:
    """Transpose."""
    order = step.node.get("perm", tuple(reversed(range(len(step.shape())))))
    return step.write("Transpose", step.gradient, perm=[int(axis) for axis in np.argsort(order)])


def expand(step: Step, place: int) -> str:
    """Expand."""
    return step.summed(step.gradient, 0)


def concat(step: Step, place: int) -> str:
    """Concat."""
    axis = step.node.get("axis") % len(step.output_shape)
    ends = np.cumsum([step.sizes([axis], other)[0] for other in range(place + 1)])
    start, end = int(ends[-1]) - step.sizes([axis], place)[0], int(ends[-1])
    return step.write("Slice", step.gradient, *map(step.integers, ([start], [end], [axis])))


def split(step: Step, place: int) -> str:
    """Split: the gradients by its parts, zeros for those that nothing reads, joined."""
    parts = [
        gradient or step.write("Expand", 0.0, step.write("Shape", name))
        for name, gradient in zip(step.node.outputs, step.gradients, strict=True)
    ]
    return step.write("Concat", *parts, axis=step.node.get("axis", 0))


def cut(step: Step, place: int) -> str:
    """Slice: the gradient with zeros between and around, reversed where the step is negative."""
    rank = len(step.shape())
    starts, ends = (integers(step.fixed(place)) for place in (1, 2))
    along = [axis % rank for axis in axes_of(step.node, step.fixed(3)) or range(len(starts))]
    strides = integers(step.fixed(4)) or [1] * len(starts)
    gradient, shape, pads = step.gradient, list(step.output_shape), np.zeros((2, rank), int)
    for start, end, axis, stride in zip(starts, ends, along, strides, strict=True):
        if stride == 1 and step.shape()[axis] == step.output_shape[axis] is None:
            continue
        (size,) = step.sizes([axis])
        where = range(*slice(start, end, stride).indices(size))
        if not where:
            step.refuse("it cuts everything off")
        if stride < 0:
            last, first = [-1], [int(np.iinfo(np.int64).min)]
            gradient = step.write("Slice", gradient, *map(step.integers, (last, first, [axis], last)))
            where = where[::-1]
        shape[axis] = len(where) * where.step
        gradient = _spread(step, gradient, shape, axis, where.step)
        # The zeros after the last element are part of what was spread; negative pads cut them off again.
        pads[:, axis] = where.start, size - where.start - len(where) * where.step
    if not pads.any():
        return gradient
    return step.write("Pad", gradient, step.integers(pads.reshape(-1).tolist()))


def _spread(step: Step, gradient: str, shape: Sequence[int | None], axis: int, stride: int) -> str:
    """Put stride - 1 zeros after each element along an axis, which makes it of ``shape``."""
    if stride == 1:
        return gradient
    apart = step.write("Unsqueeze", gradient, step.integers([axis + 1]))
    pads = np.zeros((2, len(shape) + 1), int)
    pads[1, axis + 1] = stride - 1
    spread = step.write("Pad", apart, step.integers(pads.reshape(-1).tolist()))
    if shape.count(None) > 1:
        step.refuse("it works on a value of which several sizes depend on the batch")
    return step.write("Reshape", spread, step.integers([-1 if size is None else size for size in shape]))


def pad(step: Step, place: int) -> str:
    """Pad by a constant: what was added is cut off, what was cut off is zeros."""
    rank = len(step.shape())
    amounts = np.array(integers(step.fixed(1))).reshape(2, -1)
    along = [axis % rank for axis in integers(step.fixed(3))] or list(range(rank))
    pads = np.zeros((2, rank), int)
    pads[:, along] = -amounts
    return step.write("Pad", step.gradient, step.integers(pads.reshape(-1).tolist()))


def refuse_mode(node: Node) -> str | None:
    """Refuse padding by what is in the input."""
    mode = node.get("mode", "constant")
    return None if mode == "constant" else f"its mode {mode!r} is not supported"


def gather(step: Step, place: int) -> str:
    """Gather by constant indices along one axis: a product with the matrix that says which element went where."""
    rank = len(step.shape())
    axis = step.node.get("axis", 0) % rank
    (size,) = step.sizes([axis])
    indices = step.fixed(1)
    assert indices is not None
    if indices.ndim > 1:
        step.refuse("indices of more than one axis are not supported")
    gradient = step.gradient
    if indices.ndim == 0:
        gradient = step.write("Unsqueeze", gradient, step.integers([axis]))
    placed = np.eye(size)[np.array(integers(indices)) % size]
    order = [*(other for other in range(rank) if other != axis), axis]
    if axis == rank - 1:
        return step.write("MatMul", gradient, step.constant(placed))
    product = step.write("MatMul", step.write("Transpose", gradient, perm=order), step.constant(placed))
    return step.write("Transpose", product, perm=[int(place) for place in np.argsort(order)])


DERIVATIVES: Mapping[str, Derivative] = MappingProxyType(
    {
        "Cast": Derivative(cast),
        "Concat": Derivative(concat, None),
        "Dropout": Derivative(same),
        "Expand": Derivative(expand),
        "Flatten": Derivative(reshape),
        "Gather": Derivative(gather),
        "Identity": Derivative(same),
        "Pad": Derivative(pad, refuse=refuse_mode),
        "Reshape": Derivative(reshape),
        "Slice": Derivative(cut),
        "Split": Derivative(split, every_output=True),
        "Squeeze": Derivative(reshape),
        "Transpose": Derivative(transpose),
        "Unsqueeze": Derivative(reshape),
    }
)
