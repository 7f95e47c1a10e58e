"""A graph read for torch: nodes in order, constants computed once, and what belongs on the CPU."""

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import onnx
import onnx.inliner
import torch
from onnx import ModelProto, NodeProto, TensorProto
from torch import Tensor

from defenses.onnx_torch.errors import GraphInvalid, OperatorUnsupported, Unsupported
from defenses.onnx_torch.node import Node, Result, to_torch
from defenses.onnx_torch.operators import OPERATORS

OLDEST_OPSET = 7
NEWEST_OPSET = 26
DEFAULT_DOMAINS = ("", "ai.onnx")
CONSTANT_FORMS = frozenset(("value", "value_float", "value_floats", "value_int", "value_ints"))
SHAPE_READERS = ("Shape", "Size")


@dataclass(frozen=True)
class Graph:
    """A graph whose nodes depend on its input; ``constants`` are on the CPU, equal ones are one tensor.

    ``content`` are the values that depend on the input's elements, in order of computation. ``host_values`` are shapes,
    axes and counts, and whatever they are computed from: they stay on the CPU.
    """

    input: str
    outputs: tuple[str, ...]
    nodes: tuple[Node, ...]
    constants: Mapping[str, Tensor]
    content: tuple[str, ...]
    host_values: frozenset[str]


def read_graph(model: ModelProto) -> Graph:
    """Read a model of opset 7 to 26, its local functions inlined, nodes that no output needs left out.

    Raises ``GraphInvalid`` when it has not exactly one input or its weights were not loaded, and
    ``OperatorUnsupported`` naming every node that cannot run.
    """
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    opsets |= dict.fromkeys(DEFAULT_DOMAINS, default_opset(model))
    names = {tensor.name for tensor in model.graph.initializer}
    inputs = [value.name for value in model.graph.input if value.name not in names]
    if len(inputs) != 1:
        raise GraphInvalid(f"Expected a graph with one input, got {len(inputs)}: {', '.join(inputs) or 'none'}.")
    outputs = tuple(value.name for value in model.graph.output)
    protos = _needed(model.graph.node, outputs)
    constants = _initializers(model, {name for proto in protos for name in proto.input} | set(outputs))
    nodes = _fold(_read_nodes(protos, opsets, constants), constants)
    used = {name for node in nodes for name in node.inputs} | set(outputs)
    kept = {name: tensor for name, tensor in constants.items() if name in used}
    content = _content(inputs[0], nodes)
    return Graph(inputs[0], outputs, nodes, _deduplicate(kept), tuple(content)[1:], _host_values(nodes, content))


def default_opset(model: ModelProto) -> int:
    """Return the version of the default domain; raises ``GraphInvalid`` outside 7 to 26."""
    opset = max((entry.version for entry in model.opset_import if entry.domain in DEFAULT_DOMAINS), default=0)
    if not OLDEST_OPSET <= opset <= NEWEST_OPSET:
        raise GraphInvalid(f"Expected a graph of opset {OLDEST_OPSET} to {NEWEST_OPSET}, got opset {opset}.")
    return opset


def call(node: Node, inputs: Sequence[Tensor | None]) -> Sequence[Tensor]:
    """Run one node on its inputs, absent ones being None."""
    try:
        result: Result = OPERATORS[node.operator].run(node, *inputs)
    except Exception as error:
        error.add_note(f"in node {node.name!r} ({node.operator}, opset {node.opset})")
        raise
    return (result,) if isinstance(result, Tensor) else result


def _needed(nodes: Sequence[NodeProto], outputs: Iterable[str]) -> list[NodeProto]:
    wanted, kept = set(outputs), list[NodeProto]()
    for node in reversed(nodes):
        if wanted.intersection(node.output):
            wanted.update(node.input)
            kept.append(node)
    return kept[::-1]


def _initializers(model: ModelProto, used: Collection[str]) -> dict[str, Tensor]:
    constants = {}
    for tensor in model.graph.initializer:
        if tensor.name not in used:
            continue
        if tensor.data_location == TensorProto.EXTERNAL:
            raise GraphInvalid(
                f"The weights {tensor.name!r} are in another file; read it with onnx.load(path), which reads both."
            )
        constants[tensor.name] = to_torch(tensor)
    return constants


def _read_nodes(protos: Sequence[NodeProto], opsets: Mapping[str, int], constants: dict[str, Tensor]) -> list[Node]:
    """Read the nodes; those of operator Constant go to ``constants``."""
    nodes, refused = [], []
    for proto in protos:
        opset = opsets.get(proto.domain, 1)
        node = _read_node(proto, opset)
        if isinstance(node, str):
            domain = proto.domain or DEFAULT_DOMAINS[1]
            refused.append(Unsupported(proto.op_type, domain, opset, proto.name or proto.output[0], node))
        elif node.operator == "Constant":
            constants[node.outputs[0]] = _constant(node)
        else:
            nodes.append(node)
    if refused:
        raise OperatorUnsupported(refused)
    return nodes


def _read_node(proto: NodeProto, opset: int) -> Node | str:
    """Return the node, or the reason why it cannot run."""
    if proto.domain not in DEFAULT_DOMAINS:
        return "operators of this domain are not supported"
    if proto.op_type not in (*OPERATORS, "Constant"):
        return "this operator is not supported"
    try:
        node = Node.read(proto, opset)
    except TypeError as error:
        return str(error)
    if node.operator == "Constant":
        return node if CONSTANT_FORMS.issuperset(node.attributes) else "constants of this form are not supported"
    operator = OPERATORS[node.operator]
    if opset < operator.since:
        return f"its meaning before opset {operator.since} is not supported"
    return (operator.refuse(node) if operator.refuse else None) or node


def _constant(node: Node) -> Tensor:
    ((kind, value),) = node.attributes.items()
    if isinstance(value, Tensor):
        return value
    return torch.tensor(value, dtype=torch.float32 if "float" in kind else torch.int64)


def _fold(nodes: Sequence[Node], constants: dict[str, Tensor]) -> tuple[Node, ...]:
    """Compute the nodes that read constants alone, into ``constants``; return the others."""
    rest = []
    with torch.no_grad():
        for node in nodes:
            if all(not name or name in constants for name in node.inputs):
                results = call(node, [constants.get(name) for name in node.inputs])
                constants.update((name, result) for name, result in zip(node.outputs, results, strict=False) if name)
            else:
                rest.append(node)
    return tuple(rest)


def _deduplicate(constants: Mapping[str, Tensor]) -> dict[str, Tensor]:
    distinct: dict[tuple[object, ...], Tensor] = {}
    merged = {}
    for name, tensor in constants.items():
        content = hashlib.sha256(tensor.contiguous().numpy().tobytes()).digest()
        merged[name] = distinct.setdefault((tensor.dtype, tuple(tensor.shape), content), tensor)
    return merged


def _content(image: str, nodes: Sequence[Node]) -> dict[str, None]:
    """Return the image and the values that depend on more of it than its shape, in order of computation."""
    content = {image: None}
    for node in nodes:
        if node.operator not in SHAPE_READERS and any(name in content for name in node.inputs):
            content.update((name, None) for name in node.outputs if name)
    return content


def _host_values(nodes: Sequence[Node], content: Collection[str]) -> frozenset[str]:
    """Return what shapes, axes and counts are computed from, going back to Shape nodes and constants.

    What depends on the content of the image is left out: it would drag the whole computation to the CPU.
    """
    host: set[str] = set()
    for node in reversed(nodes):
        if node.operator in SHAPE_READERS:
            host.update(node.outputs)
            continue
        on_host = bool(host.intersection(node.outputs)) and not any(name in content for name in node.outputs)
        places = range(len(node.inputs)) if on_host else OPERATORS[node.operator].host
        read = (node.inputs[place] for place in places if place < len(node.inputs))
        host.update(name for name in read if name and name not in content)
    return frozenset(host)
