"""NIP by response and behind an Inspector's alerts: fitted by the command line on digits, published, served, asked."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import typer
from onnx import numpy_helper
from typer.testing import CliRunner

from defenses.checkpoint import load_protected
from defenses.classifier import Classifier
from defenses.onnx_parity import session
from loadtest import nip_table
from loadtest.nip_table import table
from model_store import InputSpec, Store
from service.cli import app
from service.correcting import CorrectingEngine
from service.datasets import load_dataset
from service.engines import GraphUnloadable, OnnxEngine
from service.engines.opening import OnnxSource
from service.fit import find_classifier
from service.fit_draft import loss_findings
from service.register import Declaration, register
from service.settings import Settings

pytestmark = pytest.mark.long

DATA = ("--data", "digits")
COOPHANCE = (*DATA, "--examples", "60", "--attack", "fgsm:epsilon=48/255", "--strength", "0.8", "--epochs", "0.3")
COOPHANCE += ("--most-features", "64", "--inverse-penalty", "0.001", "--batch-size", "64", "--channels", "8")
COOPHANCE += ("--skip-channels", "4", "--no-flip")
RESPONSE = (*DATA, "--accuracy-loss", "0.05", "--attack", "fgsm:epsilon=48/255", "--test-examples", "20")
GATED = (*RESPONSE, "--inspector", "digits@2", "--validation-examples", "60", "--budget", "0.2", "--k1", "3")


def portcullis(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, re.sub(r"\s+", " ", result.output)


@pytest.fixture(scope="module")
def fitted(digits_store, tmp_path_factory) -> Path:
    """A store with digits: version 1 bare, 2 CoopHANCE, 3 by response, 4 behind the alerts of 2."""
    root = tmp_path_factory.mktemp("reclassifying") / "store"
    shutil.copytree(digits_store, root)
    for method, options in (("coophance", COOPHANCE), ("nip", RESPONSE), ("nip", GATED)):
        status, output = portcullis("fit", method, "digits@1", *options, "--store", root)
        assert status == 0, output
    return root


@pytest.fixture(scope="module")
def sent() -> np.ndarray:
    """Sixty-four test images."""
    spec = InputSpec(shape=(1, 32, 32), mode="L", resize="bilinear")
    return load_dataset(["digits"], spec, labels=None, split_seed=0).test.images[:64]


def serving(fitted: Path, version: int, folder: Path) -> Path:
    store = folder / "store"
    shutil.copytree(fitted, store)
    Store.open(store / "models").set_alias("digits", "serving", version)
    return store


def test_what_is_on_record_of_a_defense_by_response(fitted):
    manifest = Store.open(fitted / "models").manifest("digits", 3)
    assert (manifest.kind, manifest.threshold, manifest.false_positive_rate, manifest.attacks) == (
        "nip",
        None,
        None,
        (),
    )
    assert set(manifest.files) == {"model.onnx", "checkpoint/response.safetensors"}
    assert manifest.options["findings"] == []
    assert manifest.options["configuration"]["push"] == "smoothing"
    response = manifest.options["response"]
    assert response["undefended_right"] - response["right"] <= 0.05 * response["images"]
    assert manifest.parent.digest == Store.open(fitted / "models").digest("digits", 1)
    lost = manifest.metrics["clean_accuracy_undefended"] - manifest.metrics["clean_accuracy"]
    assert lost < 0.1
    assert "defense_success_rate.fgsm:epsilon=48/255" in manifest.metrics


@pytest.mark.parametrize(
    ("images", "loss", "expected"),
    [(300, 0.01, None), (299, 0.01, "300 or more"), (54, 0.05, "60 or more"), (60, 0.05, None), (10, 0.0, None)],
)
def test_a_calibration_split_too_small_for_the_loss_is_told(images, loss, expected):
    told = loss_findings(images, loss)
    assert len(told) == (expected is not None)
    assert all(expected in each and f"{images} calibration images" in each for each in told)


def test_what_is_on_record_of_a_correction(fitted):
    manifest = Store.open(fitted / "models").manifest("digits", 4)
    assert manifest.kind == "nip"
    assert manifest.threshold == manifest.options["gate"]["threshold"]
    assert manifest.false_positive_rate.budget == 0.2
    assert manifest.options["inspector"] == "digits@2"
    assert manifest.options["configuration"]["k1"] == 3
    assert [each.name for each in manifest.attacks] == ["fgsm:epsilon=48/255"]
    assert set(manifest.files) == {
        "model.onnx",
        "correction.onnx",
        "calibration.json",
        "checkpoint/regulator.safetensors",
        "checkpoint/inspector.safetensors",
        "checkpoint/correction.json",
    }
    assert {"alert_rate.fgsm:epsilon=48/255", "false_positive_rate"} <= manifest.metrics.keys()


async def test_a_defense_by_response_is_served_as_one_graph(gateway, fitted, sent, tmp_path):
    store = serving(fitted, 3, tmp_path)
    async with gateway(store=store, undefended_answer=True) as visitor:
        outputs = await visitor.outputs(
            "digits", sent, ("class_index", "verdict", "purified", "undefended_class_index")
        )
    assert set(outputs["verdict"]) == {"accepted"}
    names = ["logits", "purified", "undefended_class_index"]
    graph = store / "models/digits/3/model.onnx"
    logits, purified, bare = session(onnx.load(graph)).run(names, {"image": sent.astype(np.float32) / 255})
    assert outputs["class_index"].tolist() == logits.argmax(1).tolist()
    np.testing.assert_allclose(outputs["purified"], purified, atol=1e-5)
    assert outputs["undefended_class_index"].tolist() == bare.tolist()


async def test_what_is_alerted_is_served_from_the_second_graph(gateway, fitted, sent, tmp_path):
    store = serving(fitted, 4, tmp_path)
    models = Store.open(store / "models")
    bare = Classifier.load(find_classifier(models, "digits", 4).folder / "model.onnx").eval()
    protected = load_protected(bare, store / "models/digits/4/checkpoint")
    x = torch.from_numpy(np.random.default_rng(0).permutation(sent.reshape(-1)).reshape(sent.shape)).float() / 255
    mixed = torch.cat([x[:32], torch.from_numpy(sent[:32]).float() / 255])
    with torch.no_grad():
        expected = protected(mixed, torch.zeros(()))
    assert 0 < int(expected.alerts.sum()) < 64, "images of both kinds"
    pixels = (mixed * 255).round().to(torch.uint8).numpy()
    wanted = ("class_index", "verdict", "logits", "purified", "undefended_class_index")
    async with gateway(store=store, undefended_answer=True) as visitor:
        outputs = await visitor.outputs("digits", pixels, wanted)
        recorded = await visitor.alerts(int(expected.alerts.sum()))
    alerted = np.array(outputs["verdict"]) == "alert"
    assert alerted.tolist() == expected.alerts.tolist()
    assert len(recorded) == int(expected.alerts.sum())
    np.testing.assert_allclose(outputs["logits"][~alerted], expected.undefended_logits[~expected.alerts], atol=1e-3)
    agreeing = outputs["class_index"] == expected.logits.argmax(1).numpy()
    assert agreeing[alerted].mean() > 0.8
    assert (outputs["class_index"][alerted] != outputs["undefended_class_index"][alerted]).any()
    np.testing.assert_allclose(outputs["purified"][~alerted], expected.purified[~expected.alerts], atol=1e-3)
    moved = np.abs(outputs["purified"][alerted] - expected.purified[expected.alerts].numpy()).max((1, 2, 3))
    assert (moved < 1e-2).mean() > 0.8


async def test_a_second_graph_that_is_damaged_or_does_not_fit_is_refused(gateway, fitted, sent, tmp_path):
    store = serving(fitted, 4, tmp_path)
    path = store / "models/digits/4/correction.onnx"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.chmod(0o644)
    path.write_bytes(content)
    async with gateway(store=store, ready=False) as visitor:
        for _ in range(6000):
            states = (await visitor.http.post("/v2/repository/index")).json()
            if states:
                break
        refused = await visitor.infer("digits", sent[:1])
    assert refused.status_code == 503
    assert "'correction.onnx' should be of the SHA-256" in refused.json()["error"]


@pytest.mark.parametrize("broken", ["fails", "gives no numbers"])
def test_an_alert_stands_where_the_second_graph_fails(fitted, sent, broken, monkeypatch):
    folder = fitted / "models/digits/4"
    failed: list[int] = []
    outputs = ["logits", "alert", "purified", "undefended_logits"]
    source = OnnxSource(folder / "model.onnx", folder / "correction.onnx", Settings(threads=1))
    engine = CorrectingEngine(source, outputs, failed=failed.append)
    engine.try_out((1, 32, 32), 10)
    noise = np.random.default_rng(1).random((16, 1, 32, 32)).astype(np.float32)

    def correct(purified: np.ndarray, undefended_logits: np.ndarray) -> dict[str, np.ndarray]:
        if broken == "fails":
            raise RuntimeError("the device is gone")
        rows = len(purified)
        return {"logits": np.full((rows, 10), np.nan, np.float32), "corrected": np.zeros((rows, 1, 32, 32), np.float32)}

    monkeypatch.setattr(engine._correction, "correct", correct)
    answers = engine.predict(noise)
    assert answers.alerts.sum() == sum(failed) > 0
    assert np.isfinite(answers.logits).all()
    assert np.abs(answers.purified[answers.alerts]).max() > 0


def test_a_second_graph_of_other_shapes_is_refused_by_name(fitted, tmp_path):
    folder = fitted / "models/digits/4"
    graph = onnx.load(folder / "correction.onnx")
    narrowed = next(node for node in graph.graph.node if "logits" in node.output)
    narrowed.output[list(narrowed.output).index("logits")] = "all_logits"
    graph.graph.initializer.append(numpy_helper.from_array(np.arange(9), "first_nine"))
    graph.graph.node.append(onnx.helper.make_node("Gather", ["all_logits", "first_nine"], ["logits"], axis=1))
    del graph.graph.output[0].type.tensor_type.shape.dim[:]
    onnx.save(graph, tmp_path / "other.onnx")
    source = OnnxSource(folder / "model.onnx", tmp_path / "other.onnx", Settings(threads=1))
    engine = CorrectingEngine(source, ["logits"], failed=lambda count: None)
    with pytest.raises(
        GraphUnloadable, match=r"other.onnx cannot be run: expected logits of shape \(1, 10\), got \(1, 9\)"
    ):
        engine.try_out((1, 32, 32), 10)


def test_an_inspector_is_that_of_a_coophance_version_fitted_on_the_same_splits(fitted):
    for reference, told in (
        ("digits@3", "got digits@3, which is of kind nip"),
        ("digits@1", "got digits@1, which is of kind classifier"),
        ("digits", "an Inspector is that of a version given as NAME@VERSION"),
    ):
        arguments = [reference if word == "digits@2" else word for word in GATED]
        status, output = portcullis("fit", "nip", "digits@1", *arguments, "--store", fitted)
        assert status == 1
        assert told in output
    status, output = portcullis("fit", "nip", "digits@1", *GATED, "--seed", "1", "--store", fitted)
    assert status == 1
    assert "digits@2 was fitted on these images as --seed 0 splits them" in output
    assert Store.open(fitted / "models").versions("digits") == [1, 2, 3, 4]


def test_another_classifiers_inspector_is_refused(fitted, tmp_path):
    root = tmp_path / "store"
    shutil.copytree(fitted, root)
    models = Store.open(root / "models")
    graph = onnx.load(models.fetch("digits", 1).folder / "model.onnx")
    head = next(tensor for tensor in graph.graph.initializer if len(tensor.dims) == 1)
    head.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(head) + np.float32(1e-3), head.name))
    known = models.manifest("digits", 1)
    register(models, "others", graph, Declaration(labels=known.labels, resize=known.input.resize))
    status, output = portcullis("fit", "nip", "others", *GATED, "--store", root)
    assert status == 1
    assert "Expected an Inspector that was fitted for others@1, but digits@2 was for digits@1." in output
    assert models.versions("others") == [1]


@pytest.mark.parametrize("version", [3, 4])
def test_either_is_evaluated_from_the_store(fitted, version):
    arguments = (*DATA, "--attack", "fgsm:epsilon=48/255", "--limit", "20", "--json", "--store", fitted)
    status, output = portcullis("evaluate", f"digits@{version}", *arguments)
    assert status == 0, output
    report = json.loads(output[output.index("{") :])
    manifest = Store.open(fitted / "models").manifest("digits", version)
    (defense,) = report["defenses"]
    assert defense["clean"]["accuracy"]["mean"] == pytest.approx(manifest.metrics["clean_accuracy"], abs=0.02)
    assert {row["attack"] for row in report["rows"]} == {"fgsm:epsilon=48/255"}
    assert {row["auc"] for row in report["rows"]} == {None}
    assert {row["detector_auc"] is None for row in report["rows"]} == {version == 3}
    assert defense["threshold"] == manifest.threshold
    status, output = portcullis("evaluate", f"digits@{version}", *arguments, "--controls")
    assert status == 1
    assert "--controls is for a defense with a pool" in output


def test_the_first_graph_alone_runs_without_the_second(fitted, sent):
    path = fitted / "models/digits/4/model.onnx"
    answers = OnnxEngine(path, ["logits", "alert", "undefended_logits"]).predict(sent.astype(np.float32) / 255)
    kept = ~answers.alerts
    np.testing.assert_allclose(answers.logits[kept], answers.undefended_logits[kept])


def test_the_table_tells_each_defense_beside_its_controls(fitted, tmp_path):
    store, output, kept = tmp_path / "store", tmp_path / "table.json", tmp_path / "examples"
    shutil.copytree(fitted, store)
    paper = (*DATA, "--preset", "paper", "--candidates", "60", "--attack", "fgsm:epsilon=48/255")
    status, told = portcullis("fit", "nip", "digits@1", *paper, "--test-examples", "20", "--store", store)
    assert status == 0, told
    command = typer.Typer()
    command.command()(nip_table.main)
    arguments = ["digits@1", *DATA, "--store", store, "--response", "digits@3", "--gated", "digits@4", "--paper"]
    arguments += ["digits@5", "--attack", "fgsm:epsilon=48/255", "--limit", 40, "--clean", 60, "--seeds", 2]
    arguments += ["--work", kept, "--output", output]
    result = CliRunner().invoke(command, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    document = json.loads(output.read_text())
    rows = document["rows"]
    assert result.output.rstrip().splitlines()[-len(rows) :] == table(rows).splitlines()[2:]
    attacked = document["attacks"]["fgsm:epsilon=48/255"]["attempted"]
    assert attacked == 40
    assert {row["right"]["clean"]["images"] for row in rows.values()} == {60}
    assert rows["bare"]["right"]["fgsm:epsilon=48/255"]["rate"] == 0.0
    for name, of in (("response to Gaussian noise", "response (benign only)"), ("as printed, Gaussian", "as printed")):
        assert rows[name]["control_of"] == of
        for each, below in rows[name]["below"].items():
            difference = rows[of]["right"][each]["rate"] - rows[name]["right"][each]["rate"]
            assert below["mean"] == pytest.approx(difference, abs=1e-6)
            assert below["interval"][0] <= below["mean"] <= below["interval"][1]
    behind = [name for name, row in rows.items() if row["control_of"] == "correction (behind alerts)"]
    assert sum("same loss" in name for name in behind) == 2
    assert sum("best within that loss" in name for name in behind) == 2
    written = {file: file.stat().st_mtime_ns for file in kept.rglob("*.safetensors")}
    assert len(written) == 1, "what was crafted is kept, once"
    assert CliRunner().invoke(command, [str(argument) for argument in arguments]).exit_code == 0
    assert {file: file.stat().st_mtime_ns for file in kept.rglob("*.safetensors")} == written
    assert json.loads(output.read_text())["rows"] == rows, "the same command gives the same table"
