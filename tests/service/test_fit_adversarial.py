"""An adversarially trained classifier of digits: published, resumed, served, and what is refused, by command line."""

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from defenses.architectures import build
from defenses.baselines.adversarial_outcome import AdversarialTraining, Epoch
from defenses.classifier import Classifier
from defenses.stages import Stages
from model_store import Store
from service.adversarial import findings
from service.cli import app
from service.datasets import load_dataset

FACTORY = """
from torch import nn

def small(classes):
    blocks = [(nn.Conv2d(a, b, 3, 2, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU()) for a, b in ((1, 16), (16, 32))]
    return nn.Sequential(*blocks[0], *blocks[1], nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, classes))
"""

NETWORK = ("--arch", "tiny_networks:small", "--input-shape", "1x16x16", "--resize", "bilinear")
OPTIONS = (*NETWORK, "--mean", "0.3", "--std", "0.4", "--data", "digits", "--epsilon", "0.1", "--batch-size", "64")
OPTIONS += ("--no-flip", "--test-examples", "100")
LONG = (*OPTIONS, "--learning-rate", "0.1", "--epochs", "4")


class Cut(Exception):
    """What a kill is in a test of one process: nothing after it is done."""


def portcullis(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, re.sub(r"\s+", " ", result.output)


def fit(store: Path, *options: object, name: str = "robust") -> tuple[int, str]:
    return portcullis("fit", "adversarial", name, *options, "--store", store)


def unfinished(store: Path) -> list[dict]:
    return json.loads(portcullis("fit", "list", "--json", "--store", store)[1])


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory) -> Iterator[Path]:
    """The current folder, with a factory of networks; every training adds up in the same order."""
    path = tmp_path_factory.mktemp("networks")
    (path / "tiny_networks.py").write_text(FACTORY)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(path)
        yield path
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def robust(folder) -> Path:
    """A store with a classifier that was trained undisturbed, and no other version; it is only read."""
    status, output = fit(folder / "store", *LONG)
    assert status == 0, output
    assert re.search(r"Published robust, version 1: clean accuracy \d+\.\d+ % on the test images", output), output
    return folder / "store"


def weights_of(store: Path, version: int = 1) -> dict[str, torch.Tensor]:
    fetched = Store.open(store / "models").fetch("robust", version)
    return dict(Classifier.load(fetched.folder / "model.onnx").state_dict())


def check_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, atol=1e-3, rtol=1e-3, msg=name)


def test_it_is_a_classifier_like_any_other_with_how_it_was_trained(robust):
    models = Store.open(robust / "models")
    fetched = models.fetch("robust", 1)
    manifest = fetched.manifest
    assert (manifest.kind, manifest.parent, manifest.threshold) == ("classifier", None, None)
    assert models.aliases("robust") == {"serving": 1}
    assert (manifest.input.shape, manifest.input.normalisation.std) == ((1, 16, 16), (0.4,))
    assert manifest.labels == tuple("0123456789")
    assert set(manifest.layers) == {"tap", "head"}
    assert (manifest.data.name, manifest.data.split_seed, manifest.seed) == ("digits", 0, 0)
    (attack,) = manifest.attacks
    assert (attack.parameters, attack.examples) == ({"epsilon": 0.1, "alpha": 0.125}, manifest.data.counts["fit"])
    options = manifest.options
    assert options["network"] == {"arch": "tiny_networks:small", "weights": None}
    assert options["measured_by"] == {"attack": "pgd", "epsilon": 0.1, "step_size": 0.025, "steps": 10, "images": 100}
    assert [each["number"] for each in options["training"]["epochs"]] == [1, 2, 3, 4]
    assert (options["training"]["kept"], options["training"]["collapsed"]) == (4, None)
    assert manifest.metrics["robust_accuracy"] > 0.2
    test = load_dataset(["digits"], manifest.input, labels=manifest.labels, split_seed=0).test
    with torch.no_grad():
        logits = Classifier.load(fetched.folder / "model.onnx").eval()(torch.from_numpy(test.images).float() / 255)
    right = (logits.argmax(1) == torch.from_numpy(test.targets)).double().mean().item()
    assert right == pytest.approx(manifest.metrics["clean_accuracy"], abs=0.005)
    assert unfinished(robust) == []


async def test_it_answers_over_http(gateway, robust):
    fetched = Store.open(robust / "models").fetch("robust")
    test = load_dataset(["digits"], fetched.manifest.input, labels=None, split_seed=0).test.images[:30]
    with torch.no_grad():
        expected = Classifier.load(fetched.folder / "model.onnx").eval()(torch.from_numpy(test).float() / 255)
    async with gateway(store=robust, models=("robust",)) as visitor:
        outputs = await visitor.outputs("robust", test, ("label", "verdict", "logits"))
    np.testing.assert_allclose(outputs["logits"], expected, atol=1e-4)
    assert outputs["label"] == [str(index) for index in expected.argmax(1).tolist()]
    assert outputs["verdict"] == ["undefended"] * 30


def test_a_training_that_is_cut_off_goes_on_to_the_same_weights_and_is_published_once(robust, tmp_path, monkeypatch):
    store = tmp_path / "store"
    models = Store.open(store / "models")
    save, publish = Stages.save, Store.publish

    def kept_and_cut(self, name, tensors, values=None):
        save(self, name, tensors, values)
        if len(values.get("epochs", ())) == 2:
            raise Cut

    def published_and_cut(self, name, draft, payload):
        publish(self, name, draft, payload)
        raise Cut

    for owner, method, cut in ((Stages, "save", kept_and_cut), (Store, "publish", published_and_cut)):
        with monkeypatch.context() as patched:
            patched.setattr(owner, method, cut)
            with pytest.raises(Cut):
                fit(store, *LONG)
        (left,) = unfinished(store)
        assert (left["record"]["model"], left["stages"][0]) == ("robust", "training")
    assert (models.versions("robust"), models.aliases("robust")) == ([1], {})
    status, output = fit(store, *LONG)
    assert status == 0
    assert "This training was finished before: it is published as robust@1." in output
    assert (models.versions("robust"), models.aliases("robust")) == ([1], {"serving": 1})
    assert unfinished(store) == []
    check_equal(weights_of(robust), weights_of(store))
    found, expected = models.manifest("robust", 1), Store.open(robust / "models").manifest("robust", 1)
    assert found.metrics == pytest.approx(expected.metrics, abs=0.02)
    assert len(found.options["training"]["epochs"]) == 4


def test_a_next_version_starts_from_weights_and_is_served_when_promoted(robust, folder, tmp_path):
    store = tmp_path / "store"
    shutil.copytree(robust, store)
    torch.manual_seed(3)
    start = build("tiny_networks:small", 10).state_dict()
    save_file(start, folder / "start.safetensors")
    short = ("--epochs", "1", "--learning-rate", "0.00001", "--weights", "start.safetensors")
    status, output = fit(store, *OPTIONS, *short, "--promote")
    assert status == 0, output
    models = Store.open(store / "models")
    assert (models.versions("robust"), models.aliases("robust")) == ([1, 2], {"serving": 2})
    weights = models.manifest("robust", 2).options["network"]["weights"]
    content = (folder / "start.safetensors").read_bytes()
    assert weights == {"file": "start.safetensors", "sha256": hashlib.sha256(content).hexdigest()}
    (head,) = [value for value in weights_of(store, 2).values() if value.numel() == 1280]
    near = start["8.weight"] if head.shape == start["8.weight"].shape else start["8.weight"].T
    torch.testing.assert_close(head, near, atol=1e-3, rtol=1e-2)


def test_a_collapse_and_a_classifier_that_is_not_robust_are_told(robust):
    epochs = (Epoch(1, 1.0, 0.5, 0.6, 0.4), Epoch(2, 0.5, 0.9, 0.7, 0.01))
    common = {"planned": 5, "precision": "float32", "clean_accuracy": 0.6, "attacked": 50, "seconds": {}}
    collapsed = AdversarialTraining(epochs=epochs, kept=1, collapsed=2, robust_accuracy=0.0, **common)
    fell, none = findings(collapsed)
    assert fell.startswith("In epoch 2 of 5 the accuracy under PGD on validation images fell from 40.0 % to 1.0 %")
    assert "The weights of epoch 1 are kept; a smaller --alpha" in fell
    assert none.startswith("None of 50 test images is answered rightly under PGD")
    well = AdversarialTraining(epochs=epochs[:1], kept=1, collapsed=None, robust_accuracy=0.4, **common)
    assert findings(well) == []
    assert Store.open(robust / "models").manifest("robust", 1).options["findings"] == []


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--arch", "cifar_resnet21"), "No classifier can be built from 'cifar_resnet21'"),
        (("--arch", "tiny_networks:large"), "the module 'tiny_networks' has no callable 'large'"),
        (("--arch", "cifar_resnet20"), "cannot be exported"),
        (("--weights", "other.safetensors"), "do not fit the architecture: lack 0.weight"),
        (("--weights", "tiny_networks.py"), "tiny_networks.py is not a file of weights"),
        (("--weights", "nowhere.pt"), "nowhere.pt"),
        (("--epsilon", "8"), "Expected epsilon above 0 and below 1, got 8."),
        (("--epsilon", "8/0"), "Expected of --epsilon a number or a fraction such as 8/255, got '8/0'."),
        (("--alpha", "1/2"), "Expected alpha above 0 and at most twice epsilon, 0.2, got 0.5."),
        (("--epochs", "2", "--minutes", "1"), "Expected no --epochs where --minutes is given, got 2."),
        (("--batch-size", "4000"), "images to fit on, as many as are in a batch, got 1080."),
        (("--input-shape", "2x16x16"), "The declared input cannot be: mode 'RGB' has 3 channel(s)"),
        (("--input-shape", "16"), "such as 3x32x32, got '16'"),
        (("--labels", "a,b"), "labels"),
        (("--learning-rate", "1e30", "--epochs", "1"), "The training diverged: expected a finite loss"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_a_sentence_and_publishes_nothing(folder, tmp_path, options, sentence):
    save_file({"weight": torch.zeros(3)}, folder / "other.safetensors")
    status, output = fit(tmp_path / "store", *OPTIONS, *options)
    assert status == 1
    assert sentence in output
    assert Store.open(tmp_path / "store" / "models").models() == []
    assert unfinished(tmp_path / "store") == []


def test_a_name_that_cannot_be_is_refused_before_the_images_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr("service.datasets.load_dataset", lambda *given, **named: pytest.fail("the images were read"))
    for name, sentence in (("Robust", "'Robust' is not valid"), ("robust@2", "Expected a name without a version")):
        status, output = fit(tmp_path / "store", *OPTIONS, name=name)
        assert status == 1
        assert sentence in output


def test_a_training_that_this_machine_does_not_hold_is_refused_beforehand(tmp_path, monkeypatch):
    monkeypatch.setattr("service.adversarial.memory_available", lambda: 100_000)
    status, output = fit(tmp_path / "store", *OPTIONS)
    assert status == 1
    assert "of memory, but only 0.1 MiB are available." in output
    assert "is for a training batch: a smaller --batch-size takes less." in output
    assert Store.open(tmp_path / "store" / "models").models() == []
