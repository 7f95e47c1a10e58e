"""Every baseline as one ONNX graph and as a checkpoint: the same as in torch, and refused where it is not."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from defenses.baselines import METHODS, BaselinePlan
from defenses.baselines.lid import LidDetector
from defenses.baselines.magnet import MagNetDetector
from defenses.checkpoint import BASELINE, CheckpointUnreadable, ClassifierMismatch, load_protected, save_protected
from defenses.classifier import Classifier
from defenses.coophance import Regulator, RegulatorConfig
from defenses.detector import NoDetector
from defenses.onnx_export import check_export, export_protected
from defenses.onnx_parity import session
from defenses.onnx_trace import export_classifier
from defenses.protected import ProtectedClassifier

SHAPE = (3, 16, 16)
OFF = torch.zeros(())
QUICK = {
    "total-variation": {"steps": 4},
    "feature-squeezing": {"search": 3},
    "lid": {"references": 12, "neighbors": 5},
}


def made_classifier(randomised, shape=SHAPE, classes=5) -> Classifier:
    layers = nn.Sequential(
        nn.Conv2d(shape[0], 6, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.LazyLinear(classes)
    )
    layers(torch.rand(2, *shape))
    return Classifier(export_classifier(randomised(layers), shape)).eval()


@pytest.fixture(scope="module")
def classifier(randomised) -> Classifier:
    return made_classifier(randomised)


def protect(classifier: Classifier, method: str) -> ProtectedClassifier:
    """Put a classifier behind a baseline whose learnt parts are those of random images."""
    torch.manual_seed(0)
    purifier, detector = BaselinePlan.chosen(method, QUICK.get(method, {})).config(classifier).parts()
    threshold = () if isinstance(detector, NoDetector) else (0.3,)
    protected = ProtectedClassifier(classifier, purifier, detector, *threshold).eval()
    x = torch.rand(12, *SHAPE)
    with torch.no_grad():
        if isinstance(detector, MagNetDetector):
            detector.exceedance.fit(detector.statistics(protected.evidence(x)))
        if isinstance(detector, LidDetector):
            for known, features in zip(detector.references, detector.features(protected.activations(x)), strict=True):
                known.copy_(features)
            detector.mean.normal_()
            detector.scale.uniform_(1, 2)
            detector.weight.normal_()
            detector.bias.fill_(0.5)
    return protected


@pytest.mark.parametrize("method", METHODS)
def test_graph_and_checkpoint_say_what_torch_says(classifier, method, tmp_path):
    protected = protect(classifier, method)
    graph = export_protected(protected)
    x = torch.rand(5, *SHAPE)
    assert check_export(graph, protected, x) < 1e-4
    outputs = {value.name for value in graph.graph.output}
    names = ["purified", *(["score", "alert"] if METHODS[method].detects else [])]
    assert outputs.issuperset(names)
    assert ("score" in outputs) == METHODS[method].detects
    runs = session(graph)
    quiet = {"noise_scale": np.zeros((), np.float32)}
    together = dict(zip(names, runs.run(names, {"image": x.numpy(), **quiet}), strict=True))
    alone = runs.run(names, {"image": x[3:4].numpy(), **quiet})
    for name, values in zip(names, alone, strict=True):
        np.testing.assert_allclose(values, together[name][3:4], atol=1e-5)
    with torch.no_grad():
        output = protected(x, OFF)
        if METHODS[method].detects:
            assert together["alert"].tolist() == output.alerts.tolist()
        save_protected(protected, tmp_path)
        loaded = load_protected(classifier, tmp_path)
        for ours, theirs in zip(loaded(x, OFF), output, strict=True):
            assert torch.equal(ours, theirs)
    assert torch.equal(loaded.threshold, protected.threshold)
    assert not loaded.training


def test_the_noise_of_the_graph_is_fresh_for_each_image(classifier):
    graph = export_protected(protect(classifier, "noise"))
    x = np.full((64, *SHAPE), 0.5, np.float32)
    runs = session(graph)
    first, second = (runs.run(["purified"], {"image": x})[0] - x for _ in range(2))
    assert first.std() == pytest.approx(0.03, rel=0.05)
    assert np.abs(np.corrcoef(first.reshape(64, -1))[0, 1:]).max() < 0.3
    assert not np.array_equal(first, second)


@pytest.mark.parametrize("damage", ["garbage", "unknown method", "foreign option", "truncated", "infinite"])
def test_a_damaged_checkpoint_is_refused_by_name(classifier, tmp_path, damage):
    save_protected(protect(classifier, "magnet"), tmp_path)
    path = tmp_path / BASELINE
    with safe_open(path, framework="pt") as file:
        config = json.loads(file.metadata()["config"])
    tensors = load_file(path)
    match damage:
        case "garbage":
            path.write_bytes(b"not safetensors at all")
        case "unknown method":
            save_file(tensors, path, {"config": json.dumps({**config, "method": "blur"})})
        case "foreign option":
            save_file(tensors, path, {"config": json.dumps({**config, "options": {"bits": 3}})})
        case "truncated":
            tensors.pop("detector.exceedance.knots")
            save_file(tensors, path, {"config": json.dumps(config)})
        case "infinite":
            tensors["purifier.layers.0.weight"][0, 0, 0, 0] = float("inf")
            save_file(tensors, path, {"config": json.dumps(config)})
    with pytest.raises(CheckpointUnreadable, match=r"baseline\.safetensors"):
        load_protected(classifier, tmp_path)


@pytest.mark.parametrize(
    ("method", "shape", "classes", "sentence"),
    [
        ("jpeg", (1, 16, 16), 5, r"images of shape \(3, 16, 16\), but the classifier has \(1, 16, 16\)"),
        ("lid", SHAPE, 7, r"layer 'logits' of shape \(5,\), but the classifier has \(7,\)"),
    ],
)
def test_a_baseline_for_another_classifier_is_refused_by_name(
    classifier, randomised, tmp_path, method, shape, classes, sentence
):
    save_protected(protect(classifier, method), tmp_path)
    with pytest.raises(ClassifierMismatch, match=sentence):
        load_protected(made_classifier(randomised, shape, classes), tmp_path)


def test_parts_of_different_defenses_are_not_kept(classifier, tmp_path):
    regulator = Regulator(RegulatorConfig(SHAPE, channels=(4, 4), skip_channels=(2, 2)))
    _, detector = BaselinePlan("feature-squeezing").config(classifier).parts()
    with pytest.raises(TypeError, match="got Regulator, FeatureSqueezing"):
        save_protected(ProtectedClassifier(classifier, regulator, detector, 0.5), tmp_path)
    assert not list(tmp_path.iterdir())
