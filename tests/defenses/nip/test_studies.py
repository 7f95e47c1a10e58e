"""The influence of neurons under attack, and the consistency of the top ones, against what is computed by hand."""

from collections.abc import Callable

import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor

from defenses.attacks import attack, craft
from defenses.detector import NoDetector
from defenses.evaluation.rates import exact_interval
from defenses.nip import (
    DefenseSuccess,
    InversePerturbation,
    NipPlan,
    head_behind,
    influence,
    log_odds_influence,
    select_neurons,
)
from defenses.nip.studies import StudySubject, influence_towards, study_consistency, study_influence, top_consistency
from defenses.protected import ProtectedClassifier
from defenses.splits import LabelledImages

CPU = torch.device("cpu")
ATTACKS = ("fgsm:epsilon=24/255", "deepfool:steps=8")
FORMS = ("linear", "deep", "maps", "smooth")


@pytest.fixture(scope="session")
def subject(classifier, purifier, splits) -> Callable[..., StudySubject]:
    """A pool of 60 candidates and the images to study it on: ``subject("linear", k1=3)``."""

    def build(form: str = "linear", attacks: tuple[str, ...] = ATTACKS, **choices: object) -> StudySubject:
        given = {"candidates": 60, "precision": "float32", "amplitudes": (0.05, 0.2, 0.6), **choices}
        examples = [
            craft(attack(text), classifier(form), *splits.test, limit=60, device=CPU, seed=0, progress=lambda *_: None)
            for text in attacks
        ]
        return StudySubject(
            classifier=classifier(form),
            purifier=purifier(form, **given),
            plan=NipPlan(**given),
            fit=splits.fit,
            validation=splits.validation,
            clean=LabelledImages(splits.test.images[:80], splits.test.targets[:80]),
            attacked=tuple(examples),
            accuracy_loss=0.05,
            device=CPU,
            seed=3,
            progress=lambda stage, done, total: None,
        )

    return build


def by_autograd(network, form: str, x: Tensor, classes: Tensor) -> Tensor:
    """The influence (N, D) on the confidence of given classes, by differentiating by the shift of each neuron."""
    before, behind = network(form)
    activations = before(x).detach()
    outputs = activations.mean((2, 3)) if activations.ndim == 4 else activations
    shift = torch.zeros_like(outputs, requires_grad=True)
    spread = shift[..., None, None] if activations.ndim == 4 else shift
    confidence = behind(activations + spread).softmax(1).gather(1, classes.unsqueeze(1)).sum()
    return torch.autograd.grad(confidence, shift)[0] * outputs


@pytest.mark.parametrize("form", FORMS)
def test_the_influence_on_any_class_is_equation_2(network, classifier, layer_of, splits, form):
    known, name = classifier(form), layer_of(form)
    head = head_behind(known, known.resolve_layer(name))
    x = splits.test.images[:12].float() / 255
    logits, activations = known.logits_and_features(x, name)
    predicted = influence_towards(head, x, activations, logits, logits.argmax(1))
    torch.testing.assert_close(predicted["confidence"], influence(head, x, activations, logits))
    torch.testing.assert_close(predicted["log odds"], log_odds_influence(head, x, activations, logits))
    classes = (logits.argmax(1) + torch.arange(12)) % 10
    given = influence_towards(head, x, activations, logits, classes)
    torch.testing.assert_close(given["confidence"], by_autograd(network, form, x, classes), rtol=1e-3, atol=1e-6)
    assert given["mapped"].amin(1).tolist() == pytest.approx([0] * 12)
    assert given["mapped"].amax(1).tolist() == pytest.approx([1] * 12)
    order = given["log odds"].argsort(dim=1)
    assert (given["mapped"].gather(1, order).diff(dim=1) >= 0).all()


def test_the_curves_are_means_over_the_examples_that_fool(subject, network):
    studied = subject()
    study = study_influence(studied)
    combinations = [(curve.attack, curve.towards, curve.measure) for curve in study.curves]
    assert len(set(combinations)) == len(combinations) == 2 * 2 * 3
    examples = studied.attacked[0]
    curve = next(each for each in study.curves if (each.towards, each.measure) == ("true", "confidence"))
    assert (curve.attack, curve.images) == (examples.attack.name, int(examples.fooled.sum()))
    assert 10 < curve.images < len(examples.y) + 1
    x, y = examples.x[examples.fooled].float() / 255, examples.y[examples.fooled]
    neurons = list(curve.neurons)
    assert sorted(neurons) == list(range(32))
    for values, images in ((curve.clean, x), (curve.adversarial, examples.x_adv[examples.fooled])):
        expected = by_autograd(network, "linear", images, y).mean(0)[neurons]
        assert list(values) == pytest.approx(expected.tolist(), rel=1e-2, abs=1e-5)
    for each in study.curves:
        assert list(each.clean) == sorted(each.clean, reverse=True)
        assert len(each.clean) == len(each.adversarial) == len(each.noise) == 32


def test_the_groups_are_counted_image_by_image(subject, network):
    studied = subject(k1=3, k2=4)
    study = study_influence(studied)
    examples = studied.attacked[1]
    images, y = (
        (examples.x[examples.fooled].float() / 255, examples.x_adv[examples.fooled]),
        examples.y[examples.fooled],
    )
    clean, adversarial = (by_autograd(network, "linear", each, y) for each in images)
    rows = {
        (row.group, row.moved): row
        for row in study.groups
        if (row.attack, row.towards, row.measure) == (examples.attack.name, "true", "confidence")
    }
    assert {group: row.neurons for (group, moved), row in rows.items() if moved == "noise"} == {
        "front": 3,
        "remaining": 25,
        "tail": 4,
    }
    tail = select_neurons(clean, 3, 4).tail
    before, after = (each.gather(1, tail).mean(1) for each in (clean, adversarial))
    row = rows["tail", "adversarial"]
    assert (row.before, row.after) == pytest.approx((float(before.mean()), float(after.mean())), rel=1e-2)
    assert abs(row.suppressed.counted - int((after < before).sum())) <= 1
    assert row.suppressed.interval == exact_interval(torch.arange(row.suppressed.images) < row.suppressed.counted)
    assert row.suppressed.counted + row.raised.counted <= row.suppressed.images == len(y)


def test_attacks_take_influence_from_the_true_class_and_noise_of_the_same_size_takes_less(subject):
    for each in study_influence(subject()).curves:
        if (each.towards, each.measure) == ("true", "log odds"):
            assert sum(each.adversarial) < sum(each.noise) - 1 < sum(each.clean)


def test_a_study_leaves_everything_as_it_was_and_finds_the_same_again(subject):
    studied = subject()
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first = study_influence(studied), study_consistency(studied)
    assert torch.equal(torch.rand(3), expected)
    assert (study_influence(studied), study_consistency(studied)) == first
    assert studied.purifier.control is None


def test_an_attack_that_fools_nothing_is_left_out(subject):
    studied = subject(attacks=("fgsm:epsilon=1/100000",))
    assert study_influence(studied).curves == study_influence(studied).groups == ()
    study = study_consistency(studied)
    assert [row.attack for row in study.rows] == [None] * 3
    (every,) = study.correlations
    assert (every.attack, every.points, every.coefficient) == (None, 0, None)


def test_equation_13_by_hand():
    top = torch.tensor([[1, 2, 3, 4, 5], [1, 2, 3, 4, 5], [1, 2, 3, 4, 5]])
    other = torch.tensor([[5, 4, 3, 2, 1], [9, 3, 8, 1, 2], [6, 7, 8, 9, 0]])
    assert top_consistency(top, other).tolist() == pytest.approx([1, 3 / 7, 0])


@pytest.mark.parametrize("form", ["linear", "maps"])
def test_the_rows_have_the_success_that_is_measured_of_the_defense(subject, form):
    studied = subject(form)
    study = study_consistency(studied)
    protected = ProtectedClassifier(studied.classifier, studied.purifier, NoDetector()).eval()
    success = DefenseSuccess.of(protected, CPU, studied.seed)
    rows = {(row.attack, row.direction): row for row in study.rows}
    assert len(rows) == len(study.rows) == 3 + 2 * 5
    for examples in studied.attacked:
        name = examples.attack.name
        assert rows[name, None].right.counted == 0, "none of them is answered right as it is"
        for direction in ("nearest", "random", "gaussian", "oracle"):
            crafted, _ = success.attacked(examples, direction)
            row = rows[name, direction]
            assert row.right.images == crafted.fooling
            assert (row.right.rate, row.right.interval) == (crafted.success, crafted.success_interval)
            low, high = row.consistency_interval
            assert 0 <= low <= row.consistency <= high <= 1
    for direction in ("nearest", "random", "gaussian"):
        assert rows[None, direction].right.rate == success.clean(*studied.clean, direction).accuracy


def test_the_consistency_is_that_of_the_influences_before_and_after(subject, network):
    studied = subject()
    study = study_consistency(studied)
    examples = studied.attacked[0]
    fooled = examples.fooled
    x, x_adv = examples.x[fooled].float() / 255, examples.x_adv[fooled]
    purifier: InversePerturbation = studied.purifier
    logits, activations = studied.classifier.logits_and_features(x_adv, purifier.config.layer)
    sets = []
    for images in (x, x_adv, purifier(x_adv, torch.ones(()), activations, logits)):
        predicted = network("linear")[1](network("linear")[0](images)).argmax(1)
        top = by_autograd(network, "linear", images, predicted).topk(5, dim=1).indices
        sets.append([set(row) for row in top.tolist()])
    for direction, moved in ((None, sets[1]), ("nearest", sets[2])):
        expected = [len(a & b) / len(a | b) for a, b in zip(sets[0], moved, strict=True)]
        row = next(each for each in study.rows if (each.attack, each.direction) == (examples.attack.name, direction))
        assert row.consistency == pytest.approx(sum(expected) / len(expected), abs=0.02)


def test_the_correlations_are_spearmans(subject):
    study = study_consistency(subject())
    attacked = [row for row in study.rows if row.attack is not None]
    for told in study.correlations:
        rows = [row for row in attacked if told.attack in (None, row.attack)]
        expected = spearmanr([row.consistency for row in rows], [row.right.rate for row in rows]).statistic
        assert told.points == len(rows) == (10 if told.attack is None else 5)
        assert told.coefficient == pytest.approx(expected)
        assert told.coefficient > 0, "an answer that is right again has its neurons back"
    assert all(row.correlation is None for row in attacked if row.right.counted in (0, row.right.images))
    assert any(row.correlation is not None for row in attacked)
