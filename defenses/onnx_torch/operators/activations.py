"""Activation functions."""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional as F

from defenses.onnx_torch.node import Node, Operator


def gelu(node: Node, x: Tensor) -> Tensor:
    """Gelu."""
    return F.gelu(x, approximate=node.get("approximate", "none"))


def hard_sigmoid(node: Node, x: Tensor) -> Tensor:
    """HardSigmoid."""
    line: Tensor = x * node.get("alpha", 0.2) + node.get("beta", 0.5)
    return line.clamp(0, 1)


def hard_swish(node: Node, x: Tensor) -> Tensor:
    """HardSwish."""
    return F.hardswish(x)


def leaky_relu(node: Node, x: Tensor) -> Tensor:
    """LeakyRelu."""
    return F.leaky_relu(x, node.get("alpha", 0.01))


def prelu(node: Node, x: Tensor, slope: Tensor) -> Tensor:
    """PRelu, with a slope that broadcasts to x."""
    return torch.where(x > 0, x, x * slope)


def elu(node: Node, x: Tensor) -> Tensor:
    """Elu."""
    return F.elu(x, node.get("alpha", 1.0))


def celu(node: Node, x: Tensor) -> Tensor:
    """Celu."""
    return F.celu(x, node.get("alpha", 1.0))


def selu(node: Node, x: Tensor) -> Tensor:
    """Selu."""
    alpha, gamma = node.get("alpha", 1.67326319217681884765625), node.get("gamma", 1.05070102214813232421875)
    scaled: Tensor = F.elu(x, alpha) * gamma
    return scaled


def softplus(node: Node, x: Tensor) -> Tensor:
    """Softplus."""
    return F.softplus(x)


def softsign(node: Node, x: Tensor) -> Tensor:
    """Softsign."""
    return F.softsign(x)


def mish(node: Node, x: Tensor) -> Tensor:
    """Mish."""
    return F.mish(x)


def swish(node: Node, x: Tensor) -> Tensor:
    """Swish."""
    return x * torch.sigmoid(x * node.get("alpha", 1.0))


def thresholded_relu(node: Node, x: Tensor) -> Tensor:
    """ThresholdedRelu."""
    return F.threshold(x, node.get("alpha", 1.0), 0.0)


def relu(node: Node, x: Tensor) -> Tensor:
    """Relu, never in place: the value before it may be asked for."""
    return F.relu(x)


def sigmoid(node: Node, x: Tensor) -> Tensor:
    """Sigmoid."""
    return torch.sigmoid(x)


def tanh(node: Node, x: Tensor) -> Tensor:
    """Tanh."""
    return torch.tanh(x)


def along_axis(function: Callable[..., Tensor], node: Node, x: Tensor) -> Tensor:
    """Softmax and LogSoftmax: before opset 13 over every axis from ``axis`` (1) on, since over ``axis`` (-1) alone."""
    if node.opset >= 13:
        return function(x, dim=node.get("axis", -1))
    axis = node.get("axis", 1) % max(x.ndim, 1)
    return function(x.flatten(axis), dim=-1).reshape(x.shape)


OPERATORS: Mapping[str, Operator] = MappingProxyType(
    {
        "Celu": Operator(celu),
        "Elu": Operator(elu, since=6),
        "Gelu": Operator(gelu),
        "HardSigmoid": Operator(hard_sigmoid, since=6),
        "HardSwish": Operator(hard_swish),
        "LeakyRelu": Operator(leaky_relu, since=6),
        "LogSoftmax": Operator(partial(along_axis, torch.log_softmax)),
        "Mish": Operator(mish),
        "PRelu": Operator(prelu, since=7),
        "Relu": Operator(relu),
        "Selu": Operator(selu, since=6),
        "Sigmoid": Operator(sigmoid),
        "Softmax": Operator(partial(along_axis, torch.softmax)),
        "Softplus": Operator(softplus),
        "Softsign": Operator(softsign),
        "Swish": Operator(swish),
        "Tanh": Operator(tanh),
        "ThresholdedRelu": Operator(thresholded_relu),
    }
)
