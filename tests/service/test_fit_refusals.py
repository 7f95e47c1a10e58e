"""A fit that cannot be is refused on the command line: the reason on the error stream, exit status 1, nothing left."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from defenses.checkpoint import save_regulator
from defenses.coophance import Regulator, RegulatorConfig
from model_store import DataRecord, Draft, InputSpec, Store
from service.cli import app
from service.datasets import Dataset, load_dataset
from service.register import Declaration, register

LABELS = ("left", "middle", "right")
SHAPE = (1, 16, 16)
PAPER = ("--preset", "paper")


def portcullis(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, re.sub(r"\s+", " ", result.output)


@pytest.fixture(scope="module")
def registered(tmp_path_factory) -> Path:
    """A store with two classifiers, one of images of any size and one of 16x16 only, and two Regulators."""
    root = tmp_path_factory.mktemp("refusals") / "store"
    torch.manual_seed(0)
    stages = [(nn.Conv2d(before, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)) for before in (1, 8)]
    network = nn.Sequential(*stages[0], *stages[1], nn.Flatten(), nn.Linear(8 * 16, 3)).eval()
    models = Store.open(root / "models")
    register(models, "scaled", network, Declaration(shape=SHAPE, resize="bilinear", labels=LABELS))
    graph = onnx.load(models.fetch("scaled").folder / "model.onnx")
    register(models, "exact", graph, Declaration(labels=LABELS))
    for shape in ((1, 8, 8), SHAPE):
        folder = tmp_path_factory.mktemp("regulator")
        save_regulator(Regulator(RegulatorConfig(shape)), folder)
        draft = Draft(kind="regulator", input=InputSpec(shape=shape, mode="L"), labels=())
        Store.open(root / "regulators").publish(f"drawings-{shape[1]}", draft, folder)
    return root


def images_of(folder: Path, labels: tuple[str, ...] = LABELS, each: int = 40, side: int = 16) -> Path:
    random = np.random.default_rng(0)
    for label in labels:
        (folder / label).mkdir(parents=True)
        for index in range(each):
            pixels = random.integers(0, 255, (side, side), np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return images_of(tmp_path_factory.mktemp("images") / "drawings")


def empty(folder: Path) -> Path:
    folder.mkdir()
    return folder


def with_broken_image(folder: Path) -> Path:
    images_of(folder)
    (folder / "middle" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    return folder


def with_text_for_an_image(folder: Path) -> Path:
    images_of(folder)
    (folder / "left" / "7.png").write_text("not an image")
    return folder


def check_refused(store: Path, told: str, *arguments: object, method: str = "coophance") -> None:
    """Run a fit that must fail with these words, and leave the store as it was."""
    before = versions_in(store)
    status, output = portcullis("fit", method, *arguments, "--store", store)
    assert status == 1, output
    assert told in output
    assert output.count("portcullis: ") == 1
    assert versions_in(store) == before
    assert json.loads(portcullis("fit", "list", "--json", "--store", store)[1]) == []


def versions_in(store: Path) -> list[Path]:
    return sorted(path for part in ("models", "regulators") for path in (store / part).glob("*/*"))


@pytest.mark.parametrize(
    ("name", "make", "told"),
    [
        ("scaled", empty, "No images were found in"),
        ("scaled", lambda folder: folder, "cannot be read"),
        (
            "scaled",
            lambda folder: images_of(folder, ("left",)),
            "without images: middle, right; unknown to the classifier: none",
        ),
        ("scaled", with_broken_image, "middle/broken.png"),
        ("scaled", with_text_for_an_image, "left/7.png"),
        ("exact", lambda folder: images_of(folder, side=20), "16 pixels wide and 16 high, but is 20"),
        ("scaled", lambda folder: images_of(folder, ("left", "middle", "top")), "without images: right; unknown"),
        ("scaled", lambda folder: images_of(folder, each=3), "needs at least 4 image(s) to be split"),
    ],
    ids=[
        "folder with no images",
        "no folder",
        "one class",
        "broken image",
        "text for an image",
        "wrong size",
        "labels that do not match",
        "too few images",
    ],
)
def test_images_that_cannot_be_fitted_on(registered, tmp_path, name, make, told):
    check_refused(registered, told, name, "--data", make(tmp_path / "images"))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--budget", "0.01"], "A false-positive budget of 0.01 needs at least 99 benign calibration images, got 21."),
        (["--budget", "1.5"], "between 0 and 1, got 1.5"),
        (["--layer", "layer99"], "layer99"),
        (["--attack", "fgms"], "Expected an attack such as fgsm"),
        (["--minutes", "0"], "minutes above 0, got 0"),
        (["--inverse-penalty", "-1"], "inverse_penalty above 0, got -1"),
        (["--channels", "16;32"], "Expected widths such as 16,32,64,128, got '16;32'."),
        (["--channels", "16,32"], "a skip width of 0 or more for each of the 2 stages"),
        (["--strength", "1.5"], "Expected a strength above 0 and at most 1, got 1.5."),
        (["--regulator", "drawings-8@1"], "expected images of shape (1, 16, 16), got (1, 8, 8)."),
        (["--regulator", "drawings-16@2"], "there are: drawings-16@1, drawings-8@1."),
        (["--regulator", "drawings-16"], "NAME@VERSION"),
        (["--regulator", "drawings-16@1", "--epochs", "3", "--flip"], "got --epochs, --flip."),
        (["--device", "cuda"], "no such device"),
    ],
)
def test_options_that_cannot_be(registered, images, arguments, told):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("There is a GPU here.")
    check_refused(registered, told, "scaled", "--data", images, *arguments)


@pytest.mark.parametrize(
    ("attack", "told"),
    [
        ("joint", "got 'joint', which is run on a defense"),
        ("other-image", "which takes another image in place"),
        ("pgd-blind", "which is broken on purpose"),
    ],
)
def test_attacks_that_no_defense_can_be_fitted_to(registered, images, monkeypatch, attack, told):
    monkeypatch.setenv("COLUMNS", "400")  # so that no sentence is broken
    status, output = portcullis(
        "fit", "coophance", "scaled", "--data", images, "--attack", attack, "--store", registered
    )
    assert status == 2
    assert "Invalid value for --attack: Expected an attack to fit on that changes images" in output
    assert told in output
    assert not (registered / "fits").exists() or not list((registered / "fits").glob("[0-9a-f]*"))


def test_a_regulator_that_was_fitted_on_other_images_is_warned_about(registered, images, monkeypatch):
    monkeypatch.setattr("service.fit.memory_available", lambda: 2**20)
    arguments = ("scaled", "--data", images, "--regulator", "drawings-16@1", "--store", registered)
    status, output = portcullis("fit", "coophance", *arguments)
    assert status == 1
    assert (
        "portcullis: The Regulator drawings-16@1 was fitted on an unknown data set, this fit is on drawings" in output
    )


def other_seed_told(reference: str) -> str:
    return f"{reference} was fitted on these images as --seed 0 splits them, and may know those that are to be new"


def loaded(images: Path, seed: int = 0) -> Dataset:
    return load_dataset([str(images)], InputSpec(shape=SHAPE, mode="L"), labels=LABELS, split_seed=seed)


def fitted_on(dataset: Dataset) -> DataRecord:
    return DataRecord(name=dataset.name, digest=dataset.digest, split_seed=dataset.split_seed, counts={"fit": 1})


@pytest.fixture
def regulator_of(registered, tmp_path) -> Callable[[Path], str]:
    """Publish a Regulator that was fitted on images with the seed 0, and return its reference."""

    def published(images: Path) -> str:
        (tmp_path / "regulator").mkdir()
        save_regulator(Regulator(RegulatorConfig(SHAPE)), tmp_path / "regulator")
        spec = InputSpec(shape=SHAPE, mode="L")
        draft = Draft(kind="regulator", input=spec, labels=(), data=fitted_on(loaded(images)))
        manifest = Store.open(registered / "regulators").publish(f"of-{images.name}", draft, tmp_path / "regulator")
        return f"{manifest.name}@{manifest.version}"

    return published


def test_a_regulator_that_knows_what_is_to_be_new_to_it(registered, images, regulator_of):
    reference = regulator_of(images)
    arguments = ("scaled", "--data", images, "--regulator", reference)
    check_refused(registered, other_seed_told(reference), *arguments, "--seed", "1")


@pytest.mark.parametrize(("layout", "seed"), [("plain", 0), ("train and test", 1)])
def test_a_regulator_that_knows_nothing_of_it_goes_on(registered, tmp_path, regulator_of, monkeypatch, layout, seed):
    folder = tmp_path / "images"
    for part in (folder,) if layout == "plain" else (folder / "train", folder / "test"):
        images_of(part)
    reference = regulator_of(folder)
    monkeypatch.setattr("service.fit.memory_available", lambda: 2**20)
    arguments = ("scaled", "--data", folder, "--regulator", reference, "--seed", seed)
    check_refused(registered, "of memory, but only 1.0 MiB are available", *arguments)


@pytest.mark.parametrize("method", ["coophance", "nip", "baseline"])
def test_a_classifier_that_was_trained_on_what_is_to_be_new_to_it(registered, images, tmp_path, method):
    store = tmp_path / "store"
    shutil.copytree(registered, store)
    models = Store.open(store / "models")
    folder = models.fetch("scaled").folder
    draft = Draft(kind="classifier", input=InputSpec(shape=SHAPE, mode="L"), labels=LABELS)
    (tmp_path / "payload").mkdir()
    shutil.copy(folder / "model.onnx", tmp_path / "payload")
    trained = draft.model_copy(update={"data": fitted_on(loaded(images))})
    models.set_alias("robust", "serving", models.publish("robust", trained, tmp_path / "payload").version)
    arguments = ("robust", *(("--method", "jpeg") if method == "baseline" else ()), "--data", images, "--seed", "1")
    check_refused(store, other_seed_told("robust@1"), *arguments, method=method)


def test_a_model_that_is_not_there(registered, images):
    check_refused(registered, "letters", "letters", "--data", images)


def test_too_little_memory(registered, images, monkeypatch):
    monkeypatch.setattr("service.fit.memory_available", lambda: 2**20)
    told = "of memory, but only 1.0 MiB are available. The most of it,"
    check_refused(registered, told, "scaled", "--data", images, "--batch-size", "16")


def test_too_little_disk(registered, images, monkeypatch):
    usage = shutil.disk_usage(registered)
    monkeypatch.setattr("service.resources.shutil.disk_usage", lambda folder: usage._replace(free=2**20))
    check_refused(registered, f"of disk under {registered}/fits/", "scaled", "--data", images)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--preset", "paper", "--layer", "layer99"], "The classifier has no layer named 'layer99'"),
        (["--push", "inverse", "--layer", "layer99"], "The classifier has no layer named 'layer99'"),
        ([*PAPER, "--k1", "100", "--k2", "100"], "100 front and 100 tail neurons, at least 200 in all, but the layer"),
        (
            [*PAPER, "--layer", "1", "--k1", "2", "--k2", "2"],
            "cannot be served as one graph: expected a chain of Gemm, MatMul, Add and Relu, but there",
        ),
        ([*PAPER, "--k1", "0", "--k2", "0"], "Expected k1 and k2 of 0 or more, and not both 0, got 0 and 0."),
        ([*PAPER, "--eta", "1.5"], "Expected eta above 0 and at most 1, got 1.5."),
        ([*PAPER, "--amplitude", "-1"], "Expected amplitude above 0, got -1.0."),
        ([*PAPER, "--amplitude", "1", "--accuracy-loss", "0.1"], "where --amplitude is given, got --accuracy-loss."),
        ([*PAPER, "--template-share", "0.5"], "Expected --template frequency where --template-share is given"),
        ([*PAPER, "--amplitudes", "0.1,0.2"], "Expected --accuracy-loss where --amplitudes is given"),
        ([*PAPER, "--amplitudes", "0.1;0.2"], "Expected amplitudes such as 0.05,0.1,0.2, got '0.1;0.2'."),
        ([*PAPER, "--weight", "0.1"], "Expected options of a pool, with --preset paper, got --weight"),
        (["--eta", "0.5", "--sign", "front-tail"], "Expected options of a response, without --preset paper or --insp"),
        (["--k1", "3"], "Expected --push inverse where --k1 is given, got --push smoothing."),
        (["--push", "inverse", "--weight", "0.1"], "Expected --push smoothing where --weight is given"),
        (["--substitute"], "Expected --push inverse where --substitute is given, got --push smoothing."),
        (["--substitute-epochs", "3"], "Expected --substitute where --substitute-epochs is given, got none."),
        (["--push", "inverse", "--substitute", "--layer", "1"], "inverse perturbations of, of the layer found by its"),
        (["--weight", "0.4"], "Expected a weight above 0 and at most a third, got 0.4."),
        (["--accuracy-loss", "1"], "Expected an accuracy_loss of 0 or more and below 1, got 1.0."),
        ([*PAPER, "--inspector", "scaled@1"], "Expected no --inspector where --preset paper is given, got scaled@1."),
        (["--inspector", "scaled@1", "--push", "inverse"], "Expected options of a correction, with --inspector, got"),
        (["--inspector", "scaled@1", "--attack", "other-image"], "got 'other-image', which takes another image in pla"),
        (["--inspector", "scaled@1"], "to take the alerts from, got scaled@1, which is of kind classifier"),
        (["--inspector", "scaled@1", "--budget", "0.001"], "needs at least 999 benign calibration images"),
        (["--attack", "fgms"], "Expected an attack such as fgsm"),
        (["--device", "cuda"], "no such device"),
    ],
)
def test_options_of_nip_that_cannot_be(registered, images, arguments, told):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("There is a GPU here.")
    check_refused(registered, told, "scaled", "--data", images, *arguments, method="nip")


def test_nip_refuses_images_whose_labels_are_not_the_classifiers(registered, tmp_path):
    folder = images_of(tmp_path / "images", ("left", "middle", "top"))
    check_refused(registered, "without images: right; unknown", "scaled", "--data", folder, method="nip")


def test_nip_refuses_a_pool_that_memory_does_not_hold(registered, images, monkeypatch):
    monkeypatch.setattr("service.fit.memory_available", lambda: 2**18)
    arguments = ("scaled", "--data", images, "--batch-size", "1", "--test-examples", "1", *PAPER)
    told = "is for the graph that holds the pool: fewer --candidates, a smaller --eta or --precision float16"
    check_refused(registered, told, *arguments, method="nip")


def test_nip_refuses_a_pool_that_no_graph_holds(registered, images, monkeypatch):
    monkeypatch.setattr("defenses.nip.pool.LARGEST_POOL", 10_000)
    check_refused(
        registered, "69 candidates of shape (1, 16, 16) in float32", "scaled", "--data", images, *PAPER, method="nip"
    )


def test_nip_refuses_a_disk_that_does_not_hold_its_pool(registered, images, monkeypatch):
    usage = shutil.disk_usage(registered)
    monkeypatch.setattr("service.resources.shutil.disk_usage", lambda folder: usage._replace(free=2**10))
    check_refused(registered, f"of disk under {registered}/fits/", "scaled", "--data", images, *PAPER, method="nip")
