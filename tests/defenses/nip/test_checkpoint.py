"""A NIP defense as it is kept: what comes back, and what is refused by name."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from defenses.checkpoint import (
    INVERSE_PERTURBATION,
    CheckpointUnreadable,
    ClassifierMismatch,
    load_protected,
    save_protected,
)
from defenses.classifier import Classifier, LayerNotFound
from defenses.coophance import Regulator, RegulatorConfig
from defenses.detector import NoDetector
from defenses.nip import InversePerturbation
from defenses.onnx_import import canonicalise
from defenses.onnx_trace import export_classifier
from defenses.protected import ProtectedClassifier


@pytest.mark.parametrize("detected", [False, True])
def test_checkpoint_gives_back_the_same_defense(classifier, purifier, inspector, splits, tmp_path, detected):
    subject = classifier("linear")
    parts = (inspector(subject), 0.25) if detected else (NoDetector(),)
    protected = ProtectedClassifier(subject, purifier(template="class", precision="float16"), *parts).eval()
    protected.purifier.set_amplitude(0.3)
    save_protected(protected, tmp_path / "checkpoint")
    loaded = load_protected(subject, tmp_path / "checkpoint")
    assert loaded.purifier.config == protected.purifier.config
    assert type(loaded.detector) is type(protected.detector)
    assert torch.equal(loaded.threshold, protected.threshold)
    x = splits.test.images.float() / 255
    for ours, theirs in zip(loaded(x), protected(x), strict=True):
        assert torch.equal(ours, theirs)


def test_the_classifiers_own_weights_are_not_kept_in_the_checkpoint(classifier, purifier, tmp_path):
    save_protected(ProtectedClassifier(classifier("linear"), purifier(), NoDetector()), tmp_path)
    kept = load_file(tmp_path / INVERSE_PERTURBATION)
    assert sorted(kept) == ["classes", "keys", "perturbations", "template"]


@pytest.mark.parametrize("damage", ["absent", "garbage", "foreign", "truncated", "infinite", "unknown"])
def test_a_damaged_pool_is_refused_by_name(classifier, purifier, tmp_path, damage):
    save_protected(ProtectedClassifier(classifier("linear"), purifier(), NoDetector()), tmp_path)
    path = tmp_path / INVERSE_PERTURBATION
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    match damage:
        case "absent":
            path.unlink()
        case "garbage":
            path.write_bytes(b"not safetensors at all")
        case "foreign":
            save_file({"weight": torch.zeros(3)}, path)
        case "truncated":
            save_file({**tensors, "keys": tensors["keys"][:-1]}, path, metadata)
        case "infinite":
            tensors["perturbations"][0, 0, 0, 0] = float("inf")
            save_file(tensors, path, metadata)
        case "unknown":
            save_file(tensors, path, {"config": json.dumps({"layers": 3, "inspected": False})})
    with pytest.raises(CheckpointUnreadable, match=r"inverse_perturbation\.safetensors"):
        load_protected(classifier("linear"), tmp_path)


def wider(width: int, shape: tuple[int, int, int], classes: int) -> Classifier:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Sequential(nn.Conv2d(shape[0], width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Linear(width, classes),
    )
    return Classifier(canonicalise(export_classifier(network.eval(), shape))).eval()


@pytest.mark.parametrize(
    ("width", "shape", "classes", "sentence"),
    [
        (48, (1, 8, 8), 10, r"of shape \(32,\), but the classifier has \(48,\)"),
        (32, (1, 12, 12), 10, r"images of shape \(1, 8, 8\), but the classifier has \(1, 12, 12\)"),
        (32, (1, 8, 8), 7, r"so many classes: 10, but the classifier has 7"),
    ],
)
def test_a_pool_for_another_classifier_is_refused_by_name(
    purifier, classifier, tmp_path, width, shape, classes, sentence
):
    other = wider(width, shape, classes)
    made = purifier()
    renamed = InversePerturbation(replace(made.config, layer=other.head_layer.name), made.head)
    renamed.set_pool(made.pool)
    save_protected(ProtectedClassifier(classifier("linear"), renamed, NoDetector()), tmp_path)
    with pytest.raises(ClassifierMismatch, match=rf"inverse_perturbation\.safetensors was made for.*{sentence}"):
        load_protected(other, tmp_path)


def test_a_pool_for_a_layer_that_does_not_exist_is_refused_by_name(purifier, classifier, tmp_path):
    made = purifier()
    renamed = InversePerturbation(replace(made.config, layer="elsewhere"), made.head)
    save_protected(ProtectedClassifier(classifier("linear"), renamed, NoDetector()), tmp_path)
    with pytest.raises(LayerNotFound, match="elsewhere"):
        load_protected(classifier("linear"), tmp_path)


def test_parts_that_are_no_defense_are_not_kept(classifier, tmp_path):
    regulator = Regulator(RegulatorConfig((1, 8, 8), channels=(4, 4), skip_channels=(2, 2)))
    with pytest.raises(TypeError, match="got Regulator, NoDetector"):
        save_protected(ProtectedClassifier(classifier("linear"), regulator, NoDetector()), tmp_path)
