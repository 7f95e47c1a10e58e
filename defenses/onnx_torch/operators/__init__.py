"""Every operator of the default ONNX domain that runs on torch, by name."""

from collections.abc import Mapping
from types import MappingProxyType

from defenses.onnx_torch.node import Operator
from defenses.onnx_torch.operators import (
    activations,
    elementwise,
    indexing,
    linear,
    normalisation,
    reductions,
    resizing,
    shapes,
    windows,
)

OPERATORS: Mapping[str, Operator] = MappingProxyType(
    {
        **activations.OPERATORS,
        **elementwise.OPERATORS,
        **indexing.OPERATORS,
        **linear.OPERATORS,
        **normalisation.OPERATORS,
        **reductions.OPERATORS,
        **resizing.OPERATORS,
        **shapes.OPERATORS,
        **windows.OPERATORS,
    }
)
