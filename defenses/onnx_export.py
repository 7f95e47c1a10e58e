"""The protected classifier as one ONNX graph: the classifier's own graph twice, the fitted parts around it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal, Self

import numpy as np
import onnx
import onnx.version_converter
import torch
from onnx import NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper
from torch import Tensor

from defenses.detector import Evidence, NoDetector
from defenses.onnx_parity import session
from defenses.onnx_torch.graph import default_opset
from defenses.onnx_trace import OLDEST_WRITTEN, export_module
from defenses.protected import ProtectedClassifier

NEWEST_WITH_NOISE = 21
"""The newest opset in which ONNX Runtime draws random numbers on the CPU."""

EXTERNAL_DATA_BYTES = 2**30

RAW: Mapping[str, str] = MappingProxyType({"image": "image", "logits": "undefended_logits"})
PURIFIED: Mapping[str, str] = MappingProxyType({"image": "purified", "logits": "logits"})
"""What the ends of the classifier's graph are called in its two passes; all between has the pass's name before it."""


def export_protected(protected: ProtectedClassifier) -> onnx.ModelProto:
    """Compose the graph of a protected classifier.

    Input ``image``: FP32 (N, C, H, W) in [0, 1]. Outputs: ``logits`` FP32 (N, K), ``class_index`` INT64 (N,),
    ``score`` FP32 (N,), ``alert`` BOOL (N,), ``undefended_logits``, ``undefended_class_index`` and ``purified``; no
    ``score`` and no ``alert`` where there is no detector. ``noise_scale`` is an initializer that a caller may override,
    1 by default; 0 switches all noise off. The classifier's nodes stand in the graph twice, on the raw and on the
    purified image, and share their weights. Raises ``PurifierNotExportable`` and ``ExportFailed``.
    """
    purifier, classifier = protected.purifier, protected.classifier
    purifier.check_exportable()
    shape = classifier.image_shape
    classifier_graph = brought_within(classifier.model)
    opset = default_opset(classifier_graph)
    image, noise = torch.rand(2, *shape), torch.ones(())
    inputs = {"image": image, "noise_scale": noise}
    seen = {name: name for name in (*inputs, "purified")}
    if purifier.layer is not None:
        with torch.no_grad():
            shown = protected.raw_pass(image)
        inputs |= {"activations": shown.activations[purifier.layer].clone(), "undefended_logits": shown.logits}
        seen |= {"activations": _tap(protected, purifier.layer, "raw"), "undefended_logits": "undefended_logits"}
    purifier_graph = export_module(purifier, inputs, "purified", opset)
    purifying = _instance(purifier_graph, "purifier/", seen)
    raw = _instance(classifier_graph, "raw/", RAW, shared="classifier/")
    detecting = _Detecting.export(protected, image, opset)
    nodes = [
        *([*purifying, *raw] if purifier.layer is None else [*raw, *purifying]),
        *_instance(classifier_graph, "purified/", PURIFIED, shared="classifier/"),
        *detecting.before,
        _largest("logits", "class_index"),
        _largest("undefended_logits", "undefended_class_index"),
        *detecting.after,
    ]
    initializers = [
        *_initializers(purifier_graph, "purifier/"),
        *_initializers(classifier_graph, "classifier/"),
        *detecting.initializers,
        helper.make_tensor("noise_scale", TensorProto.FLOAT, [], [1.0]),
    ]
    graph_inputs = [_value("image", TensorProto.FLOAT, "N", *shape), _value("noise_scale", TensorProto.FLOAT)]
    outputs = _outputs(classifier.classes, shape, detected=bool(detecting.graphs))
    graph = helper.make_graph(nodes, "protected", graph_inputs, outputs, initializers)
    return _model(graph, (purifier_graph, classifier_graph, *detecting.graphs))


@dataclass(frozen=True)
class _Detecting:
    """What a detector adds to the graph; nothing where there is none."""

    graphs: Sequence[onnx.ModelProto] = ()
    before: Sequence[NodeProto] = ()
    after: Sequence[NodeProto] = ()
    initializers: Sequence[TensorProto] = ()

    @classmethod
    def export(cls, protected: ProtectedClassifier, image: Tensor, opset: int) -> Self:
        detector = protected.detector
        if isinstance(detector, NoDetector):
            return cls()
        with torch.no_grad():
            seen = protected.evidence(image)
        evidence = Evidence(seen.activations, seen.logits, seen.logits + 1, torch.ones(2))
        graph = export_module(detector, evidence._asdict(), "score", opset)
        names = {name: name for name in ("logits", "undefended_logits", "distance", "score")}
        if detector.layer is not None:
            names["activations"] = _tap(protected, detector.layer, detector.inspects)
        return cls(
            [graph],
            [*_distance(), *_instance(graph, "detector/", names)],
            _alert(protected.threshold.ndim),
            [
                *_initializers(graph, "detector/"),
                numpy_helper.from_array(protected.threshold.numpy(), "threshold"),
                helper.make_tensor("columns", TensorProto.INT64, [1], [1]),
            ],
        )


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
    of 1 and its own largest value; scores only where there is a detector. Torch is given what the graph made of the
    stage before: the raw pass, the purified image. A purifier that is shown activations may choose by them, and two
    choices that are equally near may come out either way by rounding: of its images more than half have to agree, and
    the others are compared from their purified form on. Raises ``ExportBroken`` above ``tolerance``.
    """
    values = _run(model, protected, x)
    raw, layer = protected.raw_pass(x), protected.purifier.layer
    most = [_difference("undefended_logits", values["undefended_logits"], raw.logits, tolerance)]
    shown: tuple[Tensor, ...] = ()
    if layer is not None:
        shown = (values[_tap(protected, layer, "raw")], values["undefended_logits"])
        most.append(_difference(f"value of {layer}", shown[0], raw.activations[layer], tolerance))
    purified: Tensor = protected.purifier(x, torch.zeros(()), *shown)
    output = protected.answer(x, values["purified"], raw)
    most += [
        _difference("purified", values["purified"], purified, tolerance, chosen=layer is not None),
        _difference("logits", values["logits"], output.logits, tolerance),
    ]
    if "score" in values:
        most.append(_difference("score", values["score"], output.scores, tolerance))
    return max(most)


def _run(model: onnx.ModelProto, protected: ProtectedClassifier, x: Tensor) -> dict[str, Tensor]:
    """Return what the graph makes of images, noise off, and the activations that it shows its purifier."""
    names = ["logits", "purified", "undefended_logits"]
    if not isinstance(protected.detector, NoDetector):
        names.append("score")
    if protected.purifier.layer is not None:
        tap = _tap(protected, protected.purifier.layer, "raw")
        if tap not in names:
            model, own = onnx.ModelProto(), model
            model.CopyFrom(own)
            model.graph.output.append(helper.make_empty_tensor_value_info(tap))
            names.append(tap)
    values = session(model).run(names, {"image": x.numpy(), "noise_scale": np.zeros((), np.float32)})
    return {name: torch.from_numpy(value) for name, value in zip(names, values, strict=True)}


def _difference(name: str, value: Tensor, wanted: Tensor, tolerance: float, *, chosen: bool = False) -> float:
    """Return the largest difference over the images, or with ``chosen`` over those more than half that agree."""
    scale = max(1.0, float(wanted.abs().max()))
    each = (value - wanted).abs().reshape(len(wanted), -1).amax(1) / scale
    agreeing = each <= tolerance
    if not (2 * int(agreeing.sum()) > len(each) if chosen else agreeing.all()):
        raise ExportBroken(name, float(each.max()), tolerance)
    return float(each[agreeing].max())


def save_graph(model: onnx.ModelProto, path: Path) -> None:
    """Write a graph to ``path``; weights above 1 GiB go to a ``.data`` file beside it."""
    external = model.ByteSize() > EXTERNAL_DATA_BYTES
    onnx.save_model(model, path, save_as_external_data=external, location=f"{path.name}.data" if external else None)


def _outputs(classes: int, shape: tuple[int, int, int], *, detected: bool) -> list[ValueInfoProto]:
    scored = [_value("score", TensorProto.FLOAT, "N"), _value("alert", TensorProto.BOOL, "N")]
    return [
        _value("logits", TensorProto.FLOAT, "N", classes),
        _value("class_index", TensorProto.INT64, "N"),
        *(scored if detected else []),
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


def _tap(protected: ProtectedClassifier, layer: str, seen_pass: Literal["raw", "purified"]) -> str:
    """Return what a layer's value is called in one pass of the classifier."""
    name = protected.classifier.resolve_layer(layer).name
    return (RAW if seen_pass == "raw" else PURIFIED).get(name, f"{seen_pass}/{name}")


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


def brought_within(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a classifier's graph in an opset that parts can be written in and the noise be run in."""
    opset = min(max(default_opset(model), OLDEST_WRITTEN), NEWEST_WITH_NOISE)
    return model if opset == default_opset(model) else onnx.version_converter.convert_version(model, opset)


def _instance(
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
