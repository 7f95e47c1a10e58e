"""The correction of alerted images as a second ONNX graph."""

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import onnx
import torch
from onnx import NodeProto, TensorProto, helper
from torch import Tensor, nn

from defenses.classifier import Classifier
from defenses.nip.correction import InverseCorrection
from defenses.nip.push import unit
from defenses.onnx_composition import initializers_of, instance, value_info, wrapped
from defenses.onnx_export import ExportBroken
from defenses.onnx_gradient import ACTIVATIONS, COTANGENT, GRADIENT, gradient_graph
from defenses.onnx_import import IMAGE, LOGITS
from defenses.onnx_parity import session
from defenses.onnx_torch.graph import default_opset
from defenses.onnx_trace import export_module

TOLERANCE = 1e-2
"""How far a graph's logits may be from torch's, over the largest: a ReLU near its kink may turn the gradient."""

START: Mapping[str, str] = MappingProxyType(
    {IMAGE: "start", LOGITS: "start_logits", **{name: name for name in (ACTIVATIONS, COTANGENT, GRADIENT)}}
)
"""What the ends of the classifier's and its gradient's graph are called in the pass over the noisy images."""


def export_correction(corrector: InverseCorrection, classifier: Classifier) -> onnx.ModelProto:
    """Compose the graph that corrects alerted images.

    Inputs: ``purified`` FP32 (M, C, H, W) in [0, 1] and ``undefended_logits`` FP32 (M, K), and as an initializer that a
    caller may override ``noise_scale``, 1 by default. Outputs: ``logits`` FP32 (M, K) and ``corrected`` (M, C, H, W).
    The classifier stands in it twice and its derivative once, as forward operations; they share its weights. Raises
    ``PurifierNotExportable``, ``GradientUnsupported``, ``ImageNotReached`` and ``ExportFailed``.
    """
    corrector.check_exportable()
    differentiated = gradient_graph(classifier, corrector.config.layer)
    forward, backward = _halves(differentiated)
    opset = default_opset(differentiated)
    image = torch.rand(2, *classifier.image_shape)
    with torch.no_grad():
        logits, activations = classifier.logits_and_features(image, corrector.config.layer)
    activations, logits = activations.clone(), logits.clone()
    parts = {
        "start/": export_module(_Start(corrector), {"purified": image, "noise_scale": torch.ones(())}, "start", opset),
        "neurons/": export_module(
            _Neurons(corrector),
            {ACTIVATIONS: activations, "start_logits": logits, "undefended_logits": logits + 1},
            COTANGENT,
            opset,
        ),
        "moved/": export_module(_Moved(corrector), {"start": image, GRADIENT: image - 0.5}, "corrected", opset),
    }
    names = {name: name for name in (*START.values(), "purified", "noise_scale", "undefended_logits", "corrected")}
    nodes = [
        *instance(parts["start/"], "start/", names),
        *instance(forward, "noisy/", START, shared="classifier/"),
        *instance(parts["neurons/"], "neurons/", names),
        *instance(backward, "noisy/", START, shared="classifier/"),
        *instance(parts["moved/"], "moved/", names),
        *instance(_without(forward, ACTIVATIONS), "corrected/", _CORRECTED, shared="classifier/"),
    ]
    initializers = [
        *initializers_of(differentiated, "classifier/"),
        *(tensor for prefix, part in parts.items() for tensor in initializers_of(part, prefix)),
        helper.make_tensor("noise_scale", TensorProto.FLOAT, [], [1.0]),
    ]
    shape, classes = classifier.image_shape, classifier.classes
    graph = helper.make_graph(
        nodes,
        "correction",
        [
            value_info("purified", TensorProto.FLOAT, "N", *shape),
            value_info("undefended_logits", TensorProto.FLOAT, "N", classes),
            value_info("noise_scale", TensorProto.FLOAT),
        ],
        [
            value_info("logits", TensorProto.FLOAT, "N", classes),
            value_info("corrected", TensorProto.FLOAT, "N", *shape),
        ],
        initializers,
    )
    return wrapped(graph, (differentiated, *parts.values()))


_CORRECTED: Mapping[str, str] = MappingProxyType({IMAGE: "corrected", LOGITS: "logits"})


@torch.no_grad()
def check_correction(
    model: onnx.ModelProto, corrector: InverseCorrection, purified: Tensor, undefended_logits: Tensor
) -> float:
    """Compare the graph on ONNX Runtime with torch, noise off; return the largest difference that counts.

    That of logits is relative to the larger of 1 and the largest one. A ReLU near its kink, or two neurons of nearly
    the same influence, may turn a direction by rounding: more than half of the images have to agree. Raises
    ``ExportBroken``.
    """
    wanted = corrector(purified, undefended_logits, torch.zeros(()))
    feeds = {
        "purified": purified.numpy(),
        "undefended_logits": undefended_logits.numpy(),
        "noise_scale": np.zeros((), np.float32),
    }
    logits, corrected = map(torch.from_numpy, session(model).run(["logits", "corrected"], feeds))
    each = (logits - wanted.logits).abs().amax(1) / max(1.0, float(wanted.logits.abs().max()))
    each = each.maximum((corrected - wanted.purified).abs().flatten(1).amax(1))
    agreeing = each <= TOLERANCE
    if 2 * int(agreeing.sum()) <= len(each):
        raise ExportBroken("corrected logits", float(each.median()), TOLERANCE)
    return float(each[agreeing].max())


class _Start(nn.Module):
    def __init__(self, corrector: InverseCorrection) -> None:
        super().__init__()
        self._corrector = corrector

    def forward(self, purified: Tensor, noise_scale: Tensor) -> Tensor:
        return self._corrector.start(purified, noise_scale)


class _Neurons(nn.Module):
    def __init__(self, corrector: InverseCorrection) -> None:
        super().__init__()
        self._corrector = corrector

    def forward(self, activations: Tensor, logits: Tensor, undefended_logits: Tensor) -> Tensor:
        return self._corrector.neuron_weights(activations, activations, logits, undefended_logits)


class _Moved(nn.Module):
    def __init__(self, corrector: InverseCorrection) -> None:
        super().__init__()
        self._corrector = corrector

    def forward(self, start: Tensor, gradient: Tensor) -> Tensor:
        return self._corrector.moved(start, unit(gradient))


def _halves(model: onnx.ModelProto) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """Split a gradient's graph where the cotangent is first read."""
    place = next(place for place, node in enumerate(model.graph.node) if COTANGENT in node.input)
    return _with_nodes(model, list(model.graph.node[:place])), _with_nodes(model, list(model.graph.node[place:]))


def _without(model: onnx.ModelProto, output: str) -> onnx.ModelProto:
    return _with_nodes(model, [node for node in model.graph.node if output not in node.output])


def _with_nodes(model: onnx.ModelProto, nodes: list[NodeProto]) -> onnx.ModelProto:
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    del copied.graph.node[:]
    copied.graph.node.extend(nodes)
    return copied
