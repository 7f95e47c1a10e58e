"""Operators that reduce, order or accumulate along axes."""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor

from defenses.onnx_torch.node import Node, Operator, axes_of, integers

Reduction = Callable[[Tensor, tuple[int, ...], bool], Tensor]


def reduce(reduction: Reduction, node: Node, x: Tensor, axes: Tensor | None = None) -> Tensor:
    """Reduce the given axes, or all; with ``noop_with_empty_axes`` none where none is given."""
    chosen = tuple(axes_of(node, axes))
    if not chosen and node.get("noop_with_empty_axes", 0):
        return reduction(x.unsqueeze(0), (0,), False)
    if x.ndim == 0:
        return reduction(x.reshape(1), (0,), False)
    return reduction(x, chosen or tuple(range(x.ndim)), bool(node.get("keepdims", 1)))


def total(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    """ReduceSum."""
    return x.sum(axes, keepdim=keep, dtype=x.dtype)


def average(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    """ReduceMean; integers are divided as integers."""
    if x.is_floating_point():
        return x.mean(axes, keepdim=keep)
    count = x.numel() // max(1, x.sum(axes).numel())
    return torch.div(total(x, axes, keep), count, rounding_mode="trunc")


def maximum(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    """ReduceMax."""
    return x.amax(axes, keepdim=keep)


def minimum(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    """ReduceMin."""
    return x.amin(axes, keepdim=keep)


def product(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    """ReduceProd."""
    for axis in sorted((axis % x.ndim for axis in axes), reverse=True):
        x = x.prod(axis, keepdim=keep, dtype=x.dtype)
    return x


def norm_1(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    """ReduceL1."""
    return x.abs().sum(axes, keepdim=keep, dtype=x.dtype)


def norm_2(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    """ReduceL2."""
    norm: Tensor = torch.linalg.vector_norm(x, 2, axes, keep)
    return norm


def log_sum(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    """ReduceLogSum."""
    return x.sum(axes, keepdim=keep).log()


def log_sum_exp(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    """ReduceLogSumExp."""
    total_exp: Tensor = torch.logsumexp(x, axes, keepdim=keep)
    return total_exp


def sum_of_squares(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    """ReduceSumSquare."""
    return x.square().sum(axes, keepdim=keep, dtype=x.dtype)


def arg_extreme(function: Callable[..., Tensor], node: Node, x: Tensor) -> Tensor:
    """ArgMax and ArgMin: the first of equals, or with ``select_last_index`` the last."""
    axis, keep = node.get("axis", 0), bool(node.get("keepdims", 1))
    if not node.get("select_last_index", 0):
        return function(x, dim=axis, keepdim=keep)
    from_the_end = function(x.flip(axis), dim=axis, keepdim=keep)
    return torch.sub(x.shape[axis] - 1, from_the_end)


def top_k(node: Node, x: Tensor, k: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """TopK: values and indices; ``k`` is an attribute before opset 10."""
    count = node.get("k") if k is None else integers(k)[0]
    largest, ordered = bool(node.get("largest", 1)), bool(node.get("sorted", 1))
    values, indices = torch.topk(x, count, node.get("axis", -1), largest, ordered)
    return values, indices


def accumulate(node: Node, x: Tensor, axis: Tensor) -> Tensor:
    """CumSum, optionally from the end, optionally without the element itself."""
    (along,) = integers(axis)
    turned = x.flip(along) if node.get("reverse", 0) else x
    sums = turned.cumsum(along, dtype=x.dtype)
    if node.get("exclusive", 0):
        sums = sums - turned
    return sums.flip(along) if node.get("reverse", 0) else sums


def _reduction(function: Reduction) -> Operator:
    return Operator(partial(reduce, function), host=(1,))


OPERATORS: Mapping[str, Operator] = MappingProxyType(
    {
        "ArgMax": Operator(partial(arg_extreme, torch.argmax)),
        "ArgMin": Operator(partial(arg_extreme, torch.argmin)),
        "CumSum": Operator(accumulate, host=(1,)),
        "ReduceL1": _reduction(norm_1),
        "ReduceL2": _reduction(norm_2),
        "ReduceLogSum": _reduction(log_sum),
        "ReduceLogSumExp": _reduction(log_sum_exp),
        "ReduceMax": _reduction(maximum),
        "ReduceMean": _reduction(average),
        "ReduceMin": _reduction(minimum),
        "ReduceProd": _reduction(product),
        "ReduceSum": _reduction(total),
        "ReduceSumSquare": _reduction(sum_of_squares),
        "TopK": Operator(top_k, host=(1,)),
    }
)
