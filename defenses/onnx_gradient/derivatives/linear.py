"""Matrix products."""

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from defenses.onnx_gradient.step import Derivative, Step
from defenses.onnx_gradient.values import Shape


def gemm(step: Step, place: int) -> str:
    """Gemm, Y = alpha A' B' + beta C, where A' may be A or its transpose."""
    alpha, turned = step.node.get("alpha", 1.0), (step.node.get("transA", 0), step.node.get("transB", 0))
    if place == 2:
        beta = step.node.get("beta", 1.0)
        return step.summed(step.gradient if beta == 1 else step.write("Mul", step.gradient, beta), 2)
    other, flag = step.input(1 - place), turned[1 - place]
    if turned[place]:
        left, right = (other, flag), (step.gradient, 1)
    else:
        left, right = (step.gradient, 0), (other, 1 - flag)
    if place:
        left, right = right, left
    return step.write("Gemm", left[0], right[0], alpha=alpha, transA=left[1], transB=right[1])


def matmul(step: Step, place: int) -> str:
    """MatMul of values of two axes or more; batches of matrices that were broadcast are summed."""
    shapes = step.shape(0), step.shape(1)
    if min(len(shapes[0]), len(shapes[1])) < 2:
        step.refuse("a product with a vector is not supported")
    other = _transposed(step, 1 - place)
    product = step.write("MatMul", *((other, step.gradient) if place else (step.gradient, other)))
    whole: Shape = (*step.output_shape[:-2], *shapes[place][-2:])
    return step.summed(product, place, whole)


def _transposed(step: Step, place: int) -> str:
    """Return an input with its last two axes exchanged."""
    axes = np.arange(len(step.shape(place)))
    return step.write("Transpose", step.input(place), perm=[*axes[:-2], axes[-1], axes[-2]])


DERIVATIVES: Mapping[str, Derivative] = MappingProxyType(
    {
        "Gemm": Derivative(gemm, None),
        "MatMul": Derivative(matmul, None),
    }
)
