"""What no fit can be made of is refused before the training, and what needs no attacked images is fitted without."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from defenses.attacks import ATTACKS, AttackUnsuitable, attack_to_fit
from defenses.attacks.planted import PLANTED
from defenses.calibration import CalibrationTooSmall
from defenses.classifier import Classifier
from defenses.coophance import FitPlan, Fitted, InspectorPlan, Regulator, RegulatorConfig, RegulatorPlan, fit_coophance
from defenses.coophance.selection import NothingToChooseBy
from defenses.onnx_import import canonicalise
from defenses.onnx_trace import export_classifier
from defenses.splits import LabelledImages, Splits
from defenses.stages import Stages

SHAPE = (1, 8, 8)
CPU = torch.device("cpu")
FOOLED, UNTOUCHED = 120, 20
"""How bright a dark image is that the attack makes bright, and one that it does not."""

PAPER = replace(
    FitPlan.paper(),
    attacks=("fgsm:epsilon=8/255",),
    regulator=replace(FitPlan.paper().regulator, channels=(4, 4), skip_channels=(2, 2), epochs=1, batch_size=16),
)


class Brightness(nn.Module):
    """Answers 1 for images brighter than a half, else 0; of three classes the last is never answered."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 2, 1)
        self.pool = nn.AvgPool2d(2)
        self.head = nn.Linear(2, 3)
        with torch.no_grad():
            self.first.weight.copy_(torch.tensor([[[[1.0]]], [[[-1.0]]]]))
            self.first.bias.copy_(torch.tensor([-0.5, 0.5]))
            self.head.weight.copy_(torch.tensor([[0.0, 20.0], [20.0, 0.0], [0.0, 0.0]]))
            self.head.bias.copy_(torch.tensor([0.0, 0.0, -30.0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.pool(self.first(x).relu()).mean((2, 3)))


def images(count: int, level: int, targets: int = 2) -> LabelledImages:
    """Return images that lie as far below the middle as ``level`` says, or as far above, in turns."""
    y = torch.arange(count) % targets
    noise = torch.randint(-4, 5, (count, *SHAPE), generator=torch.Generator().manual_seed(count))
    return LabelledImages((torch.where(y == 0, level, 255 - level).reshape(-1, 1, 1, 1) + noise).byte(), y)


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    return Classifier(canonicalise(export_classifier(Brightness().eval(), SHAPE))).eval()


@pytest.fixture
def fit(classifier, tmp_path):
    """Fit on splits whose validation images no attack moves far enough; what is kept lies in ``tmp_path``."""
    splits = Splits(images(64, FOOLED), images(40, UNTOUCHED), images(60, FOOLED, 3), images(40, FOOLED))

    def run(plan: FitPlan, regulator: Regulator | None = None) -> Fitted:
        return fit_coophance(
            classifier,
            splits,
            plan,
            stages=Stages(tmp_path),
            regulator=regulator,
            device=CPU,
            progress=lambda stage, done, total: None,
        )

    return run


def kept(folder: Path) -> list[str]:
    return [name for name in Stages(folder).names() if "examples" not in name]


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({}, "the stopping point, the strength, the inverse penalty, the weights of the fusion"),
        ({"strength": 1.0, "inspector": InspectorPlan(fusion=False, inverse_penalty=1.0)}, "the stopping point"),
        ({"strength": 1.0, "regulator": RegulatorPlan(stop="last")}, "the inverse penalty, the weights of the fusion"),
    ],
)
def test_attacks_that_fool_no_validation_image_are_refused_before_the_training(fit, tmp_path, changes, what):
    with pytest.raises(NothingToChooseBy, match=f"to choose {what} by; there are none"):
        fit(replace(FitPlan(attacks=PAPER.attacks), **changes))
    assert kept(tmp_path) == []


def test_what_nothing_is_chosen_for_is_fitted_without_them(fit):
    fitted = fit(PAPER)
    assert fitted.selection.chosen.corrected is None
    assert fitted.selection.chosen.step == fitted.training.steps
    assert (fitted.inspector.inverse_penalty, fitted.inspector.areas) == (10, {})
    assert torch.isfinite(fitted.calibration_scores).all()


def test_a_regulator_that_is_used_again_has_no_stopping_point(fit, tmp_path):
    reused = Regulator(RegulatorConfig(SHAPE, channels=(4, 4), skip_channels=(2, 2))).eval()
    wanted = replace(PAPER, strength=None)
    with pytest.raises(NothingToChooseBy) as caught:
        fit(replace(wanted, regulator=replace(wanted.regulator, stop="validated")), reused)
    assert caught.value.what == ("the strength",)
    assert kept(tmp_path) == []


def test_a_class_that_the_classifier_gives_too_few_calibration_images_is_refused_at_once(fit, tmp_path):
    # There are 20 calibration images of each of the three classes, but all of the last are given another.
    plan = replace(PAPER, budget=0.2, inspector=replace(PAPER.inspector, thresholds="class"))
    with pytest.raises(CalibrationTooSmall, match="at least 4 benign calibration images that are given class 2, got 0"):
        fit(plan)
    assert Stages(tmp_path).names() == []


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("joint:steps=5", "is run on a defense"),
        ("other-image", "takes another image"),
        ("pgd-blind", "is broken on purpose"),
    ],
)
def test_attacks_that_no_defense_can_be_fitted_to_are_refused_at_once(fit, tmp_path, text, reason):
    with pytest.raises(AttackUnsuitable, match=f"such as fgsm or pgd-stop, got '{text}', which {reason}"):
        fit(replace(PAPER, attacks=("fgsm", text)))
    assert Stages(tmp_path).names() == []


def test_every_attack_on_a_bare_classifier_can_be_fitted_to_but_those():
    refused = set()
    for name in ATTACKS:
        try:
            attack_to_fit(name)
        except AttackUnsuitable:
            refused.add(name)
    on_defenses = {name for name, entry in ATTACKS.items() if entry.facts.on == "defense"}
    assert "joint" in on_defenses
    assert refused == {*on_defenses, *PLANTED, "other-image"}
