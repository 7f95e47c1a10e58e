"""Normalisation layers, and dropout, which does nothing at inference."""

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional as F

from defenses.onnx_torch.node import Node, Operator, Result


def batch(node: Node, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """BatchNormalization with the statistics in the graph."""
    return F.batch_norm(x, mean, variance, scale, bias, training=False, eps=node.get("epsilon", 1e-5))


def refuse_training(node: Node) -> str | None:
    """Refuse batch normalisation in training mode."""
    if node.get("training_mode", 0) or (node.opset < 14 and len([name for name in node.outputs if name]) > 1):
        return "it is in training mode; export the model in evaluation mode"
    return None


def instance(node: Node, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """InstanceNormalization."""
    return F.instance_norm(x, weight=scale, bias=bias, eps=node.get("epsilon", 1e-5))


def group(node: Node, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """GroupNormalization: scale and bias are one per group before opset 21, one per channel since."""
    groups = node.get("num_groups")
    if node.opset < 21:
        each = x.shape[1] // groups
        scale, bias = scale.repeat_interleave(each), bias.repeat_interleave(each)
    return F.group_norm(x, groups, scale, bias, node.get("epsilon", 1e-5))


def layer(node: Node, x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Result:
    """LayerNormalization over the axes from ``axis`` (-1) on, with the mean and 1/deviation where they are used."""
    axis, epsilon = node.get("axis", -1) % x.ndim, node.get("epsilon", 1e-5)
    shape = x.shape[axis:]
    y = F.layer_norm(x, shape, scale.expand(shape), None if bias is None else bias.expand(shape), epsilon)
    if len(node.outputs) == 1:
        return y
    axes = tuple(range(axis, x.ndim))
    deviation = torch.rsqrt(x.var(axes, correction=0, keepdim=True) + epsilon)
    return y, x.mean(axes, keepdim=True), deviation


def root_mean_square(node: Node, x: Tensor, scale: Tensor) -> Tensor:
    """RMSNormalization over the axes from ``axis`` (-1) on."""
    axes = tuple(range(node.get("axis", -1) % x.ndim, x.ndim))
    return x * torch.rsqrt(x.square().mean(axes, keepdim=True) + node.get("epsilon", 1e-5)) * scale


def local_response(node: Node, x: Tensor) -> Tensor:
    """LRN over a window of channels, one longer after than before where its size is even."""
    size = node.get("size")
    squares = F.pad(x.square().unsqueeze(1), (0, 0) * (x.ndim - 2) + ((size - 1) // 2, size // 2)).squeeze(1)
    sums = torch.stack([squares.narrow(1, start, x.shape[1]) for start in range(size)]).sum(0)
    divisor: Tensor = node.get("bias", 1.0) + node.get("alpha", 1e-4) / size * sums
    return x / divisor.pow(node.get("beta", 0.75))


def lp(node: Node, x: Tensor) -> Tensor:
    """LpNormalization."""
    axis, p = node.get("axis", -1), node.get("p", 2)
    norm = x.norm(p, axis, keepdim=True)
    return torch.where(norm == 0, torch.zeros_like(x), x / norm)


def mean_variance(node: Node, x: Tensor) -> Tensor:
    """MeanVarianceNormalization."""
    axes = tuple(node.get("axes", (0, 2, 3)))
    centred = x - x.mean(axes, keepdim=True)
    return centred / (centred.square().mean(axes, keepdim=True).sqrt() + 1e-9)


def dropout(node: Node, x: Tensor, ratio: Tensor | None = None, training: Tensor | None = None) -> Result:
    """Dropout at inference: the input, and a mask of ones."""
    return (x, torch.ones_like(x, dtype=torch.bool)) if node.wants(1) else x


OPERATORS: Mapping[str, Operator] = MappingProxyType(
    {
        "BatchNormalization": Operator(batch, refuse=refuse_training, since=7),
        "Dropout": Operator(dropout, since=7),
        "GroupNormalization": Operator(group),
        "InstanceNormalization": Operator(instance, since=6),
        "LayerNormalization": Operator(layer),
        "LRN": Operator(local_response),
        "LpNormalization": Operator(lp),
        "MeanVarianceNormalization": Operator(mean_variance),
        "RMSNormalization": Operator(root_mean_square),
    }
)
