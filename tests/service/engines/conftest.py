"""Versions of every kind, in torch, as graphs, and published."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from defenses.baselines.methods import BaselineConfig
from defenses.checkpoint import save_protected
from defenses.classifier import Classifier
from defenses.coophance import Regulator, RegulatorConfig
from defenses.detector import NoDetector
from defenses.judge import AlertedAnswer
from defenses.nip import (
    CorrectionConfig,
    InverseCorrection,
    Pushing,
    ResponseConfig,
    ResponseJudge,
    export_correction,
    fit_response,
    head_behind,
)
from defenses.nip.response_fit import Pushed
from defenses.onnx_export import export_protected, save_graph
from defenses.protected import ProtectedClassifier
from model_store import SERVING, Draft, FalsePositiveRate, InputSpec, Parent, Store

SHAPE = (1, 16, 16)
LABELS = ("zero", "one", "two", "three")


@dataclass(frozen=True)
class Made:
    """A version as a torch module and as the files that are published of it; ``kind`` is the manifest's."""

    kind: str
    version: Classifier | ProtectedClassifier
    graph: Path
    correction: Path | None = None

    @property
    def outputs(self) -> tuple[str, ...]:
        """Every output that it has."""
        if isinstance(self.version, Classifier):
            return ("logits",)
        scored = () if isinstance(self.version.detector, NoDetector) else ("score", "alert")
        return ("logits", *scored, "undefended_logits", "purified")


def response(classifier: Classifier, x: torch.Tensor) -> ProtectedClassifier:
    pushing, judge = Pushing(ResponseConfig("smoothing", SHAPE, len(LABELS), weight=0.7, size=0.0)), ResponseJudge(4)
    with torch.no_grad():
        bare = classifier(x)
        pushed = Pushed(bare, classifier(pushing(x, torch.zeros(()))), bare.argmax(1))
    fit_response(judge, pushed, pushed, 0.3)
    return ProtectedClassifier(classifier, pushing, NoDetector(), judge=judge).eval()


def gated(protected: ProtectedClassifier) -> ProtectedClassifier:
    classifier, regulator = protected.classifier, Regulator(RegulatorConfig(SHAPE, channels=(4,), skip_channels=(2,)))
    layer = classifier.head_layer
    config = CorrectionConfig(layer.name, layer.shape, len(LABELS), k1=2, k2=2, size=0.05, noise=0.02)
    corrector = InverseCorrection(config, classifier, head_behind(classifier, layer))
    return ProtectedClassifier(
        classifier,
        regulator,
        protected.detector,
        float(protected.threshold),
        judge=AlertedAnswer(),
        corrector=corrector,
    ).eval()


def squeezing(classifier: Classifier) -> ProtectedClassifier:
    values = {"method": "feature-squeezing", "options": {}, "image_shape": SHAPE, "watched": []}
    return ProtectedClassifier(classifier, *BaselineConfig.from_json(values).parts(), 0.2).eval()


@pytest.fixture(scope="session")
def made(protected, protected_graph, dark, bright, tmp_path_factory) -> dict[str, Made]:
    """A version of each kind by name."""
    folder = tmp_path_factory.mktemp("versions")
    classifier = protected.classifier
    x = torch.from_numpy(np.concatenate([dark(60, 7), bright(60, 8)])).float() / 255
    versions = {
        "bare": ("classifier", classifier),
        "coophance": ("coophance", protected),
        "response": ("nip", response(classifier, x)),
        "gated": ("nip", gated(protected)),
        "squeezing": ("baseline", squeezing(classifier)),
    }
    graphs = {"bare": classifier.model, "coophance": protected_graph}
    found = {}
    for name, (kind, version) in versions.items():
        graph, correction = folder / f"{name}.onnx", None
        save_graph(graphs.get(name) or export_protected(version), graph)
        if isinstance(version, ProtectedClassifier) and version.corrector is not None:
            correction = folder / f"{name}-correction.onnx"
            onnx.save(export_correction(version.corrector, classifier), correction)
        found[name] = Made(kind, version, graph, correction)
    return found


@pytest.fixture(scope="session")
def mixed(dark, bright) -> np.ndarray:
    """Images uint8 (48, 1, 16, 16): dark ones, bright ones, and noise of every brightness between."""
    random = np.random.default_rng(5)
    between = random.random((16, 1, 16, 16)) * random.random((16, 1, 1, 1))
    return np.concatenate([dark(16, 5), bright(16, 6), (between * 255).astype(np.uint8)])


@pytest.fixture(scope="session")
def published_versions(made, tmp_path_factory) -> Path:
    """A store of ``digits``: version 1 bare, 2 CoopHANCE, 3 gated NIP, each with its checkpoint, and 4 without."""
    root = tmp_path_factory.mktemp("checkpoints") / "store"
    models = Store.open(root / "models")
    for name, kept in (("bare", False), ("coophance", True), ("gated", True), ("coophance", False)):
        models.publish("digits", draft(made[name], models), payload(made[name], checkpoint=kept))
    models.set_alias("digits", SERVING, 2)
    return root


def payload(one: Made, *, checkpoint: bool) -> Path:
    folder = Path(tempfile.mkdtemp())
    (folder / "model.onnx").write_bytes(one.graph.read_bytes())
    if one.correction is not None:
        (folder / "correction.onnx").write_bytes(one.correction.read_bytes())
    if checkpoint:
        assert isinstance(one.version, ProtectedClassifier)
        save_protected(one.version, folder / "checkpoint")
    return folder


def draft(one: Made, models: Store) -> Draft:
    defended = isinstance(one.version, ProtectedClassifier)
    return Draft(
        kind=one.kind,
        input=InputSpec(shape=SHAPE, mode="L"),
        labels=LABELS,
        parent=Parent(name="digits", version=1, digest=models.digest("digits", 1)) if defended else None,
        threshold=0.0 if defended else None,
        false_positive_rate=FalsePositiveRate(budget=0.05, calibrated_on=100, realised=0.04, evaluated_on=100)
        if defended
        else None,
    )
