"""An interpreter of ONNX graphs over torch operators, so that gradients flow through a classifier of any origin."""

from defenses.onnx_torch.errors import GraphInvalid, OperatorUnsupported, Unsupported, ValueNotFound
from defenses.onnx_torch.graph import NEWEST_OPSET, OLDEST_OPSET
from defenses.onnx_torch.module import OnnxModule

__all__ = [
    "NEWEST_OPSET",
    "OLDEST_OPSET",
    "GraphInvalid",
    "OnnxModule",
    "OperatorUnsupported",
    "Unsupported",
    "ValueNotFound",
]
