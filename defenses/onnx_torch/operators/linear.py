"""Matrix products and attention."""

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional as F

from defenses.onnx_torch.node import Node, Operator


def gemm(node: Node, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    """Gemm: alpha A B + beta C."""
    a = a.T if node.get("transA", 0) else a
    b = b.T if node.get("transB", 0) else b
    alpha, beta = node.get("alpha", 1.0), node.get("beta", 1.0)
    y = a @ b if alpha == 1 else alpha * (a @ b)
    if c is None:
        return y
    return y + c if beta == 1 else y + beta * c


def matmul(node: Node, a: Tensor, b: Tensor) -> Tensor:
    """MatMul."""
    return torch.matmul(a, b)


def einsum(node: Node, *tensors: Tensor) -> Tensor:
    """Einsum."""
    result: Tensor = torch.einsum(node.get("equation"), *tensors)
    return result


def attention(node: Node, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention (opset 23) without a cache: (N, heads, L, D), or (N, L, heads D) with the heads as attributes."""
    folded = q.ndim == 3
    if folded:
        q = _unfold(q, node.get("q_num_heads"))
        k, v = _unfold(k, node.get("kv_num_heads")), _unfold(v, node.get("kv_num_heads"))
    y = F.scaled_dot_product_attention(
        q,
        k,
        v,
        mask,
        is_causal=bool(node.get("is_causal", 0)),
        scale=node.get("scale"),
        enable_gqa=k.shape[1] != q.shape[1],
    )
    return y.transpose(1, 2).flatten(2) if folded else y


def _unfold(x: Tensor, heads: int) -> Tensor:
    return x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)


def refuse_cache(node: Node) -> str | None:
    """Refuse attention with a key-value cache, soft capping, or a mask beside causality."""
    if len([name for name in node.inputs[4:] if name]) or any(node.wants(output) for output in (1, 2, 3)):
        return "its key-value cache and inner products are not supported"
    if node.get("softcap", 0.0):
        return "its soft cap is not supported"
    if node.get("left_window_size", -1) >= 0 or node.get("right_window_size", -1) >= 0:
        return "its sliding window is not supported"
    if node.get("is_causal", 0) and len(node.inputs) > 3 and node.inputs[3]:
        return "a mask beside is_causal is not supported"
    return None


OPERATORS: Mapping[str, Operator] = MappingProxyType(
    {
        "Attention": Operator(attention, refuse=refuse_cache),
        "Einsum": Operator(einsum),
        "Gemm": Operator(gemm, since=7),
        "MatMul": Operator(matmul),
    }
)
