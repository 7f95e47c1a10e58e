"""A whole fit on digits: the strength it settles, what it measures, how it resumes, and the oracle beside it."""

from dataclasses import replace

import pytest
import torch

from defenses.attacks import AttackUnknown
from defenses.classifier import LayerNotFound
from defenses.nip import (
    FittedNip,
    LayerUnsuitable,
    NipPlan,
    PoolTooLarge,
    choose_amplitude,
    fit_nip,
    head_behind,
    inverse_perturbations,
    oracle_answers,
)
from defenses.nip.inverse_perturbation import moved
from defenses.onnx_export import check_export, export_protected
from defenses.splits import LabelledImages
from defenses.stages import Stages

CPU = torch.device("cpu")
PLAN = NipPlan(
    template="class",
    candidates=80,
    attacks=("fgsm:epsilon=32/255", "deepfool:steps=8"),
    test_examples=60,
    amplitudes=(0.02, 0.1, 0.3, 1.0, 3.0),
)


def quiet(*_: object) -> None:
    pass


def fit(classifier, splits, folder, plan: NipPlan = PLAN) -> FittedNip:
    return fit_nip(classifier, splits, plan, stages=Stages(folder), device=CPU, progress=quiet)


@pytest.fixture(scope="module")
def fitted(classifier, splits, tmp_path_factory) -> FittedNip:
    return fit(classifier("linear"), splits, tmp_path_factory.mktemp("fit"))


def test_the_strength_is_the_largest_that_costs_no_more_than_allowed(fitted, classifier, splits):
    strength = fitted.strength
    images, targets = splits.validation
    with torch.no_grad():
        bare = classifier("linear")(images.float() / 255).argmax(1) == targets
        own = fitted.protected(images.float() / 255).logits.argmax(1) == targets
    assert strength.undefended_accuracy == pytest.approx(bare.float().mean().item())
    assert strength.within
    lost = {each.amplitude: strength.undefended_accuracy - each.accuracy for each in strength.tried}
    assert list(lost) == list(PLAN.amplitudes)
    assert strength.amplitude == max(amplitude for amplitude, loss in lost.items() if loss <= 0.01 + 1e-9)
    assert lost[3.0] > 0.01
    assert fitted.protected.purifier.config.amplitude == strength.amplitude
    found = next(each.accuracy for each in strength.tried if each.amplitude == strength.amplitude)
    assert own.float().mean().item() == pytest.approx(found)


def test_a_loss_that_no_amplitude_keeps_to_is_told(classifier, purifier, splits):
    images, targets = splits.validation
    arguments = {"batch_size": 64, "device": CPU, "progress": quiet}
    strength = choose_amplitude(classifier("linear"), purifier(), images, targets, (4.0, 9.0), 0.0, **arguments)
    assert (strength.amplitude, strength.within) == (4.0, False)


def test_the_printed_strength_is_not_calibrated(classifier, splits, tmp_path):
    plan = replace(NipPlan.paper(), candidates=60, attacks=("fgsm:epsilon=32/255",), test_examples=20)
    fitted = fit(classifier("linear"), splits, tmp_path, plan)
    assert fitted.strength.amplitude == 1.0
    assert fitted.strength.within is None
    assert fitted.template_sizes == (fitted.template_size,)
    assert fitted.empty_template == (fitted.template_size == 0)


def test_rates_are_those_of_the_test_split(fitted, classifier, splits):
    images, targets = splits.test
    with torch.no_grad():
        output = fitted.protected(images.float() / 255)
    assert fitted.measured.clean.accuracy == pytest.approx((output.logits.argmax(1) == targets).float().mean().item())
    assert fitted.measured.clean.undefended_accuracy == fitted.metrics["clean_accuracy_undefended"]
    assert fitted.measured.clean.false_positive_rate == 0
    for examples in fitted.measured.examples:
        fooling = examples.x_adv[examples.fooled]
        assert len(fooling) > 5
        with torch.no_grad():
            right = fitted.protected(fooling).logits.argmax(1) == examples.y[examples.fooled]
        name = examples.attack.name
        assert fitted.metrics[f"defense_success_rate.{name}"] == pytest.approx(right.float().mean().item())
        assert fitted.metrics[f"attack_success_rate.{name}"] == pytest.approx(examples.success_rate)
    assert [row.form for row in fitted.measured.attacks] == ["as crafted", "rounded"] * 2
    assert set(fitted.seconds) >= {"pool", "amplitude"}


def test_a_fitted_defense_becomes_one_graph(fitted, splits):
    x = splits.test.images[:20].float() / 255
    assert check_export(export_protected(fitted.protected), fitted.protected, x) < 1e-3
    assert fitted.candidates == 80
    assert fitted.left_out == 0
    assert len(fitted.template_sizes) == 10


def test_a_fit_goes_on_where_it_was_cut_off_to_the_same_result(fitted, classifier, splits, tmp_path):
    subject, stages = classifier("linear"), Stages(tmp_path)

    class CutError(RuntimeError):
        pass

    def cut(stage: str, done: int, total: int) -> None:
        if stage == "amplitude":
            raise CutError

    with pytest.raises(CutError):
        fit_nip(subject, splits, PLAN, stages=stages, device=CPU, progress=cut)
    assert stages.names() == ["pool"]
    told: list[str] = []
    again = fit_nip(
        subject, splits, PLAN, stages=stages, device=CPU, progress=lambda stage, done, total: told.append(stage)
    )
    assert "candidates" not in told
    assert again.metrics == fitted.metrics
    assert again.strength == fitted.strength
    x = splits.test.images.float() / 255
    with torch.no_grad():
        assert torch.equal(again.protected(x).purified, fitted.protected(x).purified)


def test_a_fit_leaves_the_random_state_alone(fitted, classifier, splits, tmp_path):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    again = fit(classifier("linear"), splits, tmp_path)
    assert torch.equal(torch.rand(3), expected)
    assert again.metrics == fitted.metrics


@pytest.mark.parametrize(
    ("choices", "error"),
    [
        ({"layer": "elsewhere"}, LayerNotFound),
        ({"k1": 20, "k2": 20}, LayerUnsuitable),
        ({"attacks": ("sneeze",)}, AttackUnknown),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_computed(classifier, splits, tmp_path, choices, error):
    with pytest.raises(error):
        fit(classifier("linear"), splits, tmp_path / "fit", replace(PLAN, **choices))
    assert not (tmp_path / "fit").exists()


def test_a_fit_without_validation_images_is_refused_before_anything_is_computed(classifier, splits, tmp_path):
    nothing = LabelledImages(*(each[:0] for each in splits.validation))
    with pytest.raises(ValueError, match="clean validation images to settle the strength by, got none"):
        fit(classifier("linear"), splits._replace(validation=nothing), tmp_path / "fit")
    assert not (tmp_path / "fit").exists()


def test_a_pool_that_no_graph_holds_is_refused_before_anything_is_computed(classifier, splits, tmp_path, monkeypatch):
    monkeypatch.setattr("defenses.nip.pool.LARGEST_POOL", 10_000)
    with pytest.raises(PoolTooLarge, match="80 candidates"):
        fit(classifier("linear"), splits, tmp_path / "fit")
    assert not (tmp_path / "fit").exists()


def test_the_oracle_takes_the_clean_image_s_perturbation_with_the_better_sign(fitted, classifier):
    subject = classifier("linear")
    layer = subject.head_layer
    head = head_behind(subject, layer)
    examples = fitted.measured.examples[1]
    clean, x_adv, y = (each[examples.fooled] for each in (examples.x, examples.x_adv, examples.y))
    answers = oracle_answers(
        subject, head, layer.name, clean, x_adv, k1=5, k2=5, amplitude=0.3, batch_size=16, device=CPU
    )
    made = inverse_perturbations(subject, layer.name, head, clean.float() / 255, k1=5, k2=5, sign="tail-front")
    with torch.no_grad():
        ahead, back = (moved(x_adv, made.rho, amplitude) for amplitude in (0.3, -0.3))
        right = [subject(each).argmax(1) == y for each in (ahead, back)]
        again = subject(answers.x_moved)
    turned = right[1] & ~right[0]
    assert turned.any()
    assert not turned.all()
    assert torch.equal(answers.answered, right[0] | right[1])
    assert torch.equal(answers.logits.argmax(1) == y, answers.answered)
    torch.testing.assert_close(answers.x_moved[turned], back[turned])
    torch.testing.assert_close(answers.x_moved[~turned], ahead[~turned])
    torch.testing.assert_close(again, answers.logits, rtol=1e-4, atol=1e-4)
