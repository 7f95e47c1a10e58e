"""A published NIP defense measured from the store, beside its controls and its oracle, and through HTTP."""

import json
import re

import pytest
import torch
from typer.testing import CliRunner

from defenses.attacks import AdversarialExamples, attack, craft
from defenses.checkpoint import load_protected
from defenses.classifier import Classifier
from defenses.coophance import Regulator, RegulatorConfig
from defenses.nip import CleanSuccess, DefenseSuccess, oracle_answers
from defenses.protected import ProtectedClassifier
from model_store import Store
from service.cli import app
from service.datasets import Dataset, load_dataset
from service.evaluate import in_seeded_order

CPU = torch.device("cpu")
ATTACKS = ("fgsm:epsilon=24/255", "deepfool:overshoot=0.5")
QUICK = ["--data", "digits", *(word for text in ATTACKS for word in ("--attack", text)), "--limit", "60"]
QUICK += ["--seed", "5", "--device", "cpu"]
DIRECTIONS = ["nearest", "random", "gaussian", "oracle"]


def portcullis(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


@pytest.fixture(scope="module")
def report(nip_store) -> dict:
    """What is measured of version 2 with its controls, as the command line prints it."""
    status, output = portcullis("evaluate", "digits", *QUICK, "--controls", "--store", nip_store, "--json")
    assert status == 0, output
    return json.loads(output)


@pytest.fixture(scope="module")
def defended(nip_store) -> ProtectedClassifier:
    classifier = Classifier.load(nip_store / "models/digits/1/model.onnx").eval()
    return load_protected(classifier, nip_store / "models/digits/2/checkpoint")


@pytest.fixture(scope="module")
def dataset(nip_store) -> Dataset:
    manifest = Store.open(nip_store / "models").manifest("digits", 2)
    return load_dataset(["digits"], manifest.input, labels=manifest.labels, split_seed=0)


@pytest.fixture(scope="module")
def examples(defended, dataset) -> AdversarialExamples:
    images, targets = in_seeded_order(dataset.test, 5)
    return craft(
        attack(ATTACKS[1]),
        defended.classifier,
        images,
        targets,
        limit=60,
        device=CPU,
        seed=5,
        progress=lambda done, total: None,
    )


def rows_of(report: dict, direction: str, name: str) -> dict[str, dict]:
    return {row["form"]: row for row in report["rows"] if (row["direction"], row["attack"]) == (direction, name)}


def test_a_report_holds_each_direction_over_the_same_examples(report, nip_store, dataset):
    manifest = Store.open(nip_store / "models").manifest("digits", 2)
    assert (report["model"], report["version"], report["threshold"]) == ("digits", 2, None)
    assert report["amplitude"] == manifest.options["strength"]["amplitude"]
    assert report["plan"] == {"attacks": list(ATTACKS), "limit": 60, "seed": 5}
    assert report["dataset"] == {"name": dataset.name, "digest": dataset.digest, "split_seed": 0}
    assert [run["attack"] for run in report["attacks"]] == list(ATTACKS)
    assert report["command"].split()[0] == "portcullis"
    assert [row["direction"] for row in report["clean"]] == DIRECTIONS[:3]
    nearest = report["clean"][0]
    assert nearest["accuracy"] == pytest.approx(manifest.metrics["clean_accuracy"])
    assert nearest["undefended_accuracy"] == pytest.approx(manifest.metrics["clean_accuracy_undefended"])
    assert nearest["images"] == len(dataset.test.targets)
    for row in report["clean"]:
        assert row["accuracy_interval"][0] < row["accuracy"] < row["accuracy_interval"][1]
        assert row["moved_l2"] == pytest.approx(nearest["moved_l2"], rel=0.25), "the controls move as far"
    forms = [(row["attack"], row["direction"], row["form"]) for row in report["rows"]]
    assert forms == [
        (name, direction, form) for name in ATTACKS for direction in DIRECTIONS for form in ("as crafted", "rounded")
    ]
    for name in ATTACKS:
        for form in ("as crafted", "rounded"):
            measured = [rows_of(report, direction, name)[form] for direction in DIRECTIONS]
            assert len({(row["attempted"], row["fooling"], row["distortion_l2"]) for row in measured}) == 1
            for row in measured:
                assert row["attempted"] == 60
                assert row["fooling"] > 10
                assert row["success_interval"][0] <= row["success"] <= row["success_interval"][1]
                assert row["moved_l2"] > 0


def test_the_rates_are_those_of_the_defense_and_of_the_oracle(report, defended, examples):
    y, x_adv = examples.y[examples.fooled], examples.x_adv[examples.fooled]
    with torch.no_grad():
        output = defended(x_adv)
    row = rows_of(report, "nearest", ATTACKS[1])["as crafted"]
    assert row["fooling"] == len(y)
    assert row["success"] == pytest.approx((output.logits.argmax(1) == y).double().mean().item())
    assert row["moved_l2"] == pytest.approx((output.purified - x_adv).flatten(1).norm(dim=1).mean().item(), rel=1e-4)
    config = defended.purifier.config
    answers = oracle_answers(
        defended.classifier,
        defended.purifier.head,
        config.layer,
        examples.x[examples.fooled],
        x_adv,
        k1=config.k1,
        k2=config.k2,
        amplitude=config.amplitude,
        batch_size=16,
        device=CPU,
    )
    oracle = rows_of(report, "oracle", ATTACKS[1])["as crafted"]
    assert oracle["success"] == pytest.approx((answers.logits.argmax(1) == y).double().mean().item())
    assert oracle["success"] >= row["success"], "it knows the clean image"


def test_each_measurement_stands_alone_and_leaves_the_defense_as_it_was(defended, dataset, examples):
    success = DefenseSuccess.of(defended, CPU, 5)
    images, targets = in_seeded_order(dataset.test, 5)

    def measured() -> tuple[CleanSuccess, object]:
        return success.clean(images, targets, "gaussian"), success.attacked(examples, "random")

    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first = measured()
    assert torch.equal(torch.rand(3), expected)
    assert defended.purifier.control is None
    assert measured() == first
    assert success.clean(images, targets, "nearest") != success.clean(images, targets, "random")


def test_a_defense_that_moves_along_no_candidate_is_no_subject(defended):
    regulator = Regulator(RegulatorConfig((1, 32, 32), channels=(4, 4), skip_channels=(2, 2)))
    other = ProtectedClassifier(defended.classifier, regulator, defended.detector)
    with pytest.raises(TypeError, match="Expected an InversePerturbation, got a Regulator"):
        DefenseSuccess.of(other, CPU, 0)


def test_an_attack_that_fools_nothing_has_no_rate(nip_store):
    arguments = ("--data", "digits", "--attack", "fgsm:epsilon=1/100000", "--limit", "10", "--controls")
    status, output = portcullis("evaluate", "digits", *arguments, "--store", nip_store, "--json")
    assert status == 0, output
    for row in json.loads(output)["rows"]:
        assert (row["attempted"], row["fooling"], row["success"], row["success_interval"]) == (10, 0, None, None)


def test_without_controls_only_what_is_served_is_measured(report, nip_store):
    status, output = portcullis("evaluate", "digits@2", *QUICK, "--store", nip_store, "--json")
    assert status == 0, output
    measured = json.loads(output)
    (defense,) = measured["defenses"]
    assert (defense["method"], defense["threshold"], defense["noisy"]) == ("nip", None, False)
    assert defense["clean"]["accuracy"]["mean"] == report["clean"][0]["accuracy"]
    first = ATTACKS[0]
    for row in measured["rows"]:
        if row["attack"] == first:
            served = rows_of(report, "nearest", first)[row["form"]]
            assert row["fooling"] == served["fooling"]
            assert row["resisted"]["mean"] == row["corrected"]["mean"] == pytest.approx(served["success"])
            assert (row["alerted"]["mean"], row["auc"], row["success_within"]) == (0, None, None)


def test_the_table_names_the_oracle_as_what_it_is(nip_store):
    arguments = ("--data", "digits", "--attack", ATTACKS[0], "--limit", "10", "--controls", "--store", nip_store)
    text = re.sub(r"\s+", " ", portcullis("evaluate", "digits", *arguments)[1])
    assert "by the oracle, which knows the clean image." in text
    for direction in DIRECTIONS:
        assert f" {direction} " in text


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["digits", "--no-noise"], "--confusion and --noise are for a defense that has noise, and digits has none."),
        (["digits", "--no-confusion"], "are for a defense that has noise"),
        (["digits@1", "--controls"], "got digits@1, which is of kind classifier"),
        (["digits", "--url", "http://127.0.0.1:9", "--controls"], "are for a measurement without --url"),
        (["digits", "--scenario", "B", "--controls"], "--controls is for scenario A alone"),
    ],
)
def test_what_cannot_be_measured_is_refused_with_the_reason(nip_store, arguments, told):
    status, output = portcullis("evaluate", *arguments, "--data", "digits", "--store", nip_store)
    assert status == 1
    assert told in re.sub(r"\s+", " ", output)


def test_it_is_measured_through_http_too(nip_store, serve, report):
    arguments = ["--data", "digits", "--store", nip_store, "--json", "--limit", "60", "--seed", "5"]
    with serve(store=nip_store, models="digits") as server:
        status, output = portcullis("evaluate", "digits", *arguments, "--attack", ATTACKS[1], "--url", server.url)
    assert status == 0, output
    measured = json.loads(output)
    (row,) = measured["attacks"]
    rounded = rows_of(report, "nearest", ATTACKS[1])["rounded"]
    assert (row["fooling"], row["alerted"], measured["clean"]["false_positive_rate"]) == (rounded["fooling"], 0, 0)
    assert row["corrected"] == pytest.approx(rounded["success"])
