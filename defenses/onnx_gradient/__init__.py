"""The input gradient of a classifier as an ONNX graph of forward operations alone."""

from defenses.onnx_gradient.composition import ACTIVATIONS, COTANGENT, GRADIENT, gradient_graph
from defenses.onnx_gradient.derivatives import DERIVATIVES
from defenses.onnx_gradient.errors import GradientUnsupported, ImageNotReached

__all__ = [
    "ACTIVATIONS",
    "COTANGENT",
    "DERIVATIVES",
    "GRADIENT",
    "GradientUnsupported",
    "ImageNotReached",
    "gradient_graph",
]
