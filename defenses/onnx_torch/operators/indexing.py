"""Operators that pick, place and make elements."""

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from defenses.onnx_torch.node import Node, Operator, integers, torch_type


def _positive(indices: Tensor, size: int) -> Tensor:
    return torch.where(indices < 0, indices + size, indices).long()


def gather(node: Node, x: Tensor, indices: Tensor) -> Tensor:
    """Gather slices along one axis."""
    axis = node.get("axis", 0) % max(x.ndim, 1)
    if indices.ndim == 0 and indices.device.type == "cpu":
        return x.select(axis, int(indices))
    flat = _positive(indices, x.shape[axis]).reshape(-1)
    return x.index_select(axis, flat).reshape(*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])


def gather_elements(node: Node, x: Tensor, indices: Tensor) -> Tensor:
    """GatherElements."""
    axis = node.get("axis", 0)
    return x.gather(axis, _positive(indices, x.shape[axis]))


def gather_nd(node: Node, x: Tensor, indices: Tensor) -> Tensor:
    """GatherND, with its leading batch axes."""
    batch, depth = node.get("batch_dims", 0), indices.shape[-1]
    rows = x.shape[:batch].numel()
    flat_x = x.reshape(rows, *x.shape[batch:])
    flat = indices.reshape(rows, -1, depth)
    first = torch.arange(rows, device=x.device).reshape(-1, 1)
    picked = flat_x[(first, *(_positive(flat[..., place], flat_x.shape[1 + place]) for place in range(depth)))]
    return picked.reshape(*indices.shape[:-1], *x.shape[batch + depth :])


def scatter_nd(node: Node, x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    """ScatterND: replace, or add up."""
    depth = indices.shape[-1]
    where = tuple(_positive(indices[..., place], x.shape[place]) for place in range(depth))
    return x.index_put(where, updates, accumulate=node.get("reduction", "none") == "add")


def scatter_elements(node: Node, x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    """ScatterElements: replace, or add up."""
    axis = node.get("axis", 0)
    where = _positive(indices, x.shape[axis])
    if node.get("reduction", "none") == "add":
        return x.scatter_add(axis, where, updates)
    return x.scatter(axis, where, updates)


def refuse_reduction(node: Node) -> str | None:
    """Refuse the scattering reductions beyond ``add``."""
    reduction = node.get("reduction", "none")
    return None if reduction in ("none", "add") else f"its reduction {reduction!r} is not supported"


def where(node: Node, condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Where."""
    return torch.where(condition, a, b)


def constant_of_shape(node: Node, size: Tensor) -> Tensor:
    """ConstantOfShape, made on the CPU: its size is known there."""
    value = node.get("value")
    if value is None:
        return torch.zeros(integers(size))
    return torch.full(integers(size), value.item(), dtype=value.dtype)


def sequence(node: Node, start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    """Range, made on the CPU."""
    return torch.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype)


def one_hot(node: Node, indices: Tensor, depth: Tensor, values: Tensor) -> Tensor:
    """OneHot."""
    (classes,) = integers(depth)
    axis = node.get("axis", -1) % (indices.ndim + 1)
    hot = _positive(indices, classes).unsqueeze(axis)
    sizes = [1] * (indices.ndim + 1)
    sizes[axis] = classes
    return torch.where(hot == torch.arange(classes, device=indices.device).reshape(sizes), values[1], values[0])


def non_zero(node: Node, x: Tensor) -> Tensor:
    """NonZero."""
    return x.nonzero().T.contiguous()


def triangle(node: Node, x: Tensor, diagonal: Tensor | None = None) -> Tensor:
    """Trilu."""
    offset = integers(diagonal)[0] if diagonal is not None else 0
    return x.triu(offset) if node.get("upper", 1) else x.tril(offset)


def eye_like(node: Node, x: Tensor) -> Tensor:
    """EyeLike."""
    dtype = torch_type(node.get("dtype")) if node.get("dtype") else x.dtype
    ones = torch.ones(x.shape, device=x.device)
    offset = node.get("k", 0)
    return (ones.triu(offset) * ones.tril(offset)).to(dtype)


OPERATORS: Mapping[str, Operator] = MappingProxyType(
    {
        "ConstantOfShape": Operator(constant_of_shape, host=(0,)),
        "EyeLike": Operator(eye_like),
        "Gather": Operator(gather),
        "GatherElements": Operator(gather_elements),
        "GatherND": Operator(gather_nd),
        "NonZero": Operator(non_zero),
        "OneHot": Operator(one_hot, host=(1,)),
        "Range": Operator(sequence, host=(0, 1, 2)),
        "ScatterElements": Operator(scatter_elements, refuse=refuse_reduction),
        "ScatterND": Operator(scatter_nd, refuse=refuse_reduction),
        "Trilu": Operator(triangle, host=(1,)),
        "Where": Operator(where),
    }
)
