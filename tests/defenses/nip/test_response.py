"""A defense by response: what the judge concludes, how it is settled, and that its graph says the same."""

import pytest
import torch

from defenses.checkpoint import CheckpointUnreadable, ClassifierMismatch, load_protected, save_protected
from defenses.detector import NoDetector
from defenses.nip import (
    ResponseJudge,
    ResponsePlan,
    SubstitutePlan,
    fit_response,
    fit_response_defense,
    response_parts,
)
from defenses.nip.push import InversePush, ReplacedPush, Smoothing, drawn_direction
from defenses.nip.response import exchanged
from defenses.nip.response_fit import Pushed, affordable
from defenses.onnx_export import check_export, export_protected
from defenses.onnx_parity import session
from defenses.protected import ProtectedClassifier
from defenses.splits import LabelledImages, Splits
from defenses.stages import Stages

CPU = torch.device("cpu")
SIZED = {"test_examples": 20}
QUICK = {"attacks": ("fgsm:epsilon=24/255",), **SIZED}


def silent(stage: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


@pytest.fixture(scope="module")
def pushed() -> tuple[Pushed, Pushed]:
    """Benign answers of 400 and 300 images in four classes, of which a push raises each logit by chance."""
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> Pushed:
        targets = torch.randint(4, (count,), generator=generator)
        bare = torch.randn(count, 4, generator=generator) + 4 * torch.nn.functional.one_hot(targets, 4)
        return Pushed(bare, bare + 0.5 * torch.randn(count, 4, generator=generator), targets)

    return draw(400), draw(300)


@pytest.fixture(scope="module")
def judge(pushed) -> ResponseJudge:
    made = ResponseJudge(4)
    fit_response(made, *pushed, 0.03)
    return made.eval()


def answered(judge: ResponseJudge, bare: list[float], moved: list[float]) -> int:
    logits = torch.tensor([bare]), torch.tensor([moved])
    return int(judge(*logits, torch.zeros(1, dtype=torch.bool)).argmax())


def test_an_unfitted_judge_gives_the_bare_answer():
    bare = torch.randn(50, 4, generator=torch.Generator().manual_seed(1))
    given = ResponseJudge(4)(bare, -bare, torch.zeros(50, dtype=torch.bool))
    torch.testing.assert_close(given, bare)


def test_a_class_that_a_push_raises_as_never_in_benign_images_is_answered(judge):
    assert answered(judge, [9, 0, 0, 0], [9, 0, 0.2, 0]) == 0
    assert answered(judge, [9, 0, 0, 0], [9, 0, 6, 0]) == 2
    assert answered(judge, [9, 0, 0, 0], [3, 0, 0, 0.5]) == 3, "a fall of the predicted class is a rise of the others"


def test_a_bare_answer_that_is_nearly_none_gives_way_to_the_second(judge):
    assert float(judge.margin) > 0
    edge = float(judge.margin) / 2
    assert answered(judge, [5 + edge, 5, 0, 0], [5 + edge, 5, 0, 0]) == 1
    assert answered(judge, [5 + 3 * edge, 5, 0, 0], [5 + 3 * edge, 5, 0, 0]) == 0


def test_exchanging_gives_the_class_answered_the_highest_logit_and_keeps_all_values():
    logits = torch.randn(30, 5, generator=torch.Generator().manual_seed(2))
    classes = torch.arange(30) % 5
    given = exchanged(logits, classes)
    assert given.argmax(1).tolist() == classes.tolist()
    torch.testing.assert_close(given.sort().values, logits.sort().values)
    torch.testing.assert_close(exchanged(logits, logits.argmax(1)), logits)


def test_what_may_be_answered_otherwise_keeps_the_loss_within_bounds_at_every_count():
    right = torch.tensor([1, 0, 1, 1, 1, 1, 1], dtype=torch.bool)
    otherwise = torch.tensor([0, 1, 0, 0, 0, 0, 0], dtype=torch.bool)
    assert affordable(right, otherwise, 0) == 0
    assert affordable(right, otherwise, 3.0) == 3, "lost 1, 0, 1, 2 and standard errors 1, 1.4, 1.7, 2"
    assert affordable(right, otherwise, 3.0, errors=1.645) == 2, "with 1.645 of them 2.6, 2.3, 3.8"
    assert affordable(right, otherwise, 100) == 7
    assert affordable(right, right, 0) == 7, "nothing changes"


def test_settling_costs_benign_images_no_more_than_allowed(pushed):
    validation, calibration = pushed
    judge = ResponseJudge(4)
    report = fit_response(judge, validation, calibration, 0.03)
    assert report.images == 300
    assert report.undefended_right - report.right <= 0.03 * 300
    assert report.gated + report.near + report.voted > 0
    strict = fit_response(ResponseJudge(4), validation, calibration, 0.0)
    assert strict.right >= strict.undefended_right
    assert strict.margin <= report.margin
    assert strict.vote <= report.vote
    assert strict.gate > report.gate


def test_what_is_usual_of_a_class_that_was_never_predicted_is_what_is_usual_of_all(pushed):
    validation, calibration = pushed
    seen = validation.undefended_logits.argmax(1) != 3
    judge = ResponseJudge(4)
    fit_response(judge, Pushed(*(each[seen] for each in validation)), calibration, 0.01)
    assert judge.mean[3].std() == 0
    assert judge.scale.isfinite().all()
    assert (judge.scale > 0).all()
    assert judge.mean[0].std() > 0


def test_nothing_is_settled_without_images(pushed):
    nothing = Pushed(torch.zeros(0, 4), torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    with pytest.raises(ValueError, match="Expected benign calibration images"):
        fit_response(ResponseJudge(4), pushed[0], nothing, 0.01)


def test_smoothing_leaves_a_flat_image_and_takes_roughness_away():
    flat = torch.full((1, 3, 6, 6), 0.4)
    rough = flat + 0.1 * ((torch.arange(36).reshape(6, 6) % 2) * 2 - 1)
    blur = Smoothing(3, 0.25)
    nothing = torch.zeros(1, 10)
    torch.testing.assert_close(blur(flat, nothing), flat)
    assert (blur(rough, nothing) - flat).abs().max() < 1e-6
    torch.testing.assert_close(Smoothing(3, 0.1)(rough, nothing) - flat, 0.6 * (rough - flat))


def test_a_replaced_push_goes_as_far_in_another_direction(splits):
    x = splits.test.images[:20].float() / 255 * 0.5 + 0.25
    push = Smoothing(1, 0.1)
    logits = torch.zeros(20, 10)
    own = push(x, logits) - x
    torch.manual_seed(0)
    for candidates in (None, torch.rand(5, 1, 8, 8)):
        other = ReplacedPush(push, candidates)(x, logits) - x
        torch.testing.assert_close(other.flatten(1).norm(dim=1), own.flatten(1).norm(dim=1), rtol=0.02, atol=1e-4)
        assert (torch.nn.functional.cosine_similarity(own.flatten(1), other.flatten(1)).abs() < 0.8).all()
    assert drawn_direction(x, None).flatten(1).norm(dim=1) == pytest.approx(torch.ones(20), rel=1e-5)


@pytest.mark.parametrize("push", ["smoothing", "inverse"])
def test_a_fitted_defense_is_one_graph_and_is_kept_and_resumed(classifier, layer_of, splits, push, tmp_path):
    subject = classifier("linear")
    choices = {"layer": layer_of("linear"), "candidates": 100} if push == "inverse" else {}
    plan = ResponsePlan(push=push, accuracy_loss=0.05, **choices, **QUICK)
    stages = Stages(tmp_path / "stages")
    fitted = fit_response_defense(subject, splits, plan, stages=stages, device=CPU, progress=silent)
    lost = fitted.metrics["clean_accuracy_undefended"] - fitted.metrics["clean_accuracy"]
    assert -0.05 < lost < 0.1
    assert fitted.response.undefended_right - fitted.response.right <= 5
    x = splits.test.images[:40].float() / 255
    graph = export_protected(fitted.protected)
    assert check_export(graph, fitted.protected, x) < 1e-3
    names = [value.name for value in graph.graph.output]
    assert {"score", "alert"}.isdisjoint(names)
    with torch.no_grad():
        output = fitted.protected(x)
    ran = dict(zip(names, session(graph).run(names, {"image": x.numpy()}), strict=True))
    assert (ran["class_index"] == output.logits.argmax(1).numpy()).mean() > 0.97
    assert (output.purified - x).abs().max() > 1e-3
    save_protected(fitted.protected, tmp_path / "kept")
    loaded = load_protected(subject, tmp_path / "kept")
    with torch.no_grad():
        torch.testing.assert_close(loaded(x).logits, output.logits)
    again = fit_response_defense(subject, splits, plan, stages=stages, device=CPU, progress=silent)
    assert again.metrics == fitted.metrics
    assert again.response == fitted.response
    if push == "inverse":
        assert isinstance(fitted.protected.purifier.push, InversePush)
        norms = fitted.protected.purifier.push.directions.flatten(1).norm(dim=1)
        assert norms == pytest.approx(torch.ones(10), rel=1e-5)


def test_a_defense_of_another_classifier_or_a_damaged_one_is_refused(classifier, splits, tmp_path):
    subject = classifier("linear")
    pushing, judge = response_parts(subject, ResponsePlan())
    save_protected(ProtectedClassifier(subject, pushing, NoDetector(), judge=judge), tmp_path)

    class Wider:
        image_shape, classes = (1, 16, 16), 10

    with pytest.raises(ClassifierMismatch, match=r"images of shape \(1, 8, 8\), but the classifier has \(1, 16, 16\)"):
        load_protected(Wider(), tmp_path)
    judge.mean.fill_(float("nan"))
    save_protected(ProtectedClassifier(subject, pushing, NoDetector(), judge=judge), tmp_path)
    with pytest.raises(CheckpointUnreadable, match="its values are not finite"):
        load_protected(subject, tmp_path)


@pytest.mark.parametrize(
    ("choices", "told"),
    [
        ({"weight": 0.5}, "weight above 0 and at most a third, got 0.5"),
        ({"size": 0.0}, "Expected size above 0"),
        ({"k1": 0, "k2": 0}, "not both 0"),
        ({"accuracy_loss": 1.0}, "accuracy_loss of 0 or more and below 1"),
        ({"test_examples": 0}, "Expected test_examples above 0"),
    ],
)
def test_plans_that_cannot_be(choices, told):
    with pytest.raises(ValueError, match=told):
        ResponsePlan(**choices)


def test_a_fit_needs_images_to_settle_by(classifier, splits, tmp_path):
    nothing = LabelledImages(splits.fit.images[:0], splits.fit.targets[:0])
    without = Splits(splits.fit, splits.validation, nothing, splits.test)
    with pytest.raises(ValueError, match="Expected clean calibration images"):
        fit_response_defense(
            classifier("linear"), without, ResponsePlan(**QUICK), stages=Stages(tmp_path), device=CPU, progress=silent
        )


def test_the_inverse_perturbations_may_be_a_substitutes_of_a_classifier_that_is_only_asked(
    classifier, splits, tmp_path
):
    subject = classifier("linear")
    learnt = SubstitutePlan(epochs=6, augmentation=False, batch_size=32, held_out_queries=100)
    plan = ResponsePlan(push="inverse", substitute=learnt, candidates=60, accuracy_loss=0.05, attacks=(), **SIZED)
    asked: list[bool] = []
    hook = subject.register_forward_pre_hook(lambda module, x: asked.append(torch.is_grad_enabled()))
    try:
        stages = Stages(tmp_path)
        fitted = fit_response_defense(subject, splits, plan, stages=stages, device=CPU, progress=silent)
    finally:
        hook.remove()
    assert asked
    assert not any(asked)
    assert fitted.substitute["queries"] == 800 + 100
    assert fitted.substitute["agreement"] > fitted.substitute["commonest_share"] + 0.3
    assert check_export(export_protected(fitted.protected), fitted.protected, splits.test.images[:20] / 255) < 1e-3
    again = fit_response_defense(subject, splits, plan, stages=stages, device=CPU, progress=silent)
    assert (again.substitute, again.metrics) == (fitted.substitute, fitted.metrics)
