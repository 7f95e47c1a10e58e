"""One node of a graph, its attributes read once, and what an operator is to the interpreter."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
import torch
from onnx import AttributeProto, NodeProto, TensorProto, numpy_helper
from torch import Tensor

INTEGER_TYPES: Mapping[int, torch.dtype] = MappingProxyType(
    {
        TensorProto.BOOL: torch.bool,
        TensorProto.UINT8: torch.uint8,
        TensorProto.INT8: torch.int8,
        TensorProto.INT16: torch.int16,
        TensorProto.INT32: torch.int32,
        TensorProto.INT64: torch.int64,
        TensorProto.UINT16: torch.int64,
        TensorProto.UINT32: torch.int64,
        TensorProto.UINT64: torch.int64,
    }
)
"""Torch has few operators on wide unsigned integers, so they are computed as int64."""

FLOAT_TYPES = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
"""Whatever the precision a graph asks for, it is computed in float32: gradients need no less, attacks no more."""

Result = Tensor | Sequence[Tensor]


def torch_type(element_type: int) -> torch.dtype | None:
    """Return the torch dtype that an ONNX element type is computed in, None where there is none."""
    return torch.float32 if element_type in FLOAT_TYPES else INTEGER_TYPES.get(element_type)


def to_torch(tensor: TensorProto) -> Tensor:
    """Convert a constant of the graph; the result owns its memory."""
    dtype = torch_type(tensor.data_type)
    if dtype is None:
        raise TypeError(f"constants of type {TensorProto.DataType.Name(tensor.data_type)} are not supported")
    array = numpy_helper.to_array(tensor).astype(_numpy_type(dtype))
    return torch.from_numpy(np.ascontiguousarray(array).reshape(array.shape).copy())


def _numpy_type(dtype: torch.dtype) -> np.dtype[Any]:
    return torch.empty(0, dtype=dtype).numpy().dtype


@dataclass(frozen=True)
class Node:
    """A node as the interpreter sees it; ``opset`` is the version of its domain's operator set."""

    name: str
    operator: str
    domain: str
    opset: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]

    @classmethod
    def read(cls, proto: NodeProto, opset: int) -> "Node":
        """Read a node; raises ``TypeError`` for attributes that have no torch counterpart."""
        return cls(
            name=proto.name or (proto.output[0] if proto.output else ""),
            operator=proto.op_type,
            domain=proto.domain or "ai.onnx",
            opset=opset,
            inputs=tuple(proto.input),
            outputs=tuple(proto.output),
            attributes={attribute.name: _attribute(attribute) for attribute in proto.attribute},
        )

    def get(self, name: str, default: Any = None) -> Any:
        """Return an attribute: int, float, str, tensor, a tuple of them, or the default where it is absent."""
        return self.attributes.get(name, default)

    def wants(self, output: int) -> bool:
        """Say whether an output beyond the first is used."""
        return len(self.outputs) > output and bool(self.outputs[output])


@dataclass(frozen=True)
class Operator:
    """How one operator runs.

    ``run(node, *inputs)`` computes it on tensors, absent inputs being None. ``host`` are the positions of inputs that
    are shapes, axes and counts: they stay on the CPU, so that reading them waits for no accelerator. ``refuse``
    returns the reason why a certain node cannot run, or None. ``since`` is the oldest opset whose meaning is met.
    """

    run: Callable[..., Result]
    host: tuple[int, ...] = ()
    refuse: Callable[[Node], str | None] | None = None
    since: int = 1


def integers(tensor: Tensor | None) -> list[int]:
    """Return a tensor of shapes, axes or counts as a flat list; empty where the input is absent."""
    return [] if tensor is None else [int(value) for value in tensor.reshape(-1).tolist()]


def axes_of(node: Node, axes: Tensor | None) -> list[int]:
    """Return the axes of a node: an attribute in older opsets, an input in newer ones; empty where absent."""
    return integers(axes) if axes is not None else list(node.get("axes", ()))


def _attribute(attribute: AttributeProto) -> Any:
    value = onnx.helper.get_attribute_value(attribute)
    match attribute.type:
        case AttributeProto.STRING:
            return value.decode()
        case AttributeProto.TENSOR:
            return to_torch(value)
        case AttributeProto.INT | AttributeProto.FLOAT:
            return value
        case AttributeProto.INTS | AttributeProto.FLOATS:
            return tuple(value)
        case AttributeProto.STRINGS:
            return tuple(text.decode() for text in value)
    kind = AttributeProto.AttributeType.Name(attribute.type)
    raise TypeError(f"its attribute {attribute.name!r} of type {kind} is not supported")
