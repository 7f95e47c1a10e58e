"""The protected classifier as one ONNX graph: the classifier's own graph twice, the fitted parts around it."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx.version_converter
import torch
from onnx import NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper
from torch import Tensor

from defenses.detector import Evidence
from defenses.onnx_parity import session
from defenses.onnx_trace import OLDEST_WRITTEN, export_module
from defenses.protected import ProtectedClassifier

NEWEST_WITH_NOISE = 21
"""The newest opset in which ONNX Runtime draws random numbers on the CPU."""

EXTERNAL_DATA_BYTES = 2**30


def export_protected(protected: ProtectedClassifier) -> onnx.ModelProto:
    """Compose the graph of a protected classifier.

    Input ``image``: FP32 (N, C, H, W) in [0, 1]. Outputs: ``logits`` FP32 (N, K), ``class_index`` INT64 (N,),
    ``score`` FP32 (N,), ``alert`` BOOL (N,), ``undefended_logits``, ``undefended_class_index`` and ``purified``.
    ``noise_scale`` is an initializer that a caller may override, 1 by default; 0 switches all noise off. The
    classifier's nodes stand in the graph twice, on the raw and on the purified image, and share their weights.
    """
    detector, shape, classes = protected.detector, protected.classifier.image_shape, protected.classifier.classes
    classifier_graph = _brought_within(protected.classifier.model)
    opset = _opset(classifier_graph)
    image, noise = torch.rand(2, *shape), torch.ones(())
    with torch.no_grad():
        logits, activations = protected.classifier.logits_and_features(image, detector.layer)
    purifier_graph = export_module(protected.purifier, {"image": image, "noise_scale": noise}, "purified", opset)
    evidence = Evidence(activations, logits, logits + 1, torch.ones(2))._asdict()
    detector_graph = export_module(detector, evidence, "score", opset)

    raw, purified = {"image": "image", "logits": "undefended_logits"}, {"image": "purified", "logits": "logits"}
    layer = protected.classifier.resolve_layer(detector.layer).name
    seen = {name: name for name in ("logits", "undefended_logits", "distance", "score")}
    tap = (raw if detector.inspects == "raw" else purified).get(layer, f"{detector.inspects}/{layer}")
    nodes = [
        *_instance(purifier_graph, "purifier/", {name: name for name in ("image", "noise_scale", "purified")}),
        *_instance(classifier_graph, "raw/", raw, shared="classifier/"),
        *_instance(classifier_graph, "purified/", purified, shared="classifier/"),
        *_distance(),
        *_instance(detector_graph, "detector/", {**seen, "activations": tap}),
        _largest("logits", "class_index"),
        _largest("undefended_logits", "undefended_class_index"),
        *_alert(protected.threshold.ndim),
    ]
    initializers = [
        *_initializers(purifier_graph, "purifier/"),
        *_initializers(classifier_graph, "classifier/"),
        *_initializers(detector_graph, "detector/"),
        numpy_helper.from_array(protected.threshold.numpy(), "threshold"),
        helper.make_tensor("columns", TensorProto.INT64, [1], [1]),
        helper.make_tensor("noise_scale", TensorProto.FLOAT, [], [1.0]),
    ]
    inputs = [_value("image", TensorProto.FLOAT, "N", *shape), _value("noise_scale", TensorProto.FLOAT)]
    graph = helper.make_graph(nodes, "protected", inputs, _outputs(classes, shape), initializers)
    return _model(graph, (purifier_graph, classifier_graph, detector_graph))


class ExportBroken(ValueError):
    """An exported graph does not compute what the fitted modules compute."""

    def __init__(self, output: str, difference: float, tolerance: float) -> None:
        self.output = output
        self.difference = difference
        super().__init__(
            f"The exported graph's {output} differs from torch's by {difference:.3g}; expected at most {tolerance:.3g}."
        )


@torch.no_grad()
def check_export(model: onnx.ModelProto, protected: ProtectedClassifier, x: Tensor, tolerance: float = 1e-3) -> float:
    """Compare the graph on ONNX Runtime with torch, noise off, on images (N, C, H, W) in [0, 1].

    Returns the largest difference among logits, scores, purified image and bare logits, each relative to the larger
    of 1 and its own largest value. Raises ``ExportBroken`` above ``tolerance``.
    """
    names = ["logits", "score", "purified", "undefended_logits"]
    values = session(model).run(names, {"image": x.numpy(), "noise_scale": np.zeros((), np.float32)})
    output = protected(x, torch.zeros(()))
    expected = [output.logits, output.scores, output.purified, output.undefended_logits]
    worst = 0.0
    for name, value, wanted in zip(names, values, expected, strict=True):
        scale = max(1.0, float(wanted.abs().max()))
        difference = float((torch.from_numpy(value) - wanted).abs().max()) / scale
        if not difference <= tolerance:
            raise ExportBroken(name, difference, tolerance)
        worst = max(worst, difference)
    return worst


def save_graph(model: onnx.ModelProto, path: Path) -> None:
    """Write a graph to ``path``; weights above 1 GiB go to a ``.data`` file beside it."""
    external = model.ByteSize() > EXTERNAL_DATA_BYTES
    onnx.save_model(model, path, save_as_external_data=external, location=f"{path.name}.data" if external else None)


def _outputs(classes: int, shape: tuple[int, int, int]) -> list[ValueInfoProto]:
    return [
        _value("logits", TensorProto.FLOAT, "N", classes),
        _value("class_index", TensorProto.INT64, "N"),
        _value("score", TensorProto.FLOAT, "N"),
        _value("alert", TensorProto.BOOL, "N"),
        _value("undefended_logits", TensorProto.FLOAT, "N", classes),
        _value("undefended_class_index", TensorProto.INT64, "N"),
        _value("purified", TensorProto.FLOAT, "N", *shape),
    ]


def _model(graph: onnx.GraphProto, parts: Sequence[onnx.ModelProto]) -> onnx.ModelProto:
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


def _largest(logits: str, class_index: str) -> NodeProto:
    return helper.make_node("ArgMax", [logits], [class_index], class_index, axis=1, keepdims=0)


def _distance() -> list[NodeProto]:
    """Return the nodes of the L2 distance between image and purified image."""
    return [
        helper.make_node("Sub", ["purified", "image"], ["difference"], "difference"),
        helper.make_node("Flatten", ["difference"], ["flat_difference"], "flat_difference"),
        helper.make_node("ReduceL2", ["flat_difference", "columns"], ["distance"], "distance", keepdims=0),
    ]


def _alert(dimensions: int) -> list[NodeProto]:
    """Return the nodes that compare the score with the threshold, be it one or one for each class."""
    if not dimensions:
        return [helper.make_node("Greater", ["score", "threshold"], ["alert"], "alert")]
    return [
        helper.make_node("Gather", ["threshold", "class_index"], ["own_threshold"], "own_threshold"),
        helper.make_node("Greater", ["score", "own_threshold"], ["alert"], "alert"),
    ]


def _brought_within(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a classifier's graph in an opset that the noise can be written and run in."""
    opset = min(max(_opset(model), OLDEST_WRITTEN), NEWEST_WITH_NOISE)
    return model if opset == _opset(model) else onnx.version_converter.convert_version(model, opset)


def _opset(model: onnx.ModelProto) -> int:
    version: int = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    return version


def _instance(
    model: onnx.ModelProto, prefix: str, names: dict[str, str], shared: str | None = None
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


def _initializers(model: onnx.ModelProto, prefix: str) -> Sequence[TensorProto]:
    tensors = []
    for original in model.graph.initializer:
        tensor = TensorProto()
        tensor.CopyFrom(original)
        tensor.name = prefix + tensor.name
        tensors.append(tensor)
    return tensors


def _value(name: str, kind: int, *shape: str | int) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, list(shape))
