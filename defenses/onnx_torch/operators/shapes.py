"""Operators that move, cut, join and pad without computing."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from defenses.onnx_torch.node import Node, Operator, axes_of, integers
from defenses.onnx_torch.operators.windows import pad_spatial


def shape(node: Node, x: Tensor) -> Tensor:
    """Shape, always on the CPU."""
    return torch.tensor(x.shape[node.get("start", 0) : node.get("end")], dtype=torch.int64, device="cpu")


def size(node: Node, x: Tensor) -> Tensor:
    """Size, always on the CPU."""
    return torch.tensor(x.numel(), dtype=torch.int64, device="cpu")


def identity(node: Node, x: Tensor) -> Tensor:
    """Identity."""
    return x


def reshape(node: Node, x: Tensor, target: Tensor) -> Tensor:
    """Reshape; a 0 keeps the input's size unless ``allowzero``."""
    sizes = integers(target)
    if not node.get("allowzero", 0):
        sizes = [x.shape[axis] if extent == 0 else extent for axis, extent in enumerate(sizes)]
    return x.reshape(sizes)


def flatten(node: Node, x: Tensor) -> Tensor:
    """Flatten to two axes."""
    axis = node.get("axis", 1)
    axis = axis + x.ndim if axis < 0 else axis
    rows = x.shape[:axis].numel()
    return x.reshape(rows, x.shape[axis:].numel())


def transpose(node: Node, x: Tensor) -> Tensor:
    """Transpose; all axes reversed where none are given."""
    return x.permute(node.get("perm", tuple(reversed(range(x.ndim)))))


def squeeze(node: Node, x: Tensor, axes: Tensor | None = None) -> Tensor:
    """Squeeze the given axes, or all of size 1."""
    chosen = axes_of(node, axes)
    return x.squeeze(tuple(chosen)) if chosen else x.squeeze()


def unsqueeze(node: Node, x: Tensor, axes: Tensor | None = None) -> Tensor:
    """Unsqueeze; the axes count in the result."""
    chosen = axes_of(node, axes)
    rank = x.ndim + len(chosen)
    for axis in sorted(axis % rank for axis in chosen):
        x = x.unsqueeze(axis)
    return x


def concat(node: Node, *tensors: Tensor) -> Tensor:
    """Concat."""
    return torch.cat(tensors, node.get("axis"))


def split(node: Node, x: Tensor, sizes: Tensor | None = None) -> Sequence[Tensor]:
    """Split into the given sizes, or evenly, the last part being smaller where it does not come out."""
    axis = node.get("axis", 0)
    parts = integers(sizes) if sizes is not None else list(node.get("split", ()))
    if not parts:
        count = node.get("num_outputs", len(node.outputs))
        each = -(-x.shape[axis] // count)
        parts = [max(0, min(each, x.shape[axis] - each * place)) for place in range(count)]
    return torch.split(x, parts, axis)


def cut(
    node: Node,
    x: Tensor,
    starts: Tensor | None = None,
    ends: Tensor | None = None,
    axes: Tensor | None = None,
    steps: Tensor | None = None,
) -> Tensor:
    """Slice; starts and ends are attributes before opset 10, steps may be negative."""
    first = integers(starts) if starts is not None else list(node.get("starts"))
    last = integers(ends) if ends is not None else list(node.get("ends"))
    along = axes_of(node, axes) or list(range(len(first)))
    stride = integers(steps) or [1] * len(first)
    for start, end, axis, step in zip(first, last, along, stride, strict=True):
        where = range(*slice(start, end, step).indices(x.shape[axis]))
        if step > 0:
            ahead = [slice(None)] * (axis % x.ndim)
            x = x[(*ahead, slice(where.start, max(where.start, where.stop), step))]
        else:
            x = x.index_select(axis, torch.tensor(list(where), dtype=torch.int64, device=x.device))
    return x


def expand(node: Node, x: Tensor, target: Tensor) -> Tensor:
    """Expand, broadcasting both ways."""
    return x.expand(np.broadcast_shapes(tuple(x.shape), tuple(integers(target))))


def tile(node: Node, x: Tensor, repeats: Tensor) -> Tensor:
    """Tile."""
    return x.repeat(integers(repeats))


def pad(
    node: Node, x: Tensor, pads: Tensor | None = None, value: Tensor | None = None, axes: Tensor | None = None
) -> Tensor:
    """Pad; amounts and value are attributes before opset 11, negative amounts crop."""
    amounts = integers(pads) if pads is not None else list(node.get("pads"))
    along = [axis % x.ndim for axis in integers(axes)] or list(range(x.ndim))
    before, after = [0] * x.ndim, [0] * x.ndim
    for place, axis in enumerate(along):
        before[axis], after[axis] = amounts[place], amounts[place + len(along)]
    mode = node.get("mode", "constant")
    if mode == "constant":
        fill = node.get("value", 0.0) if value is None else value.item()
        return pad_spatial(x, before, after, fill)
    for axis in range(x.ndim):
        x = _pad_axis(x, axis, before[axis], after[axis], mode)
    return x


def _pad_axis(x: Tensor, axis: int, before: int, after: int, mode: str) -> Tensor:
    if not before and not after:
        return x
    extent = x.shape[axis]
    where = torch.arange(-before, extent + after, device=x.device)
    if mode == "edge":
        where = where.clamp(0, extent - 1)
    elif mode == "wrap":
        where = where.remainder(extent)
    else:
        period = max(1, 2 * (extent - 1))
        where = where.remainder(period)
        where = torch.minimum(where, period - where)
    return x.index_select(axis, where)


def depth_to_space(node: Node, x: Tensor) -> Tensor:
    """DepthToSpace in the order DCR or CRD."""
    n, c, h, w = x.shape
    block = node.get("blocksize")
    depth = c // block**2
    if node.get("mode", "DCR") == "DCR":
        parts = x.reshape(n, block, block, depth, h, w).permute(0, 3, 4, 1, 5, 2)
    else:
        parts = x.reshape(n, depth, block, block, h, w).permute(0, 1, 4, 2, 5, 3)
    return parts.reshape(n, depth, h * block, w * block)


def space_to_depth(node: Node, x: Tensor) -> Tensor:
    """SpaceToDepth."""
    n, c, h, w = x.shape
    block = node.get("blocksize")
    parts = x.reshape(n, c, h // block, block, w // block, block).permute(0, 3, 5, 1, 2, 4)
    return parts.reshape(n, c * block**2, h // block, w // block)


OPERATORS: Mapping[str, Operator] = MappingProxyType(
    {
        "Concat": Operator(concat, since=4),
        "DepthToSpace": Operator(depth_to_space),
        "Expand": Operator(expand, host=(1,)),
        "Flatten": Operator(flatten),
        "Identity": Operator(identity),
        "Pad": Operator(pad, host=(1, 2, 3), since=2),
        "Reshape": Operator(reshape, host=(1,), since=5),
        "Shape": Operator(shape),
        "Size": Operator(size),
        "Slice": Operator(cut, host=(1, 2, 3, 4)),
        "SpaceToDepth": Operator(space_to_depth),
        "Split": Operator(split, host=(1,), since=2),
        "Squeeze": Operator(squeeze, host=(1,)),
        "Tile": Operator(tile, host=(1,), since=6),
        "Transpose": Operator(transpose),
        "Unsqueeze": Operator(unsqueeze, host=(1,)),
    }
)
