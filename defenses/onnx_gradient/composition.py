"""Reverse-mode differentiation of a classifier's graph, node by node, into one graph with it."""

import onnx
import onnx.inliner
from onnx import ModelProto, TensorProto, helper

from defenses import onnx_surgery as surgery
from defenses.classifier import Classifier
from defenses.onnx_export import brought_within
from defenses.onnx_gradient.derivatives import DERIVATIVES
from defenses.onnx_gradient.errors import GradientUnsupported, ImageNotReached
from defenses.onnx_gradient.step import Step, Writer, unsupported
from defenses.onnx_gradient.values import Values, element_type
from defenses.onnx_import import BATCH, IMAGE, LOGITS
from defenses.onnx_torch.node import Node

COTANGENT, GRADIENT, ACTIVATIONS = "cotangent", "gradient", "activations"


def gradient_graph(classifier: Classifier, layer: str | None = None) -> ModelProto:
    """Write a classifier and its input gradient as one graph of forward operations, for any batch size.

    Inputs: ``image`` FP32 (N, C, H, W) in [0, 1] and ``cotangent`` FP32 (N, K). Outputs: ``logits`` FP32 (N, K) and
    ``gradient`` FP32 (N, C, H, W), that of the sum of cotangent times logits by the image. With a ``layer`` the
    cotangent is of its activations (N, ...), and so is the sum; they are the output ``activations`` FP32 besides (NIP,
    algorithm 2: 1 for a front neuron, -1 for a tail neuron). All of the classifier's nodes come before the first that
    reads the cotangent. At a kink the derivative is torch's: 0 of a ReLU at 0, the first maximum of a window.

    The opset is the classifier's, or the nearest of 18 to 21. Raises ``GradientUnsupported`` naming the nodes without
    a derivative here, ``ImageNotReached``, ``LayerNotFound``, and what the converter of opsets raises.
    """
    model = _own_copy(classifier.model)
    target = LOGITS if layer is None else classifier.resolve_layer(layer).name
    for taken in (COTANGENT, GRADIENT, ACTIVATIONS):
        free = surgery.fresh_name(model.graph, taken)
        surgery.rename(model.graph, taken, free)
        target = free if target == taken else target
    values = Values.read(model)
    nodes = values.between(IMAGE, target)
    if not nodes:
        raise ImageNotReached(target)
    _check(nodes, values)
    writer = Writer(_free_prefix(model))
    if layer is not None:
        activations = _in_type(writer, values, target, TensorProto.FLOAT)
        writer.nodes.append(helper.make_node("Identity", [activations], [ACTIVATIONS], ACTIVATIONS))
    gradient = _gradient(nodes, values, target, writer)
    writer.nodes.append(helper.make_node("Identity", [gradient], [GRADIENT], GRADIENT))
    model.graph.node.extend(writer.nodes)
    model.graph.initializer.extend(writer.constants.values())
    _declare(model, values, target, layer is not None)
    surgery.prune(model.graph)
    onnx.checker.check_model(model)
    return model


def _own_copy(model: ModelProto) -> ModelProto:
    """Return a copy without local functions, in an opset that the derivatives are written in."""
    own = ModelProto()
    own.CopyFrom(model)
    if own.functions:
        own = onnx.inliner.inline_local_functions(own)
    return brought_within(own)


def _check(nodes: list[Node], values: Values) -> None:
    """Raise ``GradientUnsupported`` for all nodes that have no derivative by an input that varies."""
    refused, read = [], {name for node in nodes for name in node.inputs}
    for node in nodes:
        derivative = DERIVATIVES.get(node.operator)
        reason = "this operator has no derivative here"
        found = reason if derivative is None else derivative.reason(node, values.varying, read)
        if found:
            refused.append(unsupported(node, found))
    if refused:
        raise GradientUnsupported(refused)


def _gradient(nodes: list[Node], values: Values, target: str, writer: Writer) -> str:
    """Write the gradient by the image; return its name."""
    parts: dict[str, list[str]] = {target: [COTANGENT]}
    if element_type(values, target) != TensorProto.FLOAT:
        parts[target] = [writer.write("Cast", COTANGENT, to=element_type(values, target))]
    for node in reversed(nodes):
        gradients = [_total(parts.pop(name, []), writer) for name in node.outputs]
        step = Step(node, gradients, values, writer)
        for place, name in enumerate(node.inputs):
            if name in values.varying:
                parts.setdefault(name, []).append(DERIVATIVES[node.operator].write(step, place))
    gradient = _total(parts[IMAGE], writer)
    assert gradient is not None
    return gradient


def _total(parts: list[str], writer: Writer) -> str | None:
    """Add up the gradients that come back to one value; None where there are none."""
    if not parts:
        return None
    return parts[0] if len(parts) == 1 else writer.write("Sum", *parts)


def _in_type(writer: Writer, values: Values, name: str, wanted: int) -> str:
    return name if element_type(values, name) == wanted else writer.write("Cast", name, to=wanted)


def _free_prefix(model: ModelProto) -> str:
    """Return a beginning that no name of the graph has."""
    taken = [name for node in model.graph.node for name in (node.name, *node.input, *node.output)]
    taken += [tensor.name for tensor in model.graph.initializer]
    prefix = GRADIENT
    while any(name.startswith(f"{prefix}/") for name in taken):
        prefix += "_"
    return f"{prefix}/"


def _declare(model: ModelProto, values: Values, target: str, inner: bool) -> None:
    graph = model.graph
    shape: list[str | int | None] = [BATCH, *(size for size in values.shapes[target][1:] if size is not None)]
    image: list[str | int | None] = [BATCH, *(size for size in values.shapes[IMAGE][1:] if size is not None)]
    graph.input.append(helper.make_tensor_value_info(COTANGENT, TensorProto.FLOAT, shape))
    if inner:
        graph.output.append(helper.make_tensor_value_info(ACTIVATIONS, TensorProto.FLOAT, shape))
    graph.output.append(helper.make_tensor_value_info(GRADIENT, TensorProto.FLOAT, image))
