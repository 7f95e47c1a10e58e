"""Every operator of the default ONNX domain whose derivative can be written, by name."""

from collections.abc import Mapping
from types import MappingProxyType

from defenses.onnx_gradient.derivatives import (
    activations,
    arithmetic,
    convolution,
    linear,
    normalisation,
    pooling,
    reductions,
    shapes,
)
from defenses.onnx_gradient.step import Derivative

DERIVATIVES: Mapping[str, Derivative] = MappingProxyType(
    {
        **activations.DERIVATIVES,
        **arithmetic.DERIVATIVES,
        **convolution.DERIVATIVES,
        **linear.DERIVATIVES,
        **normalisation.DERIVATIVES,
        **pooling.DERIVATIVES,
        **reductions.DERIVATIVES,
        **shapes.DERIVATIVES,
    }
)
