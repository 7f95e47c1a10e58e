"""Baselines fitted, published and served through the command line on digits, and what is refused."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from typer.testing import CliRunner

from defenses.onnx_export import check_export
from model_store import Store
from service.cli import app
from service.datasets import load_dataset
from service.defended import load_defended
from service.p_values import CALIBRATION, CalibrationScores

LID = ("--attack", "fgsm:epsilon=40/255", "--examples", "80", "--references", "60", "--neighbors", "10")


def portcullis(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, re.sub(r"\s+", " ", result.output)


def fit(store: Path, method: str, *options: object) -> tuple[int, str]:
    arguments = ("--data", "digits", "--method", method, *options, "--store", store)
    return portcullis("fit", "baseline", "digits", *arguments)


@pytest.fixture(scope="module")
def baseline_store(digits_store, tmp_path_factory) -> Path:
    """A store with a wide median as version 2 of ``digits``, promoted, and LID as version 3; it is only read."""
    root = tmp_path_factory.mktemp("baselines") / "store"
    shutil.copytree(digits_store, root)
    status, output = fit(root, "smoothing", "--kernel", "13", "--promote")
    assert status == 0, output
    assert "digits, version 2" in output
    assert "points of clean accuracy; a milder setting of the method costs less" in output
    status, output = fit(root, "lid", *LID)
    assert status == 0, output
    assert "Serve it with: portcullis promote digits@3" in output
    return root


@pytest.fixture(scope="module")
def sent(baseline_store) -> np.ndarray:
    """Test images, and the same under a perturbation, uint8 (40, 1, 32, 32)."""
    manifest = Store.open(baseline_store / "models").manifest("digits", 1)
    test = load_dataset(["digits"], manifest.input, labels=manifest.labels, split_seed=0).test
    noise = np.random.default_rng(0).integers(-60, 61, (20, *test.images.shape[1:]))
    return np.concatenate([test.images[:20], np.clip(test.images[:20] + noise, 0, 255)]).astype(np.uint8)


def test_a_purifier_is_published_with_its_method_and_without_a_threshold(baseline_store):
    manifest = Store.open(baseline_store / "models").manifest("digits", 2)
    assert (manifest.kind, manifest.threshold, manifest.false_positive_rate) == ("baseline", None, None)
    assert manifest.attacks == ()
    assert set(manifest.files) == {"model.onnx", "checkpoint/baseline.safetensors"}
    assert manifest.options["configuration"]["method"] == "smoothing"
    assert manifest.options["plan"]["options"] == {"kernel": 13}
    assert set(manifest.metrics) == {"clean_accuracy_undefended", "clean_accuracy"}
    assert manifest.metrics["clean_accuracy_undefended"] > 0.9
    assert manifest.metrics["clean_accuracy"] < 0.7


def test_a_detector_is_published_with_what_it_was_fitted_and_calibrated_on(baseline_store):
    fetched = Store.open(baseline_store / "models").fetch("digits", 3)
    manifest = fetched.manifest
    assert manifest.kind == "baseline"
    assert isinstance(manifest.threshold, float)
    rate = manifest.false_positive_rate
    assert (rate.budget, rate.calibrated_on) == (0.05, manifest.data.counts["calibration"])
    assert rate.realised == manifest.metrics["false_positive_rate"] < 0.15
    (attack,) = manifest.attacks
    assert (attack.name, attack.examples >= 10) == ("fgsm:epsilon=40/255", True)
    assert manifest.options["configuration"]["watched"][-1] == {"name": "logits", "shape": [10]}
    assert CALIBRATION in manifest.files
    scores = CalibrationScores.load(fetched.folder / CALIBRATION)
    assert scores.p_values(np.array([np.float32(1e9)]))[0] == pytest.approx(1 / (rate.calibrated_on + 1))
    assert portcullis("verify", "--store", baseline_store) == (0, "Every file is as it was published. ")


@pytest.mark.parametrize("version", [2, 3])
def test_the_published_graph_and_checkpoint_are_the_same_model_and_give_the_metrics(baseline_store, version):
    fetched, protected = load_defended(Store.open(baseline_store / "models"), "digits", version)
    manifest = fetched.manifest
    test = load_dataset(["digits"], manifest.input, labels=manifest.labels, split_seed=0).test
    x, y = torch.from_numpy(test.images).float() / 255, torch.from_numpy(test.targets)
    assert check_export(onnx.load(fetched.folder / "model.onnx"), protected, x[:16]) < 1e-3
    with torch.no_grad():
        output = protected(x)
    assert (output.logits.argmax(1) == y).double().mean().item() == pytest.approx(manifest.metrics["clean_accuracy"])
    alerted = output.alerts.double().mean().item()
    assert alerted == pytest.approx(manifest.metrics.get("false_positive_rate", 0.0))


async def test_a_purifier_answers_over_http(gateway, baseline_store, sent):
    _, protected = load_defended(Store.open(baseline_store / "models"), "digits", 2)
    with torch.no_grad():
        expected = protected(torch.from_numpy(sent).float() / 255)
    async with gateway(store=baseline_store, undefended_answer=True) as visitor:
        outputs = await visitor.outputs("digits", sent, ("label", "verdict", "purified", "undefended_class_index"))
        (info,) = (await visitor.http.get("/v1/models")).json()["models"]
    assert (info["kind"], info["version"], info["threshold"]) == ("baseline", "2", None)
    assert outputs["label"] == [str(index) for index in expected.logits.argmax(1).tolist()]
    assert outputs["verdict"] == ["accepted"] * len(sent)
    np.testing.assert_allclose(outputs["purified"], expected.purified, atol=1e-5)
    assert np.abs(outputs["purified"] - sent / 255).max() > 0.01
    assert outputs["undefended_class_index"].tolist() == expected.undefended_logits.argmax(1).tolist()


async def test_a_detector_alerts_over_http(gateway, baseline_store, sent):
    _, protected = load_defended(Store.open(baseline_store / "models"), "digits", 3)
    with torch.no_grad():
        expected = protected(torch.from_numpy(sent).float() / 255)
    verdicts = ["alert" if alerted else "accepted" for alerted in expected.alerts.tolist()]
    assert verdicts[20:].count("alert") > verdicts[:20].count("alert")
    async with gateway(store=baseline_store, models=("digits@3",)) as visitor:
        outputs = await visitor.outputs("digits", sent, ("verdict", "score"))
        await visitor.alerts(verdicts.count("alert"))
    np.testing.assert_allclose(outputs["score"], expected.scores, rtol=1e-3, atol=1e-3)
    assert outputs["verdict"] == verdicts


@pytest.mark.parametrize(
    ("method", "options", "sentence"),
    [
        ("blur", (), "Expected a method among none, smoothing, bit-depth, jpeg,"),
        (
            "smoothing",
            ("--quality", "75"),
            "Expected of the method smoothing no other options than kernel, got quality",
        ),
        ("none", ("--budget", "0.05"), "Expected no options of none, got budget"),
        ("jpeg", ("--quality", "101"), "Expected quality to be a whole number from 1 to 100, got 101"),
        ("jpeg", ("--attack", "fgsm"), "no other options than quality, subsampling, got attacks"),
        ("magnet", ("--budget", "0.0001"), "needs at least 9999 benign calibration images"),
        ("lid", ("--attack", "fgms"), "fgsm:epsilon=8/255, got"),
        ("lid", ("--layer", "elsewhere"), "no layer named 'elsewhere'"),
        ("lid", ("--references", "9000"), "Expected more than 9000 benign fitting images"),
    ],
)
def test_what_cannot_be_fitted_is_refused_in_a_sentence_and_publishes_nothing(
    digits_store, tmp_path, method, options, sentence
):
    shutil.copytree(digits_store, tmp_path / "store")
    status, output = fit(tmp_path / "store", method, *options)
    assert status == 1
    assert sentence in output
    assert Store.open(tmp_path / "store" / "models").versions("digits") == [1]
    assert json.loads(portcullis("fit", "list", "--json", "--store", tmp_path / "store")[1]) == []
