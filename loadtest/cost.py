"""What arithmetic and traffic one image costs in a graph, counted on its nodes."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import onnx
from onnx import numpy_helper, shape_inference

PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
MOVES = (*PRODUCTS, "MaxPool", "AveragePool", "GlobalAveragePool", "Resize", "Concat", "Pad")
"""Nodes that read and write tensors of their own; what is done value by value is taken as fused into them."""

REST = "rest"


@dataclass(frozen=True)
class Cost:
    """One image's cost: multiply-adds, bytes of the weights, and bytes of activations read and written."""

    multiply_adds: int = 0
    weight_bytes: int = 0
    activation_bytes: int = 0

    def __add__(self, other: Self) -> "Cost":
        return Cost(
            self.multiply_adds + other.multiply_adds,
            self.weight_bytes + other.weight_bytes,
            self.activation_bytes + other.activation_bytes,
        )


def costs(graph: onnx.ModelProto) -> dict[str, Cost]:
    """Return the cost of each part of a graph: of the nodes whose names begin alike before a ``/``.

    A protected graph has the parts ``raw`` and ``purified``, the classifier's passes over the image as it came and as
    it was purified, ``purifier`` and ``detector``; of a graph without parts all is ``rest``. Weights that two parts
    read count in both, as they are read twice; ``weight_bytes`` of a whole graph counts them once.
    """
    graph = _for_one_image(graph)
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.graph.initializer}
    shapes = {name: array.shape for name, array in weights.items()} | _shapes(graph)
    parts: dict[str, Cost] = defaultdict(Cost)
    for node in graph.graph.node:
        part = node.name.split("/")[0] if "/" in node.name else REST
        parts[part] += Cost(
            _multiply_adds(node, shapes, weights),
            sum(weights[name].nbytes for name in node.input if name in weights),
            _moved(node, shapes, weights),
        )
    return dict(parts)


def total(parts: Mapping[str, Cost]) -> Cost:
    """Return the cost of all parts together."""
    return sum(parts.values(), Cost())


def weight_bytes(path: Path) -> int:
    """Return the bytes of a graph's weights, each tensor once."""
    return sum(numpy_helper.to_array(tensor).nbytes for tensor in onnx.load(path).graph.initializer)


def multiply_adds(graph: onnx.ModelProto) -> int:
    """Return the multiply-adds of one image in the graph's convolutions and matrix products with weights."""
    return total(costs(graph)).multiply_adds


def _for_one_image(graph: onnx.ModelProto) -> onnx.ModelProto:
    single = onnx.ModelProto()
    single.CopyFrom(graph)
    initialised = {tensor.name for tensor in single.graph.initializer}
    for value in single.graph.input:
        dimensions = value.type.tensor_type.shape.dim
        if value.name not in initialised and len(dimensions):
            dimensions[0].dim_value = 1
    del single.graph.value_info[:]
    return shape_inference.infer_shapes(single, data_prop=True)


def _shapes(graph: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    values = (*graph.graph.input, *graph.graph.value_info, *graph.graph.output)
    return {value.name: tuple(d.dim_value or 1 for d in value.type.tensor_type.shape.dim) for value in values}


def _multiply_adds(node: onnx.NodeProto, shapes: Mapping[str, Sequence[int]], weights: Mapping[str, np.ndarray]) -> int:
    if node.op_type == "Conv":
        return int(np.prod(shapes[node.input[1]]) * np.prod(shapes[node.output[0]][2:], dtype=int))
    if node.op_type == "ConvTranspose":
        return int(np.prod(shapes[node.input[1]]) * np.prod(shapes[node.input[0]][2:], dtype=int))
    if node.op_type in ("Gemm", "MatMul") and node.input[1] in weights:
        return int(np.prod(shapes[node.input[1]]))
    return 0


def _moved(node: onnx.NodeProto, shapes: Mapping[str, Sequence[int]], weights: Mapping[str, np.ndarray]) -> int:
    if node.op_type not in MOVES:
        return 0
    read = node.input if node.op_type == "Concat" else node.input[:1]
    names = [*(name for name in read if name not in weights), node.output[0]]
    return sum(4 * int(np.prod(shapes.get(name, (0,)), dtype=int)) for name in names)
