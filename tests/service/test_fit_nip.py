"""NIP fitted and published through the command line on digits: what is on record, its warnings, killed and resumed."""

import json
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import onnx
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from defenses.checkpoint import load_protected
from defenses.classifier import Classifier
from defenses.detector import NoDetector
from defenses.onnx_export import check_export
from loadtest.kill_fit import WEIGHTS, FitProcess, copy_of, difference, published_by
from model_store import Draft, Parent, Store
from service.cli import app
from service.datasets import load_dataset
from service.fit import find_classifier
from service.register import Declaration, register

QUICK = ("--data", "digits", "--preset", "paper", "--candidates", "40", "--attack", "fgsm:epsilon=24/255")
QUICK += ("--test-examples", "10")


def portcullis(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, re.sub(r"\s+", " ", result.output)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch) -> Iterator[None]:
    """Have every fit here, in this process or another, add up in the same order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def own_store(nip_store, tmp_path) -> Path:
    """A copy of the store, version 2 included, that a test may add to."""
    shutil.copytree(nip_store, tmp_path / "store")
    return tmp_path / "store"


def test_a_fit_publishes_everything_that_a_version_without_a_detector_is(nip_store):
    models = Store.open(nip_store / "models")
    fetched = models.fetch("digits")
    manifest = fetched.manifest
    assert (manifest.version, manifest.kind) == (2, "nip")
    assert (manifest.threshold, manifest.false_positive_rate, manifest.attacks) == (None, None, ())
    assert manifest.parent.digest == models.digest("digits", 1)
    assert set(manifest.files) == {"model.onnx", "checkpoint/inverse_perturbation.safetensors"}
    classifier = Classifier.load(find_classifier(models, "digits", None).folder / "model.onnx").eval()
    assert manifest.layers == models.manifest("digits", 1).layers
    assert classifier.resolve_layer(manifest.layers["head"]).shape == (64,)
    options = manifest.options
    assert options["plan"]["candidates"] == 150
    assert options["plan"]["attacks"] == ["fgsm:epsilon=24/255", "deepfool:steps=8"]
    assert options["configuration"]["candidates"] == 150 - options["left_out"]
    assert options["configuration"]["layer"] == manifest.layers["head"]
    assert len(options["template_sizes"]) == 10
    assert options["configuration"]["amplitude"] == options["strength"]["amplitude"]
    assert [each["amplitude"] for each in options["strength"]["tried"]] == [0.005, 0.02, 0.05, 0.5]
    assert set(options["seconds"]) == {
        "pool",
        "amplitude",
        "test examples, fgsm:epsilon=24/255",
        "test examples, deepfool:steps=8",
    }
    metrics = manifest.metrics
    assert metrics["clean_accuracy_undefended"] > 0.9
    assert abs(metrics["clean_accuracy_undefended"] - metrics["clean_accuracy"]) < 0.1
    assert 0 <= metrics["defense_success_rate.deepfool:steps=8"] <= 1
    assert "false_positive_rate" not in metrics
    assert json.loads(portcullis("fit", "list", "--json", "--store", nip_store)[1]) == []
    assert portcullis("verify", "--store", nip_store) == (0, "Every file is as it was published. ")


def test_the_published_graph_and_checkpoint_are_the_same_model_and_give_the_metrics(nip_store):
    models = Store.open(nip_store / "models")
    fetched = models.fetch("digits")
    classifier = Classifier.load(find_classifier(models, "digits", None).folder / "model.onnx").eval()
    protected = load_protected(classifier, fetched.folder / "checkpoint")
    assert isinstance(protected.detector, NoDetector)
    manifest = fetched.manifest
    dataset = load_dataset(["digits"], manifest.input, labels=manifest.labels, split_seed=0)
    x, y = torch.from_numpy(dataset.test.images).float() / 255, torch.from_numpy(dataset.test.targets)
    graph = onnx.load(fetched.folder / "model.onnx")
    assert check_export(graph, protected, x[:40]) < 1e-3
    assert {value.name for value in graph.graph.output}.isdisjoint({"score", "alert"})
    with torch.no_grad():
        accuracy = (protected(x).logits.argmax(1) == y).double().mean().item()
    assert accuracy == pytest.approx(manifest.metrics["clean_accuracy"])


def test_models_lists_it_without_a_threshold(nip_store):
    rows = json.loads(portcullis("models", "--store", nip_store, "--json")[1])
    assert [(row["kind"], row["serving"], row["threshold"]) for row in rows] == [
        ("classifier", False, None),
        ("nip", True, None),
    ]


def test_a_similarity_that_needs_no_template_is_not_warned_about_and_a_costly_strength_is(own_store):
    arguments = (*QUICK, "--k1", "31", "--k2", "31", "--similarity", "influence")
    arguments += ("--accuracy-loss", "0.01", "--amplitudes", "2,5")
    status, output = portcullis("fit", "nip", "digits", *arguments, "--json", "--store", own_store)
    assert status == 0, output
    assert "The template is empty" not in output
    assert "portcullis: The smallest amplitude that was tried, 2, costs" in output
    assert "points of clean accuracy; say with --accuracy-loss what it may cost." in output
    assert Store.open(own_store / "models").manifest("digits", 3).options["strength"]["within"] is False


def test_the_papers_preset_is_the_printed_method(own_store):
    status, output = portcullis("fit", "nip", "digits", *QUICK, "--store", own_store)
    assert status == 0, output
    manifest = Store.open(own_store / "models").manifest("digits", 3)
    chosen = manifest.options["configuration"]
    assert {name: chosen[name] for name in ("k1", "k2", "similarity", "search", "precision", "amplitude")} == {
        "k1": 5,
        "k2": 5,
        "similarity": "index",
        "search": "all",
        "precision": "float32",
        "amplitude": 1.0,
    }
    assert manifest.options["strength"]["tried"][0]["accuracy"] < manifest.metrics["clean_accuracy_undefended"]


def test_a_fit_that_is_killed_goes_on_to_the_same_defense(digits_store, nip_store, nip_options, tmp_path):
    copy = copy_of(digits_store, tmp_path / "store", "digits")
    process = FitProcess(copy, "digits", nip_options, method="nip")
    while not process.kept():
        time.sleep(0.01)
    assert process.stop_after(0, signal.SIGKILL) == -signal.SIGKILL
    assert Store.open(copy / "models").versions("digits") == [1]
    status, output = portcullis("fit", "nip", "digits", *nip_options, "--store", copy)
    assert status == 0, output
    assert f"Process {process.pid}, which was last at it, was killed. Kept, after" in output
    assert " s of work: pool" in output
    differences = difference(
        Store.open(nip_store / "models").fetch("digits"), published_by(copy, digits_store, "digits")
    )
    # Not to the bit: the order of a sum may depend on where memory lies.
    assert differences.pop(WEIGHTS) < 1e-2
    assert differences == {}, "every metric is that of the fit that was left alone"


class Cut(Exception):
    """What a kill is in a test of one process: nothing after it is done."""


def test_an_empty_template_is_on_record_and_told_by_a_fit_that_was_cut_off_after_publishing(own_store, monkeypatch):
    # Two neurons of 64 are neither front nor tail: none of them remains in every image.
    arguments = (*QUICK, "--k1", "31", "--k2", "31", "--amplitude", "0.01", "--store", own_store)
    publish = Store.publish

    def published_and_cut(self: Store, name: str, draft: Draft, folder: Path) -> None:
        publish(self, name, draft, folder)
        raise Cut

    with monkeypatch.context() as patched:
        patched.setattr(Store, "publish", published_and_cut)
        with pytest.raises(Cut):
            portcullis("fit", "nip", "digits", *arguments)
    status, output = portcullis("fit", "nip", "digits", *arguments)
    assert status == 0, output
    assert "This fit was finished before: it is published as digits@3." in output
    told = "The template is empty, so that every image is moved by the same candidate, the first: --template frequency"
    assert output.count(f"portcullis: {told}") == 1
    models = Store.open(own_store / "models")
    assert models.versions("digits") == [1, 2, 3], "nothing is published twice"
    assert models.aliases("digits") == {"serving": 2}, "fit must not promote by itself"
    options = models.manifest("digits", 3).options
    assert options["template_sizes"] == [0]
    (finding,) = options["findings"]
    assert finding.startswith(told)
    assert options["strength"]["within"] is None
    assert options["plan"]["accuracy_loss"] is None


def republished(store: Path, name: str, parent: Parent) -> None:
    """Publish version 2 of digits once more, as a version of a name, fitted for another parent."""
    models = Store.open(store / "models")
    fetched = models.fetch("digits", 2)
    draft = Draft(**{name: getattr(fetched.manifest, name) for name in Draft.model_fields})
    with tempfile.TemporaryDirectory() as folder:
        for path in fetched.manifest.files:
            target = Path(folder) / path
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(fetched.folder / path, target)
        models.publish(name, draft.model_copy(update={"parent": parent}), Path(folder))


def test_a_pool_for_another_classifier_is_refused_by_name(own_store):
    parent = Store.open(own_store / "models").manifest("digits", 2).parent
    republished(own_store, "digits", parent.model_copy(update={"digest": "ab" * 32}))
    for command in (("evaluate", "digits@3", "--data", "digits"), ("fit", "nip", "digits@3", *QUICK)):
        status, output = portcullis(*command, "--store", own_store)
        assert status == 1
        assert f"digits was fitted for digits@1 with digest {'ab' * 32}, but that version now has digest" in output
    assert Store.open(own_store / "models").versions("digits") == [1, 2, 3]


def test_a_pool_that_does_not_fit_its_classifier_is_refused_by_name(own_store):
    models = Store.open(own_store / "models")
    labels = models.manifest("digits", 1).labels
    trunk = (nn.Conv2d(1, 48, 3, stride=4, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    declared = Declaration(shape=(1, 32, 32), resize="bilinear", labels=labels)
    register(models, "narrow", nn.Sequential(*trunk, nn.Linear(48, 10)).eval(), declared)
    assert models.manifest("narrow", 1).layers["head"] == models.manifest("digits", 1).layers["head"]
    republished(own_store, "narrow", Parent(name="narrow", version=1, digest=models.digest("narrow", 1)))
    status, output = portcullis("evaluate", "narrow@2", "--data", "digits", "--store", own_store)
    assert status == 1
    assert re.search(r"The defense in \S+ was made for the layer '\w+' of shape \(64,\), but the .* \(48,\)", output)
