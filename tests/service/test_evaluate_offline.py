"""A published defense measured from the store, and a gateway measured from outside, with real attacks on digits."""

import json
import re
import shutil
import tempfile
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from typer.testing import CliRunner

from defenses.attacks import attack, craft
from defenses.checkpoint import load_protected, save_protected
from defenses.classifier import Classifier
from defenses.coophance import Inspector, InspectorConfig, Regulator, RegulatorConfig
from defenses.evaluation import run_batched
from defenses.evaluation.rates import interval_of
from defenses.onnx_export import export_protected, save_graph
from defenses.protected import ProtectedClassifier
from model_store import SERVING, DataRecord, Draft, FalsePositiveRate, InputSpec, Parent, Store
from service.cli import app
from service.client import Client
from service.datasets import Dataset, Split, load_dataset
from service.evaluate import Report, measure
from service.fit import find_classifier
from service.tables import report_table

pytestmark = pytest.mark.long

CPU = torch.device("cpu")
SPEC = InputSpec(shape=(1, 32, 32), mode="L", resize="bilinear")
ATTACKS = ("fgsm:epsilon=48/255", "deepfool:steps=8")
QUICK = ["--data", "digits", *(word for text in ATTACKS for word in ("--attack", text)), "--limit", "40"]
QUICK += ["--seed", "5", "--device", "cpu"]


def portcullis(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return load_dataset(["digits"], SPEC, labels=None, split_seed=0)


@pytest.fixture(scope="module")
def published(digits_store, tmp_path_factory, dataset) -> Path:
    """A store with a classifier of digits, trained for real, and version 2 with a small defense for it."""
    root = tmp_path_factory.mktemp("offline") / "store"
    shutil.copytree(digits_store, root)
    models = Store.open(root / "models")
    bare = models.fetch("digits", 1)
    protected = defended(Classifier.load(bare.folder / "model.onnx").eval(), dataset)
    draft = Draft(
        kind="coophance",
        input=bare.manifest.input,
        labels=bare.manifest.labels,
        parent=Parent(name="digits", version=1, digest=bare.digest),
        threshold=float(protected.threshold),
        false_positive_rate=FalsePositiveRate(budget=0.05, calibrated_on=200, realised=0.05, evaluated_on=200),
        data=DataRecord(name="digits", digest=dataset.digest, split_seed=0, counts={"test": len(dataset.test.targets)}),
    )
    with tempfile.TemporaryDirectory() as folder:
        save_protected(protected, Path(folder) / "checkpoint")
        save_graph(export_protected(protected), Path(folder) / "model.onnx")
        models.publish("digits", draft, Path(folder))
    models.set_alias("digits", SERVING, 2)
    return root


def defended(classifier: Classifier, dataset: Dataset) -> ProtectedClassifier:
    """Put the classifier behind a Regulator trained for a moment and an Inspector along one direction."""
    images, targets = torch.from_numpy(dataset.fit.images), torch.from_numpy(dataset.fit.targets)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        regulator = Regulator(RegulatorConfig(SPEC.shape, channels=(8, 8, 8, 8), skip_channels=(4, 4, 4, 4)))
        optimizer = torch.optim.Adam(regulator.parameters(), lr=0.01)
        for _ in range(50):
            x = images[torch.randint(len(images), (32,))] / 255
            noisy = (x + 0.1 * torch.randn_like(x)).clamp(0, 1)
            loss = F.binary_cross_entropy_with_logits(regulator.reconstruct(noisy, torch.ones(())), x)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        for layer in regulator.confusion_layers:
            layer.sigma.fill_(0.3)
    made = craft(
        attack("fgsm:epsilon=48/255"),
        classifier,
        images,
        targets,
        limit=200,
        device=CPU,
        seed=0,
        progress=lambda done, total: None,
    )
    tap = classifier.tap
    with torch.no_grad():
        clean, adversarial = (classifier.features(x, tap.name).flatten(1) for x in (made.x / 255, made.x_adv))
    inspector = Inspector(InspectorConfig(tap.name, tap.shape, classifier.classes))
    inspector.weight.data[:] = adversarial.mean(0) - clean.mean(0)
    protected = ProtectedClassifier(classifier, regulator.eval(), inspector.eval(), float("inf")).eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        scores = run_batched(protected, torch.from_numpy(dataset.calibration.images), CPU).scores
    protected.threshold.fill_(scores.quantile(0.95))
    return protected


@pytest.fixture(scope="module")
def report(published, tmp_path_factory) -> dict:
    """What is measured of version 2, as the command line prints and writes it."""
    path = tmp_path_factory.mktemp("report") / "scenario-a.json"
    status, output = portcullis("evaluate", "digits", *QUICK, "--store", published, "--json", "--output", path)
    assert status == 0, output
    assert json.loads(output) == json.loads(path.read_text())
    return json.loads(path.read_text())


def test_a_version_is_measured_from_the_store_without_a_gateway(report, published, dataset):
    manifest = Store.open(published / "models").manifest("digits", 2)
    (defense,) = report["defenses"]
    assert (defense["name"], defense["kind"], defense["method"]) == ("digits@2", "coophance", "coophance")
    assert defense["threshold"] == pytest.approx(manifest.threshold)
    assert defense["noisy"]
    clean = defense["clean"]
    assert clean["images"] == len(dataset.test.targets)
    assert clean["undefended_accuracy"] > 0.9
    accuracy, accepted, alerted = (clean[name] for name in ("accuracy", "accepted_accuracy", "false_positive_rate"))
    assert clean["undefended_accuracy"] >= accuracy["mean"] > accepted["mean"] > 0.3
    assert [len(rate["by_seed"]) for rate in (accuracy, accepted, alerted)] == [3, 3, 3]
    assert alerted["mean"] == pytest.approx(sum(alerted["by_seed"]) / 3)
    assert alerted["interval"][0] < alerted["mean"] < alerted["interval"][1]
    forms = [(row["attack"], row["form"]) for row in report["rows"]]
    assert forms == [(text, form) for text in ATTACKS for form in ("as crafted", "rounded")]
    for row in report["rows"]:
        assert (row["attempted"], row["scenario"], row["defense"]) == (40, "A", "digits@2")
        assert row["fooling"] > 5
        resisted = row["resisted"]
        assert resisted["mean"] >= max(row["corrected"]["mean"], row["alerted"]["mean"]) > 0
        interval = interval_of(round(resisted["mean"] * row["fooling"]), row["fooling"])
        assert resisted["interval"] == pytest.approx(interval)
        assert row["resisted_of_attempts"] == pytest.approx(1 - (1 - resisted["mean"]) * row["fooling"] / 40)
        assert 0.5 < row["auc"] <= 1
        assert row["curve"][-1] == [1, 1]
        if row["form"] == "as crafted":
            within = [row["success_within"][tries] for tries in ("1", "10", "100")]
            assert within == sorted(within)
        assert row["seconds_per_image"] > 0
    by_form = {(row["attack"], row["form"]): row for row in report["rows"]}
    least = [by_form[ATTACKS[1], form] for form in ("as crafted", "rounded")]
    assert least[0]["fooling"] >= least[1]["fooling"]
    assert least[0]["distortion_l2"] < by_form[ATTACKS[0], "as crafted"]["distortion_l2"]
    assert by_form[ATTACKS[0], "as crafted"]["distortion_linf"] == pytest.approx(48 / 255, abs=1e-3)


def test_a_report_holds_what_is_needed_to_repeat_it(report, dataset, published):
    plan = report["plan"]
    assert (plan["attacks"], plan["limit"], plan["seed"]) == (list(ATTACKS), 40, 5)
    assert (plan["confusion"], plan["noise"], plan["scenarios"]) == (None, True, ["A"])
    assert report["dataset"] == {"name": dataset.name, "digest": dataset.digest, "split_seed": 0}
    assert report["classifier"]["digest"] == Store.open(published / "models").fetch("digits", 1).digest
    assert report["command"].split()[0] == "portcullis"
    assert report["libraries"]["foolbox"] == "3.3.4"
    assert report["libraries"]["torch"].startswith("2.13.0")
    assert report["hardware"]["cpus"] >= 1
    assert report["hardware"]["device"]
    assert (report["complete"], report["attempted"], report["published"]) == (True, 40, [])
    fgsm, deepfool = report["rows"][0], report["rows"][2]
    assert fgsm["parameters"] == {"epsilon": pytest.approx(48 / 255)}
    assert (fgsm["norm"], fgsm["sees"]) == ("linf", "gradients")
    assert deepfool["parameters"] == {"steps": 8, "overshoot": 0.02}


def test_the_rates_are_those_of_the_defense_on_the_bare_classifiers_examples(report, published, dataset):
    models = Store.open(published / "models")
    classifier = Classifier.load(find_classifier(models, "digits", None).folder / "model.onnx").eval()
    protected = load_protected(classifier, models.fetch("digits", 2).folder / "checkpoint")
    order = np.random.default_rng(5).permutation(len(dataset.test.targets))
    made = craft(
        attack(ATTACKS[0]),
        classifier,
        torch.from_numpy(dataset.test.images[order]),
        torch.from_numpy(dataset.test.targets[order]),
        limit=40,
        device=CPU,
        seed=5,
        progress=lambda done, total: None,
    )
    y = made.y[made.fooled]
    row = report["rows"][0]
    assert row["fooling"] == len(y)
    for number, seed in enumerate((5, 6, 7)):
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            output = protected(made.x_adv[made.fooled])
        right = output.logits.argmax(1) == y
        assert row["corrected"]["by_seed"][number] == pytest.approx(right.double().mean().item())
        assert row["alerted"]["by_seed"][number] == pytest.approx(output.alerts.double().mean().item())
        resisted = (right | output.alerts).double().mean().item()
        assert row["resisted"]["by_seed"][number] == pytest.approx(resisted)
    assert row["distortion_l2"] == pytest.approx(made.distortion)


def untimed(report: dict) -> dict:
    """Return a report without what the clock says."""
    timed = ("seconds_per_image", "milliseconds", "bare_milliseconds")
    lists = {
        name: [{key: value for key, value in each.items() if key not in timed} for each in report[name]]
        for name in ("rows", "defenses")
    }
    return {**report, **lists, "command": None}


def test_the_same_command_measures_the_same_whether_examples_are_kept_or_not(report, published, tmp_path):
    for cache in ([], ["--cache", tmp_path / "elsewhere"]):
        again = json.loads(portcullis("evaluate", "digits@2", *QUICK, *cache, "--store", published, "--json")[1])
        assert untimed(again) == untimed(report)


def test_noise_and_confusion_can_be_switched_off(report, published):
    arguments = [*QUICK, "--store", published, "--json", "--clean"]
    rows = [
        json.loads(portcullis("evaluate", "digits", *arguments, *more)[1])["defenses"][0]
        for more in (["--no-noise"], ["--no-confusion"], ["--no-noise", "--seed", 5])
    ]
    # This defense has no noise but the confusion's.
    assert rows[0]["clean"] == rows[1]["clean"] == rows[2]["clean"]
    assert rows[0]["clean"]["accuracy"]["mean"] != report["defenses"][0]["clean"]["accuracy"]["mean"]
    assert not any(row["noisy"] for row in rows)
    assert rows[0]["lottery"] is None
    assert report["defenses"][0]["lottery"]["submissions"] == 16


def test_the_tables_show_both_forms_and_the_clean_rates(report, published):
    status, output = portcullis("evaluate", "digits", *QUICK, "--store", published)
    assert status == 0, output
    text = re.sub(r"\s+", " ", output)
    (defense,) = report["defenses"]
    assert f"{100 * defense['clean']['accuracy']['mean']:.2f} %" in text
    assert "Answered: with the true class" in text
    as_crafted, rounded = text.split("bare classifier, as crafted")[1].split("bare classifier, rounded to 8 bits")
    for row, shown in zip(report["rows"], (as_crafted, rounded, as_crafted, rounded), strict=True):
        assert f"{row['fooling']}/40" in shown
        assert f"{100 * row['resisted']['mean']:.1f} %" in shown
        assert f"{row['auc']:.3f}" in shown
    passed = sum(check["passed"] for check in report["checks"])
    assert f"sanity checks: {passed} of {len(report['checks'])} passed" in text


def test_a_classifier_is_measured_as_a_control_beside_its_defense(published):
    status, output = portcullis("evaluate", "digits@1", "digits@2", *QUICK, "--store", published, "--json")
    assert status == 0, output
    report = json.loads(output)
    control, defense = report["defenses"]
    assert (control["name"], control["method"], control["threshold"], control["noisy"]) == (
        "digits@1",
        "none",
        None,
        False,
    )
    assert control["clean"]["accuracy"]["mean"] == control["clean"]["undefended_accuracy"]
    assert control["clean"]["false_positive_rate"]["mean"] == 0 < defense["clean"]["false_positive_rate"]["mean"]
    for row in report["rows"]:
        if row["defense"] == "digits@1":
            assert (row["resisted"]["mean"], row["auc"], row["success_within"]) == (0, None, None)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["letters"], "letters"),
        (["digits@7"], "7"),
        (["digits", "--attack", "fgms"], "Expected an attack such as fgsm"),
        (["digits", "--output", "nowhere/report.json"], "There is no folder"),
        (["digits@2", "--url", "http://127.0.0.1:9"], "Expected a name without a version"),
        (["digits", "--url", "http://127.0.0.1:9", "--no-noise"], "are for a measurement without --url"),
        (["digits", "--url", "http://127.0.0.1:9", "--device", "cpu"], "is for a measurement without --url"),
        (["digits", "--url", "http://127.0.0.1:9", "--scenario", "B"], "are for a measurement without --url"),
        (["digits", "--scenario", "C"], "Expected the scenarios A, B and transfer, got C."),
        (["digits", "--attack", "joint"], "joint is made for scenario B, and asked for is scenario A alone."),
        (["digits", "--attack", "fgsm", "--attack", "s-ala", "--scenario", "B"], "s-ala is made for scenario A, and"),
        (["digits", "--attack", "auna", "--scenario", "transfer"], "auna is made for scenarios A and B, and asked"),
        (["digits", "--sweep", "joint@weight=1,2"], "joint:weight=1 is made for scenario B, and asked for"),
        (["digits", "--sweep", "fgsm@epsilon"], "there is no parameter with values behind an @"),
        (["digits", "--sweep", "fgsm@steps=1,2"], "Expected an attack such as fgsm"),
        (["digits@1", "--no-noise"], "are for a defense that has noise, and digits@1 has none"),
        (["digits", "--url", "http://127.0.0.1:9"], "No gateway answers at"),
    ],
)
def test_what_cannot_be_measured_is_refused_with_the_reason(published, arguments, told):
    status, output = portcullis("evaluate", *arguments, "--data", "digits", "--store", published)
    assert status == 1
    assert told in re.sub(r"\s+", " ", output)


@pytest.mark.parametrize("scenarios", ["AB", "B"])
def test_a_gradient_that_is_dead_on_the_defense_alone_is_caught(published, scenarios):
    """The bare classifier is broken as ever, and more steps gain as little as before: only the defense looks strong."""
    attacks = ("pgd", "pgd-detached")
    ball = "epsilon=32/255,step_size=8/255,steps=8"
    words = [word for name in attacks for word in ("--attack", f"{name}:{ball}")]
    words += [word for scenario in scenarios for word in ("--scenario", scenario)]
    words += ["--limit", "20", "--samples", "2", "--lottery", "0", "--noise-seeds", "1", "--device", "cpu"]
    status, output = portcullis("evaluate", "digits@2", "--data", "digits", *words, "--store", published, "--json")
    assert status == 0, output
    report = json.loads(output)
    rows = {(row["family"], row["scenario"]): row for row in report["rows"] if row["form"] == "as crafted"}
    sound, dead = (rows[name, "B"] for name in attacks)
    assert dead["resisted"]["mean"] >= sound["resisted"]["mean"], "what is sound may be alerted of, all of it"
    assert dead["corrected"]["mean"] > sound["corrected"]["mean"], "it looks like a defense that holds"
    caught = {"turns answers of the defense", *(["knowing the defense helps the attacker"] if "A" in scenarios else [])}
    assert set(dead["untrusted"]) == caught
    assert {"breaks the undefended classifier", "more effort wins no more", *caught} <= set(dead["checked"])
    assert sound["untrusted"] == []
    if "A" in scenarios:
        assert rows["pgd-detached", "A"]["untrusted"] == []
        assert rows["pgd-detached", "A"]["resisted"] == rows["pgd", "A"]["resisted"]


def test_other_images_than_those_fitted_on_are_told_of(published, tmp_path, dataset):
    from PIL import Image

    for row, (image, target) in enumerate(zip(dataset.test.images[:200], dataset.test.targets[:200], strict=True)):
        folder = tmp_path / "images" / dataset.labels[target]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0]).save(folder / f"{row}.png")
    arguments = ["--data", tmp_path / "images", "--store", published, "--clean"]
    status, output = portcullis("evaluate", "digits", *arguments)
    assert status == 0, output
    assert "was fitted on other images than these" in re.sub(r"\s+", " ", output)


def test_a_gateway_is_sent_only_what_fools_after_rounding_which_may_be_nothing(server, protected, dark):
    images = dark(60)
    classifier = protected.classifier
    with torch.no_grad():
        targets = classifier(torch.from_numpy(images) / 255).argmax(1).numpy()
    test = Split(images, targets, tuple(map(str, range(60))))
    attacks = ["deepfool:overshoot=0.00001", "fgsm:epsilon=1/100000", "fgsm:epsilon=60/255"]
    with closing(Client(server.url)) as client:
        measured = measure(
            client,
            "digits",
            classifier,
            test,
            attacks=attacks,
            limit=40,
            seed=0,
            progress=lambda stage, done, total: None,
        )
        report = Report.of("digits", client.served("digits"), measured)
    barely, nothing, strong = report.attacks
    assert barely.fooling < barely.fooling_as_crafted
    assert (nothing.attempted, nothing.fooling, nothing.distortion_l2) == (40, 0, None)
    assert (nothing.undefended_accuracy, nothing.corrected, nothing.resisted) == (None, None, None)
    assert strong.fooling == len(measured[3].targets) > 5
    assert strong.undefended_accuracy == 0
    assert strong.resisted == pytest.approx((measured[3].right | measured[3].alerted).double().mean().item())
    assert strong.resisted_interval[0] <= strong.resisted <= strong.resisted_interval[1]
    assert json.loads(json.dumps(report.as_json()))["attacks"][1]["resisted"] is None
    cells = [list(column.cells) for column in report_table(report).columns]
    assert [column[2] for column in cells] == ["fgsm", "40", "0", "-", "-", "-", "-", "-"]
