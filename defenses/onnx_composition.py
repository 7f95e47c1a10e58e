"""Graphs put together from the nodes of others."""

from collections.abc import Mapping, Sequence

import onnx
from onnx import NodeProto, TensorProto, ValueInfoProto, helper


def wrapped(graph: onnx.GraphProto, parts: Sequence[onnx.ModelProto]) -> onnx.ModelProto:
    """Wrap a graph with the opsets and the IR version that its parts need, and check it."""
    domains = {entry.domain: entry.version for part in parts for entry in part.opset_import}
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid(domain, version) for domain, version in domains.items()],
        ir_version=max(part.ir_version for part in parts),
        producer_name="portcullis",
    )
    onnx.checker.check_model(model)
    return model


def instance(
    model: onnx.ModelProto, prefix: str, names: Mapping[str, str], shared: str | None = None
) -> Sequence[NodeProto]:
    """Copy a graph's nodes with every value renamed: by ``names``, else by prefix; weights by ``shared``."""
    weights = {tensor.name for tensor in model.graph.initializer}

    def renamed(name: str) -> str:
        if not name:
            return name
        if name in weights:
            return (shared or prefix) + name
        return names.get(name, prefix + name)

    nodes = []
    for original in model.graph.node:
        node = NodeProto()
        node.CopyFrom(original)
        node.name = prefix + node.name
        node.input[:] = [renamed(name) for name in original.input]
        node.output[:] = [renamed(name) for name in original.output]
        nodes.append(node)
    return nodes


def initializers_of(model: onnx.ModelProto, prefix: str) -> Sequence[TensorProto]:
    tensors = []
    for original in model.graph.initializer:
        tensor = TensorProto()
        tensor.CopyFrom(original)
        tensor.name = prefix + tensor.name
        tensors.append(tensor)
    return tensors


def value_info(name: str, kind: int, *shape: str | int) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, list(shape))


def largest(logits: str, class_index: str) -> NodeProto:
    return helper.make_node("ArgMax", [logits], [class_index], class_index, axis=1, keepdims=0)
