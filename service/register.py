"""Registering a classifier: whatever it came from, it is kept as one ONNX graph."""

import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import onnx
from pydantic import ValidationError
from torch import nn

from defenses.classifier import Classifier, LayerNotFound
from defenses.onnx_export import save_graph
from defenses.onnx_import import canonicalise
from defenses.onnx_parity import check_parity
from defenses.onnx_trace import export_classifier
from model_store import SERVING, Draft, InputSpec, Manifest, Normalisation, Store
from service.libraries import library_versions
from service.served import GRAPH


class LabelsWrong(ValueError):
    """There are not as many labels as the classifier has classes."""

    def __init__(self, labels: Sequence[str], classes: int) -> None:
        super().__init__(f"The classifier has {classes} classes, so expected {classes} labels, got {len(labels)}.")


class InputUnsuitable(ValueError):
    """No classifier can have the input that is declared."""

    def __init__(self, reasons: Sequence[str]) -> None:
        super().__init__(f"The declared input cannot be: {'; '.join(reasons)}.")


@dataclass(frozen=True)
class Declaration:
    """Say what a classifier's graph or module does not say itself.

    ``shape`` is (C, H, W), None to read it from an ONNX file. ``normalisation`` is what the classifier expects to be
    done to an image in [0, 1]; ``byte`` range and ``NHWC`` layout are for ONNX files that want them. ``resize`` lets
    images of other sizes in. ``labels`` empty names the classes by number. ``tap`` and ``head`` name the Inspector's
    and NIP's layers where the ones found by themselves are not wanted.
    """

    shape: tuple[int, int, int] | None = None
    normalisation: Normalisation | None = None
    input_range: Literal["unit", "byte"] = "unit"
    layout: Literal["NCHW", "NHWC"] = "NCHW"
    resize: Literal["bilinear", "bicubic"] | None = None
    labels: tuple[str, ...] = ()
    tap: str | None = None
    head: str | None = None

    def input_of(self, shape: tuple[int, int, int]) -> InputSpec:
        """Return what one image of that shape (C, H, W) is to the classifier; raises ``InputUnsuitable``."""
        mode: Literal["L", "RGB"] = "L" if shape[0] == 1 else "RGB"
        try:
            return InputSpec(shape=shape, normalisation=self.normalisation, mode=mode, resize=self.resize)
        except ValidationError as error:
            raise InputUnsuitable([each["msg"].removeprefix("Value error, ") for each in error.errors()]) from error


@dataclass(frozen=True)
class Registrable:
    """A classifier that can be published: its canonical graph, and what is on record of it."""

    graph: onnx.ModelProto
    draft: Draft


def register(
    store: Store, name: str, source: nn.Module | onnx.ModelProto, declared: Declaration, *, command: str = ""
) -> Manifest:
    """Publish a classifier as the next version of ``name``; the first version becomes the serving one.

    A module is exported and its code is not needed again. Nothing is published of what ``registrable`` refuses. Raises
    what that raises, and the store's errors.
    """
    return publish_classifier(store, name, registrable(source, declared, command=command))


def registrable(source: nn.Module | onnx.ModelProto, declared: Declaration, *, command: str = "") -> Registrable:
    """Return a classifier as it can be published, its interpreted form checked against ONNX Runtime.

    Raises ``GraphUnsuitable``, ``OperatorUnsupported``, ``ParityBroken``, ``LayerNotFound`` for a layer that is named,
    ``LabelsWrong`` and ``InputUnsuitable``.
    """
    if isinstance(source, nn.Module):
        if declared.shape is None:
            raise ValueError("A module does not say its input's shape; expected --input-shape, such as 3x32x32.")
        source = export_classifier(source, declared.shape)
    normalisation = declared.normalisation
    graph = canonicalise(
        source,
        normalisation=(normalisation.mean, normalisation.std) if normalisation else None,
        input_range=declared.input_range,
        layout=declared.layout,
        image_shape=declared.shape,
    )
    classifier = Classifier(graph).eval()
    parity = check_parity(graph, classifier.graph)
    labels = declared.labels or tuple(str(index) for index in range(classifier.classes))
    if len(labels) != classifier.classes:
        raise LabelsWrong(labels, classifier.classes)
    draft = Draft(
        kind="classifier",
        input=declared.input_of(classifier.image_shape),
        labels=labels,
        layers=_layers(classifier, declared),
        metrics={"parity": parity.max_abs_difference},
        libraries=library_versions(),
        command=command,
    )
    return Registrable(graph, draft)


def publish_classifier(store: Store, name: str, classifier: Registrable) -> Manifest:
    """Publish a classifier as the next version of ``name`` and serve the first; raises the store's errors."""
    with tempfile.TemporaryDirectory(prefix="portcullis-register-") as folder:
        save_graph(classifier.graph, Path(folder) / GRAPH)
        manifest = store.publish(name, classifier.draft, Path(folder))
    serve_first(store, manifest)
    return manifest


def serve_first(store: Store, manifest: Manifest) -> None:
    """Serve a version of a name of which none is served yet; raises the store's errors."""
    if SERVING not in store.aliases(manifest.name):
        store.set_alias(manifest.name, SERVING, manifest.version)


def _layers(classifier: Classifier, declared: Declaration) -> dict[str, str]:
    """Return the layers named, or found by themselves; one that a network does not have is left out."""
    layers = {}
    for role, named in (("tap", declared.tap), ("head", declared.head)):
        if named:
            layers[role] = classifier.resolve_layer(named).name
            continue
        with suppress(LayerNotFound):
            layers[role] = (classifier.tap if role == "tap" else classifier.head_layer).name
    return layers
