"""What the sanity checks say of rows, and what an evaluation takes for noise."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from defenses.architectures import cifar_resnet
from defenses.attacks import attack
from defenses.classifier import Classifier
from defenses.detector import Detector
from defenses.evaluation import sanity
from defenses.evaluation.lottery import Draws
from defenses.evaluation.plan import EvaluationPlan, ScenarioMissing, Sweep, doubled, efforts_of
from defenses.evaluation.rates import interval_of
from defenses.evaluation.rows import AttackResult, Rate, SweepResult
from defenses.judge import AlertedAnswer
from defenses.onnx_trace import export_classifier
from defenses.protected import ProtectedClassifier
from defenses.purifier import Purifier

HALF = Rate(0.5, (0.5,), (0.4, 0.6))

ROW = AttackResult(
    defense="digits@2",
    scenario="B",
    attack="pgd",
    family="pgd",
    parameters={"epsilon": 0.1},
    norm="linf",
    sees="gradients",
    form="as crafted",
    attempted=100,
    fooling=50,
    distortion_l2=1.0,
    distortion_linf=0.1,
    corrected=HALF,
    alerted=HALF,
    resisted=HALF,
    resisted_of_attempts=0.5,
    resisted_of_fooling=0.5,
    auc=None,
    detector_auc=None,
    curve=(),
    success_within=None,
    seconds_per_image=0.1,
)


def row(attack: str, resisted: float, **changes: object) -> AttackResult:
    return replace(ROW, attack=attack, resisted_of_attempts=resisted, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(("share", "passed"), [(0.49, False), (0.5, True), (1.0, True)])
def test_an_attack_must_turn_half_of_the_bare_answers(share, passed):
    (check,) = sanity.breaks_the_undefended({"pgd": share})
    assert (check.passed, check.attacks, check.defense) == (passed, ("pgd",), None)


@pytest.mark.parametrize(("black", "passed"), [(0.5, True), (0.46, True), (0.44, False)])
def test_a_black_box_of_the_same_budget_may_win_five_points_more_and_no_more(black, passed):
    rows = [row("pgd", 0.5), row("fgsm", 0.9), row("square", black, sees="scores")]
    (check,) = sanity.white_box_is_best(rows)
    assert check.passed == passed
    assert check.attacks == ("pgd", "fgsm")


def test_attacks_that_look_for_the_least_distance_are_compared_by_what_they_win():
    least = {"parameters": {"steps": 50}, "norm": "l2"}
    white, bounded = row("cw", 0.6, **least), row("pgd-l2", 0.1, norm="l2")
    for resisted, passed in ((0.6, True), (0.5, False)):
        rows = [white, bounded, row("boundary", resisted, sees="labels", **least)]
        check, missing = sanity.white_box_is_best(rows)
        assert (check.passed, check.attacks) == (passed, ("cw",))
        assert "l2 without a budget: cw wins 40.0 %, boundary" in check.told
        assert (missing.passed, missing.attacks) == (None, ("pgd-l2",))


def test_a_box_without_a_partner_is_told_and_neither_trusted_nor_distrusted_for_it():
    rows = [
        row("pgd", 0.5),
        row("square", 0.0, sees="scores", parameters={"epsilon": 0.2}),
        row("pgd-stop", 0.5, norm="none", parameters={}),
        row("one-pixel", 0.2, sees="scores", norm="l0", parameters={"pixels": 1}),
        row("other-image", 0.0, sees="labels", norm="none", parameters={}),
    ]
    (missing,) = sanity.white_box_is_best(rows)
    assert missing.passed is None
    assert missing.told == (
        "Not compared: on digits@2 no black box of the same norm and budget was run beside pgd, pgd-stop, and no white "
        "box of the same norm and budget was run beside square, one-pixel."
    )
    assert all(sanity.untrusted_by([missing], each) == sanity.checked_by([missing], each) == () for each in rows)


@pytest.mark.parametrize(("blind", "passed"), [(0.5, True), (0.46, True), (0.3, False)])
def test_an_attacker_who_knows_the_defense_must_not_do_worse(blind, passed):
    (check,) = sanity.knowledge_helps([row("pgd", 0.5), row("pgd", blind, scenario="A")])
    assert check.passed == passed
    assert "when crafted on digits@2" in check.told


def wrong(share: float) -> Rate:
    return Rate(1 - share, (1 - share,), (0.0, 1.0))


@pytest.mark.parametrize(("share", "passed"), [(0.9, True), (0.38, True), (0.2, False)])
def test_an_attack_that_turns_less_with_knowledge_is_caught_where_all_is_alerted(share, passed):
    """Nothing is won on either side: all that is turned is alerted."""
    blind = row("pgd", 1.0, scenario="A", fooling=80, corrected=wrong(0.5))
    assert sanity.turned(blind) == pytest.approx(0.4)
    (check,) = sanity.knowledge_helps([row("pgd", 1.0, corrected=wrong(share)), blind])
    assert check.passed == passed
    assert f"turns {100 * share:.1f} % when crafted on digits@2, and 0.0 % and 40.0 %" in check.told


@pytest.mark.parametrize(("share", "passed"), [(1.0, True), (0.41, True), (0.39, False), (0.0, False)])
def test_a_white_box_must_turn_half_as_many_answers_of_the_defense_as_of_the_bare_classifier(share, passed):
    rows = [row("pgd", 1.0, corrected=wrong(share)), row("square", 1.0, sees="scores", corrected=wrong(share))]
    (check,) = sanity.turns_the_defense(rows, {"pgd": 0.9, "square": 0.9})
    assert (check.passed, check.attacks, check.scenario) == (passed, ("pgd",), "B")
    assert "90.0 % of the bare ones; at least 40.0 % are expected." in check.told
    assert list(sanity.turns_the_defense(rows, {})) == []
    assert sanity.turned(row("pgd", 1.0, corrected=None)) == 0


@pytest.mark.parametrize(
    ("accuracy", "passed"), [((0.9, 0.5, 0.0), True), ((0.9, 0.5, 0.2), False), ((0.5, 0.9, 0.0), False)]
)
def test_a_growing_budget_must_break_everything_on_the_way_down(accuracy, passed):
    sweep = SweepResult(
        "digits@2",
        "B",
        "pgd@epsilon=1,2,3",
        "epsilon",
        (1, 2, 3),
        ("a", "b", "c"),
        accuracy,
        (1, 2, 3),
        *[(False,) * 3] * 2,
    )
    (check,) = sanity.budget_breaks_all([sweep])
    assert check.passed == passed
    assert list(sanity.budget_breaks_all([replace(sweep, scenario="A")])) == []
    assert list(sanity.budget_breaks_all([replace(sweep, parameter="confidence")])) == []


@pytest.mark.parametrize(("after", "passed"), [(0.3, True), (0.6, True), (0.61, False)])
def test_twice_the_effort_may_win_ten_points_more(after, passed):
    assert sanity.gains_little("steps", "digits@2", "pgd", 0.5, after, 50).passed == passed


def test_a_failed_check_marks_the_rows_that_it_is_about_and_no_others():
    (failed,) = sanity.breaks_the_undefended({"pgd": 0.1})
    (of_one,) = sanity.knowledge_helps([row("fgsm", 0.9), row("fgsm", 0.1, scenario="A")])
    checks = [failed, of_one]
    assert sanity.untrusted_by(checks, row("pgd", 0.5, scenario="A")) == (failed.name,)
    assert sanity.untrusted_by(checks, row("fgsm", 0.5)) == (of_one.name,)
    assert sanity.untrusted_by(checks, row("fgsm", 0.5, scenario="A")) == ()
    assert sanity.untrusted_by(checks, row("fgsm", 0.5, defense="digits@3")) == ()


def test_a_row_knows_the_checks_that_looked_at_it_whether_it_passed_or_failed():
    checks = [*sanity.breaks_the_undefended({"pgd": 0.9}), *sanity.repeats({"pgd": False})]
    (of_one,) = sanity.knowledge_helps([row("fgsm", 0.5), row("fgsm", 0.5, scenario="A")])
    checks.append(of_one)
    assert sanity.checked_by(checks, row("pgd", 0.5)) == (checks[0].name, checks[1].name)
    assert sanity.checked_by(checks, row("fgsm", 0.5)) == (of_one.name,)
    assert sanity.checked_by(checks, row("fgsm", 0.5, scenario="A")) == ()
    assert row("fgsm", 0.5).unchecked
    assert not row("fgsm", 0.5, checked=(of_one.name,)).unchecked


@pytest.mark.parametrize(
    ("name", "efforts"),
    [
        ("cw", ("steps", "searches")),
        ("uap", ("max_iter",)),
        ("autoattack-rand", ("samples",)),
        ("square", ("queries",)),
        ("auna", ("repeats",)),
        ("one-pixel", ("max_iter",)),
        ("boundary", ()),
        ("fgsm", ()),
    ],
)
def test_how_long_an_attack_tries_is_known_of_black_boxes_too(name, efforts):
    assert efforts_of(attack(name)) == efforts
    for parameter in efforts:
        assert doubled(attack(name), parameter).parameters[parameter] == 2 * attack(name).parameters[parameter]


def test_the_interval_is_that_of_the_mean():
    found = Rate.over([0.2, 0.4, 0.6], 10)
    assert found is not None
    assert found.mean == pytest.approx(0.4)
    assert found.interval == interval_of(4, 10) != interval_of(2, 10)
    assert Rate.over([None], 10) is None


def test_an_attack_that_is_made_for_no_scenario_asked_for_is_refused():
    with pytest.raises(
        ScenarioMissing, match="joint is made for scenario B, and asked for is scenarios A and transfer"
    ):
        EvaluationPlan(attacks=("pgd", "joint"), scenarios=("A", "transfer")).parsed()
    with pytest.raises(
        ScenarioMissing, match="s-ala:epsilon=1/255 is made for scenario A, and asked for is scenario B"
    ):
        EvaluationPlan(attacks=(), sweeps=("s-ala@epsilon=1/255",), scenarios=("B",)).parsed()
    mixed = EvaluationPlan(attacks=("joint", "s-ala", "auna", "pgd"), scenarios=("A", "B"))
    assert [each.name for each in mixed.parsed()[0]] == list(mixed.attacks)


def test_a_sweep_is_taken_in_the_order_of_its_values():
    sweep = Sweep.parse("pgd:steps=3@epsilon=8/255,1/255,4/255")
    assert sweep.values == pytest.approx([1 / 255, 4 / 255, 8 / 255])
    assert [each.parameters["steps"] for each in sweep.attacks] == [3, 3, 3]


class Jitter(Purifier):
    """Adds a little noise to every image."""

    def forward(self, x: Tensor, noise_scale: Tensor) -> Tensor:
        return (x + 0.1 * noise_scale * torch.randn_like(x)).clamp(0, 1)


class NeverSure(Detector):
    """Scores every image the same."""

    def __init__(self) -> None:
        super().__init__(None, "raw")

    def forward(self, activations: Tensor, logits: Tensor, undefended_logits: Tensor, distance: Tensor) -> Tensor:
        return logits.new_zeros(len(logits))


def test_a_defense_whose_noise_reaches_no_clean_answer_is_noisy_all_the_same():
    """Behind alerts alone noise changes the answers of attacked images and of no clean one."""
    torch.manual_seed(0)
    classifier = Classifier(export_classifier(cifar_resnet(8).eval(), (3, 32, 32))).eval()
    gated = ProtectedClassifier(classifier, Jitter(), NeverSure(), 1.0, judge=AlertedAnswer()).eval()
    images = torch.full((4, *classifier.image_shape), 90, dtype=torch.uint8)
    with torch.no_grad():
        first, second = gated(images / 255), gated(images / 255)
    assert torch.equal(first.logits, second.logits)
    assert Draws(gated, torch.device("cpu"), 0).noisy(images)
    assert not Draws(gated, torch.device("cpu"), 0, noise_scale=0.0).noisy(images)
