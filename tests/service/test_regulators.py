"""A published Regulator is found again, and refused where it purifies other images than the classifier's."""

import hashlib

import pytest
import torch

from defenses.checkpoint import CheckpointUnreadable, save_regulator
from defenses.coophance import Regulator, RegulatorConfig
from model_store import ArtifactCorrupt, DataRecord, Draft, InputSpec, NameInvalid, Normalisation, Store
from service.regulators import (
    REGULATORS,
    RegulatorNotFound,
    RegulatorUnfit,
    find_regulator,
    other_data_told,
    regulator_name,
)

DIGEST = hashlib.sha256(b"images").hexdigest()
RGB = InputSpec(shape=(3, 16, 16), mode="RGB")


def publish(root, folder, *, spec=RGB, shape=None, name="photographs-3x16x16", **fields):
    """Publish an unfitted Regulator and return it."""
    torch.manual_seed(0)
    regulator = Regulator(RegulatorConfig(shape or spec.shape, strength=0.4))
    folder.mkdir()
    save_regulator(regulator, folder)
    data = DataRecord(name="photographs", digest=DIGEST, split_seed=0, counts={"fit": 10})
    draft = Draft(**{"kind": "regulator", "input": spec, "labels": (), "data": data, **fields})
    Store.open(root / REGULATORS).publish(name, draft, folder)
    return regulator


def test_a_regulator_is_found_with_its_weights_and_its_reference(tmp_path):
    saved = publish(tmp_path, tmp_path / "a")
    normalised = RGB.model_copy(update={"normalisation": Normalisation(mean=(0.5,) * 3, std=(0.2,) * 3)})
    for spec in (RGB, normalised, RGB.model_copy(update={"resize": "bicubic"})):
        found = find_regulator(tmp_path, "photographs-3x16x16@1", spec)
        assert found.reference == "photographs-3x16x16@1"
        assert found.digest == Store.open(tmp_path / REGULATORS).digest("photographs-3x16x16", 1)
        assert not found.regulator.training
        assert found.regulator.config.strength == 1
        for name, value in found.regulator.state_dict().items():
            assert torch.equal(value, saved.state_dict()[name]), name


@pytest.mark.parametrize(
    ("spec", "expected", "found"),
    [
        (InputSpec(shape=(3, 32, 32), mode="RGB"), "images of shape (3, 32, 32)", "(3, 16, 16)"),
        (InputSpec(shape=(1, 16, 16), mode="L"), "images of shape (1, 16, 16)", "(3, 16, 16)"),
        (InputSpec(shape=(3, 16, 16), mode="RGB", range=(0, 255)), "the range (0.0, 255.0)", "(0.0, 1.0)"),
    ],
)
def test_a_regulator_of_other_images_is_refused_with_what_was_expected_and_what_came(tmp_path, spec, expected, found):
    publish(tmp_path, tmp_path / "a")
    with pytest.raises(RegulatorUnfit) as caught:
        find_regulator(tmp_path, "photographs-3x16x16@1", spec)
    assert isinstance(caught.value, ValueError)
    assert f"expected {expected}" in str(caught.value) or f"in {expected}" in str(caught.value)
    assert f"got {found}." in str(caught.value)
    assert str(caught.value.found) == found


def test_a_checkpoint_of_another_shape_than_its_manifest_is_refused(tmp_path):
    publish(tmp_path, tmp_path / "a", shape=(3, 8, 8))
    with pytest.raises(RegulatorUnfit, match=r"expected images of shape \(3, 16, 16\), got \(3, 8, 8\)"):
        find_regulator(tmp_path, "photographs-3x16x16@1", RGB)


def test_a_version_that_is_no_regulator_is_refused(tmp_path):
    publish(tmp_path, tmp_path / "a", kind="classifier", labels=("a", "b"))
    with pytest.raises(RegulatorUnfit, match="expected a version of kind regulator, got classifier"):
        find_regulator(tmp_path, "photographs-3x16x16@1", RGB)


@pytest.mark.parametrize("reference", ["photographs-3x16x16", "photographs-3x16x16@serving", "Photographs@1"])
def test_a_reference_without_a_version_is_refused(tmp_path, reference):
    publish(tmp_path, tmp_path / "a")
    with pytest.raises(NameInvalid):
        find_regulator(tmp_path, reference, RGB)


def test_a_regulator_that_is_not_there_is_named_with_those_that_are(tmp_path):
    with pytest.raises(RegulatorNotFound, match="there are: none"):
        find_regulator(tmp_path, "photographs-3x16x16@1", RGB)
    for folder in ("a", "b"):
        publish(tmp_path, tmp_path / folder)
    for reference in ("photographs-3x16x16@3", "others@1"):
        with pytest.raises(RegulatorNotFound) as caught:
            find_regulator(tmp_path, reference, RGB)
        assert isinstance(caught.value, KeyError)
        assert f"There is no Regulator {reference} in {tmp_path / REGULATORS}" in str(caught.value)
        assert "there are: photographs-3x16x16@1, photographs-3x16x16@2." in str(caught.value)


def test_a_changed_file_is_noticed(tmp_path):
    publish(tmp_path, tmp_path / "a")
    path = tmp_path / REGULATORS / "photographs-3x16x16" / "1" / "regulator.safetensors"
    path.chmod(0o644)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactCorrupt):
        find_regulator(tmp_path, "photographs-3x16x16@1", RGB)


def test_a_version_without_a_checkpoint_is_refused(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "other.safetensors").write_bytes(b"")
    Store.open(tmp_path / REGULATORS).publish("x", Draft(kind="regulator", input=RGB, labels=()), tmp_path / "a")
    with pytest.raises(CheckpointUnreadable):
        find_regulator(tmp_path, "x@1", RGB)


def test_other_data_are_warned_about_and_the_same_are_not(tmp_path):
    publish(tmp_path, tmp_path / "a")
    found = find_regulator(tmp_path, "photographs-3x16x16@1", RGB)
    assert other_data_told(found, "renamed", DIGEST) is None
    told = other_data_told(found, "drawings", "f" * 64)
    assert f"was fitted on photographs ({DIGEST[:12]})" in told
    assert "this fit is on drawings (ffffffffffff)" in told
    publish(tmp_path, tmp_path / "b", data=None)
    unknown = find_regulator(tmp_path, "photographs-3x16x16@2", RGB)
    assert "an unknown data set" in other_data_told(unknown, "photographs", DIGEST)


def test_the_name_says_the_data_set_and_the_shape():
    assert regulator_name("CIFAR 10 (train)", (3, 32, 32)) == "cifar-10-train-3x32x32"
    assert regulator_name("数", (1, 8, 8)) == "images-1x8x8"
    assert len(regulator_name("x" * 300, (3, 224, 224))) <= 63
