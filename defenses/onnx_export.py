"""The protected classifier as one ONNX graph: the classifier's own graph twice, the fitted parts around it."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
import onnx
import onnx.version_converter
import torch
from onnx import TensorProto, ValueInfoProto, helper
from torch import Tensor

from defenses.detector import NoDetector
from defenses.judge import PurifiedAnswer
from defenses.onnx_composition import initializers_of, instance, largest, value_info, wrapped
from defenses.onnx_detection import JUDGED, RAW, Detecting, ends_of, tap_of
from defenses.onnx_parity import session
from defenses.onnx_torch.graph import default_opset
from defenses.onnx_trace import OLDEST_WRITTEN, export_module
from defenses.protected import ProtectedClassifier

NEWEST_WITH_NOISE = 21
"""The newest opset in which ONNX Runtime draws random numbers on the CPU."""

EXTERNAL_DATA_BYTES = 2**30


def export_protected(protected: ProtectedClassifier) -> onnx.ModelProto:
    """Compose the graph of a protected classifier.

    Input ``image``: FP32 (N, C, H, W) in [0, 1]. Outputs: ``logits`` FP32 (N, K), ``class_index`` INT64 (N,),
    ``score`` FP32 (N,), ``alert`` BOOL (N,), ``undefended_logits``, ``undefended_class_index`` and ``purified``; no
    ``score`` and no ``alert`` where there is no detector. A corrector is no part of it. ``noise_scale`` is an
    initializer that a caller may override, 1 by default; 0 switches all noise off. The classifier's nodes stand in the
    graph twice, on the raw and on the purified image, and share their weights. Raises ``PurifierNotExportable`` and
    ``ExportFailed``.
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
        seen |= {"activations": tap_of(protected, purifier.layer, "raw"), "undefended_logits": "undefended_logits"}
    purifier_graph = export_module(purifier, inputs, "purified", opset)
    purifying = instance(purifier_graph, "purifier/", seen)
    raw = instance(classifier_graph, "raw/", RAW, shared="classifier/")
    ends = ends_of(protected)
    detecting = Detecting.export(protected, classifier_graph, image, opset)
    judging = _judging(protected, opset)
    nodes = [
        *([*purifying, *raw] if purifier.layer is None else [*raw, *purifying]),
        *instance(classifier_graph, "purified/", ends, shared="classifier/"),
        *detecting.before,
        *(detecting.after if judging else []),
        *(instance(judging, "judge/", _JUDGE) if judging else []),
        largest("logits", "class_index"),
        largest("undefended_logits", "undefended_class_index"),
        *([] if judging else detecting.after),
    ]
    initializers = [
        *initializers_of(purifier_graph, "purifier/"),
        *initializers_of(classifier_graph, "classifier/"),
        *(initializers_of(judging, "judge/") if judging else []),
        *detecting.initializers,
        helper.make_tensor("noise_scale", TensorProto.FLOAT, [], [1.0]),
    ]
    graph_inputs = [value_info("image", TensorProto.FLOAT, "N", *shape), value_info("noise_scale", TensorProto.FLOAT)]
    outputs = _outputs(classifier.classes, shape, detected=bool(detecting.graphs))
    graph = helper.make_graph(nodes, "protected", graph_inputs, outputs, initializers)
    return wrapped(graph, (purifier_graph, classifier_graph, *detecting.graphs, *([judging] if judging else [])))


_JUDGE: Mapping[str, str] = MappingProxyType(
    {name: name for name in ("undefended_logits", "purified_logits", "alert", "logits")}
)


def _judging(protected: ProtectedClassifier, opset: int) -> onnx.ModelProto | None:
    """Return the judge's graph, None where the purified image's logits are answered as they are."""
    if isinstance(protected.judge, PurifiedAnswer):
        return None
    logits = torch.rand(2, protected.classifier.classes)
    inputs = {"undefended_logits": logits, "purified_logits": logits + 1, "alert": torch.tensor([False, True])}
    return export_module(protected.judge, inputs, "logits", opset)


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
    stage before: the raw pass, the purified image. A purifier that is shown activations may choose by them, and a judge
    chooses, and two choices that are equally near may come out either way by rounding: of such images more than half
    have to agree, and the others are compared from their purified form on. Raises ``ExportBroken`` above ``tolerance``.
    """
    values = _run(model, protected, x)
    raw, layer = protected.raw_pass(x), protected.purifier.layer
    most = [_difference("undefended_logits", values["undefended_logits"], raw.logits, tolerance)]
    shown: tuple[Tensor, ...] = ()
    if layer is not None:
        shown = (values[tap_of(protected, layer, "raw")], values["undefended_logits"])
        most.append(_difference(f"value of {layer}", shown[0], raw.activations[layer], tolerance))
    purified: Tensor = protected.purifier(x, torch.zeros(()), *shown)
    output = protected.answer(x, values["purified"], raw)
    most += [
        _difference("purified", values["purified"], purified, tolerance, chosen=layer is not None),
        _difference("logits", values["logits"], output.logits, tolerance, chosen=ends_of(protected) is JUDGED),
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
        tap = tap_of(protected, protected.purifier.layer, "raw")
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
    scored = [value_info("score", TensorProto.FLOAT, "N"), value_info("alert", TensorProto.BOOL, "N")]
    return [
        value_info("logits", TensorProto.FLOAT, "N", classes),
        value_info("class_index", TensorProto.INT64, "N"),
        *(scored if detected else []),
        value_info("undefended_logits", TensorProto.FLOAT, "N", classes),
        value_info("undefended_class_index", TensorProto.INT64, "N"),
        value_info("purified", TensorProto.FLOAT, "N", *shape),
    ]


def brought_within(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a classifier's graph in an opset that parts can be written in and the noise be run in."""
    opset = min(max(default_opset(model), OLDEST_WRITTEN), NEWEST_WITH_NOISE)
    return model if opset == default_opset(model) else onnx.version_converter.convert_version(model, opset)
