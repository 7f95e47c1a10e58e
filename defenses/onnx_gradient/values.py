"""What is known of a graph's values before it runs: shapes, element types, constants, and where gradients flow."""

from collections.abc import Mapping
from dataclasses import dataclass

import onnx
import torch
from onnx import ModelProto, TensorProto
from torch import Tensor

from defenses.onnx_torch.graph import Graph, call, read_graph
from defenses.onnx_torch.node import Node

Shape = tuple[int | None, ...]
"""The size of each axis, None where it depends on the batch."""

FLAT = ("Ceil", "Floor", "Round", "Sign")
"""Operators on floating-point values whose derivative is 0 wherever there is one, and so ends a path."""

BATCHES = (2, 3)


@dataclass(frozen=True)
class Values:
    """A graph's nodes in order, and what is known of its values by their names.

    ``fixed`` holds the values that are the same for every image and batch, on the CPU, floating point as float32;
    ``types`` the ONNX element types; ``varying`` those that change with the image's elements and have a gradient.
    """

    nodes: tuple[Node, ...]
    shapes: Mapping[str, Shape]
    types: Mapping[str, int]
    fixed: Mapping[str, Tensor]
    varying: frozenset[str]

    @classmethod
    def read(cls, model: ModelProto) -> "Values":
        """Read a canonical graph, by running it on two batches. Raises as ``read_graph`` does."""
        graph = read_graph(model)
        sizes = [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim[1:]]
        runs = [_run(graph, torch.full((batch, *sizes), 0.5)) for batch in BATCHES]
        shapes = {
            name: tuple(a if a == b else None for a, b in zip(one.shape, runs[1][name].shape, strict=True))
            for name, one in runs[0].items()
        }
        content = {graph.input, *graph.content}
        fixed = {name: one for name, one in runs[0].items() if name not in content and torch.equal(one, runs[1][name])}
        return cls(graph.nodes, shapes, _types(model), fixed, _varying(graph, runs[0]))

    def between(self, image: str, target: str) -> list[Node]:
        """Return the nodes by which a target varies with the image, in order; all in between, none beside."""
        wanted, found = {target}, list[Node]()
        for node in reversed(self.nodes):
            if node.operator not in FLAT and wanted.intersection(node.outputs).intersection(self.varying):
                found.append(node)
                wanted |= self.varying.intersection(node.inputs)
        return found[::-1] if image in wanted else []


def _run(graph: Graph, images: Tensor) -> dict[str, Tensor]:
    values = dict(graph.constants) | {graph.input: images}
    with torch.no_grad():
        for node in graph.nodes:
            results = call(node, [values[name] if name else None for name in node.inputs])
            values.update((name, result) for name, result in zip(node.outputs, results, strict=False) if name)
    return values


def _types(model: ModelProto) -> dict[str, int]:
    """Return the element type of each value that shape inference finds one for."""
    inferred = onnx.shape_inference.infer_shapes(model).graph
    values = (*inferred.value_info, *inferred.input, *inferred.output)
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    return types | {tensor.name: tensor.data_type for tensor in inferred.initializer}


def _varying(graph: Graph, run: Mapping[str, Tensor]) -> frozenset[str]:
    varying = {graph.input}
    content = set(graph.content)
    for node in graph.nodes:
        if node.operator not in FLAT and varying.intersection(node.inputs):
            varying.update(name for name in node.outputs if name in content and run[name].is_floating_point())
    return frozenset(varying)


def element_type(values: Values, name: str) -> int:
    """Return a value's ONNX element type, FLOAT where inference found none."""
    return values.types.get(name) or TensorProto.FLOAT
