"""The scripts that measure are there as they are told of, and what they vary are plans that can be fitted."""

import re
from dataclasses import replace
from importlib import import_module

import pytest
import torch
import typer
from typer.testing import CliRunner

from defenses.classifier import Classifier
from defenses.coophance import FitPlan, Regulator
from defenses.onnx_gradient import gradient_graph
from defenses.onnx_trace import export_classifier
from loadtest.ablations import BASE, MEASURED, REUSES, TRAININGS, VARIATIONS, base, generalisation, table, trained_for
from loadtest.small_classifier import network
from service.cli import app


@pytest.mark.parametrize("variation", VARIATIONS)
def test_every_variation_is_a_plan_of_its_own(variation):
    plan = VARIATIONS[variation](base(2))
    assert (plan == base(2)) == (variation == BASE)
    Regulator(plan.regulator.config((3, 32, 32)))
    if variation in REUSES:
        used, device = TRAININGS[trained_for(variation)](base(2)).regulator, torch.device("cpu")
        assert plan.regulator.training(1000, 0, device) == used.training(1000, 0, device)
        structures = [each.config((3, 32, 32)) for each in (plan.regulator, used)]
        acting = [replace(each, inference_noise=0, confusion=True) for each in structures]
        assert acting[0] == acting[1], "what uses another's Regulator trains none of its own"


def test_one_variation_is_the_default():
    plans = {name: change(base(FitPlan().regulator.epochs)) for name, change in VARIATIONS.items()}
    assert [name for name, plan in plans.items() if plan == FitPlan()] == [
        "input noise 15/255 at inference, the default"
    ]


def test_the_table_shows_what_is_lost_and_resisted():
    clean = {"undefended_accuracy": 0.9, "accuracy": 0.85, "false_positive_rate": 0.05}
    rates = zip(MEASURED, (0.8, 0.9, 1.0, 0.7), strict=True)
    attacks = {name: {"resisted": rate, "auc": rate} for name, rate in rates}
    lines = table({"default": {"clean": clean, "attacks": attacks}}).splitlines()
    assert lines[2] == "| default | 5.0 | 5.0 | 80.0 | 90.0 | 100.0 | 70.0 | 85.0 | 85.0 |"
    assert lines[0].count("|") == lines[1].count("|") == lines[2].count("|")


def test_the_table_of_single_attacks_shows_what_was_fitted_on_which():
    attacks = {name: {"resisted": rate} for name, rate in zip(MEASURED, (0.8, 0.9, 1.0, 0.7), strict=True)}
    variations = {name: {"attacks": attacks} for name in ("fitted on cw, no fusion", "fitted on fgsm", "default")}
    lines = generalisation(variations).splitlines()
    assert lines[0] == f"| fitted on | {' | '.join(MEASURED)} |"
    assert lines[2:] == ["| fgsm | 80.0 | 90.0 | 100.0 | 70.0 |", "| cw, no fusion | 80.0 | 90.0 | 100.0 | 70.0 |"]


@pytest.mark.parametrize(
    "script",
    [
        "ablations",
        "bench",
        "correctness",
        "cost_model",
        "endurance",
        "engines",
        "image_sets",
        "inspector_seconds",
        "kill_fit",
        "nip_table",
        "overload",
        "small_classifier",
    ],
)
def test_scripts_say_what_they_take(script):
    command = typer.Typer()
    command.command()(import_module(f"loadtest.{script}").main)
    told = CliRunner().invoke(command, ["--help"])
    assert told.exit_code == 0
    assert "Usage" in told.output


def test_the_small_classifiers_can_be_registered_and_corrected(tmp_path):
    for side, width in ((32, 512), (64, 128)):
        model = network((3, side, side), 4).to(memory_format=torch.channels_last).eval()
        model = model.to(memory_format=torch.contiguous_format)
        path = tmp_path / f"small{side}.onnx"
        graph = export_classifier(model, (3, side, side))
        path.write_bytes(graph.SerializeToString())
        arguments = ["--onnx", str(path), "--labels", "a,b,c,d", "--store", str(tmp_path / "store")]
        result = CliRunner().invoke(app, ["register", f"small{side}", *arguments])
        assert result.exit_code == 0, result.output
        assert f"4 classes, input 3x{side}x{side}" in re.sub(r"\s+", " ", result.output)
        registered = Classifier.load(tmp_path / "store" / "models" / f"small{side}" / "1" / "model.onnx")
        assert registered.head_layer.shape == (width,)
        assert len(gradient_graph(registered, registered.head_layer.name).graph.node) > 20
        with torch.no_grad():
            assert model(torch.rand(2, 3, side, side)).shape == (2, 4)
