"""Operators on each element: arithmetic, comparison, logic, casts."""

from collections.abc import Callable, Mapping
from functools import partial, reduce
from types import MappingProxyType

import torch
from torch import Tensor

from defenses.onnx_torch.node import Node, Operator, torch_type


def unary(function: Callable[[Tensor], Tensor], node: Node, x: Tensor) -> Tensor:
    """Call a torch function of one tensor."""
    return function(x)


def binary(function: Callable[[Tensor, Tensor], Tensor], node: Node, a: Tensor, b: Tensor) -> Tensor:
    """Call a torch function of two tensors that broadcast."""
    return function(a, b)


def _unary(function: Callable[[Tensor], Tensor]) -> Operator:
    return Operator(partial(unary, function))


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    return Operator(partial(binary, function), since=7)


def divide(node: Node, a: Tensor, b: Tensor) -> Tensor:
    """Div: integers truncate towards zero."""
    return torch.div(a, b) if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


def modulo(node: Node, a: Tensor, b: Tensor) -> Tensor:
    """Mod: the sign of the divisor, or with ``fmod`` that of the dividend."""
    return torch.fmod(a, b) if node.get("fmod", 0) else torch.remainder(a, b)


def power(node: Node, base: Tensor, exponent: Tensor) -> Tensor:
    """Pow: the result has the type of the base."""
    return torch.pow(base, exponent).to(base.dtype)


def add_all(node: Node, *tensors: Tensor) -> Tensor:
    """Sum."""
    return reduce(torch.add, tensors)


def mean_all(node: Node, *tensors: Tensor) -> Tensor:
    """Mean."""
    return reduce(torch.add, tensors) / len(tensors)


def largest(node: Node, *tensors: Tensor) -> Tensor:
    """Max."""
    return reduce(torch.maximum, tensors)


def smallest(node: Node, *tensors: Tensor) -> Tensor:
    """Min."""
    return reduce(torch.minimum, tensors)


def clip(node: Node, x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    """Clip: the bounds are attributes before opset 11."""
    if node.opset < 11:
        low_bound, high_bound = node.get("min"), node.get("max")
        return x if low_bound is None and high_bound is None else x.clamp(low_bound, high_bound)
    return x if low is None and high is None else x.clamp(low, high)


def cast(node: Node, x: Tensor) -> Tensor:
    """Cast: every float type is float32 here."""
    dtype = torch_type(node.get("to"))
    assert dtype is not None
    return x.to(dtype)


def cast_like(node: Node, x: Tensor, target: Tensor) -> Tensor:
    """CastLike."""
    return x.to(target.dtype)


def refuse_cast(node: Node) -> str | None:
    """Refuse casts to strings, complex numbers and the eight-bit floats."""
    return None if torch_type(node.get("to")) is not None else "its target type is not supported"


def is_infinite(node: Node, x: Tensor) -> Tensor:
    """IsInf."""
    positive, negative = node.get("detect_positive", 1), node.get("detect_negative", 1)
    return (torch.isposinf(x) & bool(positive)) | (torch.isneginf(x) & bool(negative))


OPERATORS: Mapping[str, Operator] = MappingProxyType(
    {
        "Abs": _unary(torch.abs),
        "Acos": _unary(torch.acos),
        "Acosh": _unary(torch.acosh),
        "Asin": _unary(torch.asin),
        "Asinh": _unary(torch.asinh),
        "Atan": _unary(torch.atan),
        "Atanh": _unary(torch.atanh),
        "Ceil": _unary(torch.ceil),
        "Cos": _unary(torch.cos),
        "Cosh": _unary(torch.cosh),
        "Erf": _unary(torch.erf),
        "Exp": _unary(torch.exp),
        "Floor": _unary(torch.floor),
        "IsNaN": _unary(torch.isnan),
        "Log": _unary(torch.log),
        "Neg": _unary(torch.neg),
        "Not": _unary(torch.logical_not),
        "Reciprocal": _unary(torch.reciprocal),
        "Round": _unary(torch.round),
        "Sign": _unary(torch.sign),
        "Sin": _unary(torch.sin),
        "Sinh": _unary(torch.sinh),
        "Sqrt": _unary(torch.sqrt),
        "Tan": _unary(torch.tan),
        "Add": _binary(torch.add),
        "And": _binary(torch.logical_and),
        "Equal": _binary(torch.eq),
        "Greater": _binary(torch.gt),
        "GreaterOrEqual": _binary(torch.ge),
        "Less": _binary(torch.lt),
        "LessOrEqual": _binary(torch.le),
        "Mul": _binary(torch.mul),
        "Or": _binary(torch.logical_or),
        "Sub": _binary(torch.sub),
        "Xor": _binary(torch.logical_xor),
        "Cast": Operator(cast, refuse=refuse_cast, since=6),
        "CastLike": Operator(cast_like),
        "Clip": Operator(clip, since=6),
        "Div": Operator(divide, since=7),
        "IsInf": Operator(is_infinite),
        "Max": Operator(largest, since=8),
        "Mean": Operator(mean_all, since=8),
        "Min": Operator(smallest, since=8),
        "Mod": Operator(modulo),
        "Pow": Operator(power, since=7),
        "Sum": Operator(add_all, since=8),
    }
)
