"""What a detector adds to the graph of a protected classifier."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Self

import numpy as np
import onnx
import torch
from onnx import NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor, nn

from defenses.detector import Detector, Evidence, Inspected, NoDetector
from defenses.judge import PurifiedAnswer
from defenses.onnx_composition import initializers_of, instance
from defenses.onnx_trace import export_module
from defenses.protected import ProtectedClassifier

RAW: Mapping[str, str] = MappingProxyType({"image": "image", "logits": "undefended_logits"})
PURIFIED: Mapping[str, str] = MappingProxyType({"image": "purified", "logits": "logits"})
JUDGED: Mapping[str, str] = MappingProxyType({"image": "purified", "logits": "purified_logits"})
VIEWS: Mapping[str, str] = MappingProxyType({"image": "view_images", "logits": "view_logits"})
"""What the ends of the classifier's graph are called in its passes; all between has the pass's name before it.

Where the logits of the purified image are not what is answered they have a name of their own.
"""


def ends_of(protected: ProtectedClassifier) -> Mapping[str, str]:
    """Return what the ends of the purified pass are called in a protected classifier's graph."""
    return PURIFIED if isinstance(protected.judge, PurifiedAnswer) else JUDGED


def tap_of(protected: ProtectedClassifier, layer: str, seen_pass: Inspected) -> str:
    """Return what a layer's value is called in one pass of the classifier."""
    name = protected.classifier.resolve_layer(layer).name
    ends = {"raw": RAW, "views": VIEWS, "purified": ends_of(protected)}[seen_pass]
    return ends.get(name, f"{seen_pass}/{name}")


@dataclass(frozen=True)
class Detecting:
    """What a detector adds to the graph; nothing where there is none.

    ``before`` are the nodes that lead to the score, ``after`` those from there to the alert.
    """

    graphs: Sequence[onnx.ModelProto] = ()
    before: Sequence[NodeProto] = ()
    after: Sequence[NodeProto] = ()
    initializers: Sequence[TensorProto] = ()

    @classmethod
    def export(
        cls, protected: ProtectedClassifier, classifier_graph: onnx.ModelProto, image: Tensor, opset: int
    ) -> Self:
        """Export a protected classifier's detector; ``image`` (N, C, H, W) is an example of two images or more.

        Raises ``ExportFailed``.
        """
        detector = protected.detector
        if isinstance(detector, NoDetector):
            return cls()
        with torch.no_grad():
            seen = protected.evidence(image)
        evidence = Evidence(seen.activations.clone(), seen.logits, seen.logits + 1, torch.ones(2))
        graph = export_module(detector, evidence._asdict(), "score", opset)
        names = {name: name for name in ("undefended_logits", "distance", "score")}
        names["logits"] = ends_of(protected)["logits"]
        showing = _Showing.compose(protected, classifier_graph, image, opset)
        if detector.layer is not None:
            names["activations"] = showing.activations
        return cls(
            [graph, *showing.graphs],
            [*showing.nodes, *_distance(), *instance(graph, "detector/", names)],
            _alert(protected.threshold.ndim),
            [
                *initializers_of(graph, "detector/"),
                numpy_helper.from_array(protected.threshold.numpy(), "threshold"),
                helper.make_tensor("columns", TensorProto.INT64, [1], [1]),
                *showing.initializers,
            ],
        )


@dataclass(frozen=True)
class _Showing:
    """What leads to the activations that a detector is shown; nothing where it is one layer of a pass that is there."""

    activations: str = ""
    graphs: Sequence[onnx.ModelProto] = ()
    nodes: Sequence[NodeProto] = ()
    initializers: Sequence[TensorProto] = ()

    @classmethod
    def compose(
        cls, protected: ProtectedClassifier, classifier_graph: onnx.ModelProto, image: Tensor, opset: int
    ) -> Self:
        detector = protected.detector
        if detector.layer is None:
            return cls()
        taps = [tap_of(protected, layer, detector.inspects) for layer in detector.layers]
        joined, nodes = _join(taps)
        if detector.inspects != "views":
            return cls(joined, (), nodes)
        views = export_module(_Views(detector), {"image": image}, "view_images", opset)
        with torch.no_grad():
            shape = protected.activations(image).shape
        apart = numpy_helper.from_array(np.array([-1, *shape[1:]]), "views_apart")
        return cls(
            "view_activations",
            [views],
            [
                *instance(views, "viewing/", {"image": "image", "view_images": "view_images"}),
                *instance(classifier_graph, "views/", VIEWS, shared="classifier/"),
                *nodes,
                helper.make_node("Reshape", [joined, apart.name], ["view_activations"], "view_activations"),
            ],
            [*initializers_of(views, "viewing/"), apart],
        )


class _Views(nn.Module):
    """Map images (N, C, H, W) to a detector's views of them as so many images more, (N V, C, H, W)."""

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, image: Tensor) -> Tensor:
        return self.detector.views(image).flatten(0, 1)


def _join(taps: Sequence[str]) -> tuple[str, list[NodeProto]]:
    """Return the name of the values of several layers, flattened and joined, and the nodes that do so."""
    if len(taps) == 1:
        return taps[0], []
    flat = [f"flat_activations_{place}" for place in range(len(taps))]
    nodes = [helper.make_node("Flatten", [tap], [name], name) for tap, name in zip(taps, flat, strict=True)]
    return "activations", [*nodes, helper.make_node("Concat", flat, ["activations"], "activations", axis=1)]


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
