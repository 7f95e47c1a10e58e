"""Pools made anew with one parameter changed, and the perturbation of activations, against those made by hand."""

from collections.abc import Callable

import pytest
import torch

from defenses.attacks import attack, craft
from defenses.classifier import Classifier
from defenses.detector import NoDetector
from defenses.nip import (
    DefenseSuccess,
    HeadUnsuitable,
    InversePerturbation,
    NipPlan,
    check_layer,
    choose_amplitude,
    neuron_outputs,
    select_neurons,
)
from defenses.nip.head import read_chain
from defenses.nip.neurons import Neurons
from defenses.nip.studies import (
    Outcome,
    StudySubject,
    activation_perturbations,
    layers_to_try,
    moving_answer,
    recalibrate,
    study_eta,
    study_k,
    study_layer,
    study_place,
)
from defenses.nip.studies.activations import shifting_answer
from defenses.protected import ProtectedClassifier
from defenses.splits import LabelledImages

CPU = torch.device("cpu")
AMPLITUDES = (0.05, 0.2, 0.6)


@pytest.fixture(scope="session")
def subject(classifier, purifier, splits) -> Callable[..., StudySubject]:
    """A pool of 40 candidates and few images to study it on, with the stages that are told: ``subject("linear")``."""

    def build(form: str = "linear", progress=lambda stage, done, total: None, **choices: object) -> StudySubject:
        given = {"candidates": 40, "precision": "float32", "amplitudes": AMPLITUDES, **choices}
        examples = craft(
            attack("deepfool:steps=8"),
            classifier(form),
            *splits.test,
            limit=40,
            device=CPU,
            seed=0,
            progress=lambda *_: None,
        )
        return StudySubject(
            classifier=classifier(form),
            purifier=purifier(form, **given),
            plan=NipPlan(**given),
            fit=splits.fit,
            validation=LabelledImages(*(each[:150] for each in splits.validation)),
            clean=LabelledImages(*(each[:60] for each in splits.test)),
            attacked=(examples,),
            accuracy_loss=0.02,
            device=CPU,
            seed=0,
            progress=progress,
        )

    return build


def assert_is(outcome: Outcome, studied: StudySubject, made: InversePerturbation) -> None:
    """Compare an outcome with what is measured of a defense with that pool and amplitude."""
    made.set_amplitude(outcome.amplitude)
    success = DefenseSuccess.of(ProtectedClassifier(studied.classifier, made, NoDetector()).eval(), CPU, 0)
    clean = success.clean(*studied.clean, "nearest")
    assert (outcome.clean.rate, outcome.clean.interval) == (clean.accuracy, clean.accuracy_interval)
    assert outcome.undefended.rate == clean.undefended_accuracy
    (told,) = outcome.attacks
    crafted, _ = success.attacked(studied.attacked[0], "nearest")
    assert (told.attack, told.right.images) == (crafted.attack, crafted.fooling)
    assert (told.right.rate, told.right.interval) == (crafted.success, crafted.success_interval)


def test_the_numbers_of_neurons_are_varied_one_at_a_time(subject, purifier):
    studied = subject(k1=4, k2=2)
    study = study_k(studied)
    assert study.refused == ()
    varied = [(row.varied, row.setting.k1, row.setting.k2) for row in study.rows[::2]]
    assert varied == [("k1", k1, 2) for k1 in (0, 1, 3, 4, 5, 10, 20)] + [
        ("k2", 4, k2) for k2 in (0, 1, 2, 3, 5, 10, 20)
    ]
    assert [row.outcome.recalibrated for row in study.rows] == [False, True] * 14
    assert {(row.setting.k1, row.setting.k2) for row in study.rows if row.own} == {(4, 2)}
    assert all(row.outcome.amplitude == studied.purifier.config.amplitude for row in study.rows[::2])
    rows = {(row.setting.k1, row.setting.k2, row.outcome.recalibrated): row for row in study.rows}
    for k1, k2 in ((0, 2), (4, 20)):
        made = purifier("linear", candidates=40, k1=k1, k2=k2)
        for recalibrated in (False, True):
            row = rows[k1, k2, recalibrated]
            assert (row.candidates, row.neurons, row.template_size) == (40, 32, made.config.template_sizes[0])
            assert_is(row.outcome, studied, made)


def test_an_amplitude_is_set_anew_as_a_fit_sets_it(subject):
    for form, loss in (("linear", 0.02), ("linear", 0.3), ("deep", 0.02)):
        studied = subject(form)
        studied = type(studied)(**{**vars(studied), "accuracy_loss": loss})
        strength = choose_amplitude(
            studied.classifier,
            studied.purifier,
            *studied.validation,
            AMPLITUDES,
            loss,
            batch_size=64,
            device=CPU,
            progress=lambda stage, done, total: None,
        )
        found = recalibrate(studied, moving_answer(studied.classifier, studied.purifier), "k")
        assert found == (strength.amplitude, strength.within)


def test_more_neurons_than_there_are_are_not_tried(subject):
    study = study_k(subject(k1=30, k2=1))
    assert [row.setting.k2 for row in study.rows if row.varied == "k2"][::2] == [0, 1]
    assert {row.setting.k1 for row in study.rows if row.varied == "k1"} == {0, 1, 3, 5, 10, 20, 30}


@pytest.mark.parametrize(("form", "most"), [("linear", 6), ("deep", 4), ("maps", 3)])
def test_layers_are_spread_over_the_computation_with_the_own_one_among_them(classifier, layer_of, form, most):
    known: Classifier = classifier(form)
    own = layer_of(form)
    chosen = layers_to_try(known, own, 2, 2, most)
    names = [layer.name for layer in known.layers()]
    places = [names.index(layer.name) for layer in chosen]
    assert own in {layer.name for layer in chosen}
    assert len(chosen) == most
    assert chosen[-1].name == "logits", "the last of all"
    assert places == sorted(set(places))
    for layer in chosen:
        check_layer(layer, 2, 2)
    assert len(chosen) < len([layer for layer in known.layers() if len(layer.shape) in (1, 3)])
    width = known.resolve_layer(own).shape[0]
    assert all(layer.shape[0] >= width for layer in layers_to_try(known, own, width - 1, 1, most))


def test_each_layer_gets_a_pool_of_its_own(subject, layer_of):
    studied = subject("smooth", k1=2, k2=1)
    study = study_layer(studied)
    assert study.refused == ()
    assert 3 <= len(study.rows) // 2 <= 6
    shapes = {layer.name: layer.shape for layer in studied.classifier.layers()}
    assert {len(shapes[row.setting.layer]) for row in study.rows} == {1, 3}, "vectors and maps"
    for row in study.rows:
        assert row.neurons == shapes[row.setting.layer][0]
        assert row.own == (row.setting.layer == layer_of("smooth"))
        assert row.outcome.clean.images == 60
    own, elsewhere = ([row.outcome.clean.rate for row in study.rows if row.own == each] for each in (True, False))
    assert_is(next(row.outcome for row in study.rows if row.own), studied, studied.purifier)
    assert set(elsewhere) != set(own)


def test_fewer_candidates_are_a_share_of_the_unknown_inputs(subject):
    told: list[tuple[str, int, int]] = []
    study = study_eta(subject(candidates=200, eta=0.5, progress=lambda *each: told.append(each)))
    counts = {row.setting.eta: row.candidates for row in study.rows}
    assert counts == {0.01: 10, 0.1: 20, 0.3: 60, 0.5: 100, 1.0: 200}, "one of each class at least"
    assert {row.setting.eta for row in study.rows if row.own} == {0.5}
    assert [(done, total) for stage, done, total in told if stage == "eta"] == [(each, 5) for each in range(6)]
    assert {"eta: candidates", "eta: amplitude", "eta: attacks"} <= {stage for stage, _, _ in told}


def test_a_setting_without_a_pool_is_told_and_the_others_are_measured(subject, monkeypatch):
    studied = subject(candidates=200)
    monkeypatch.setattr("defenses.nip.pool.LARGEST_POOL", 100 * 270)
    study = study_eta(studied)
    (refused,) = study.refused
    assert (refused.varied, refused.setting.eta) == ("eta", 1.0)
    assert refused.reason.startswith("200 candidates of shape (1, 8, 8) in float32 take")
    assert {row.setting.eta for row in study.rows} == {0.01, 0.1, 0.3}


def test_a_candidate_of_activations_by_hand():
    neurons = Neurons(torch.tensor([[0], [2]]), torch.tensor([[1, 2], [1, 0]]), torch.tensor([[3], [3]]))
    rho = activation_perturbations(neurons, 4, "tail-front")
    assert rho.tolist() == [[-0.5, 0, 0, 0.5], [0, 0, -0.5, 0.5]]
    assert torch.equal(activation_perturbations(neurons, 4, "front-tail"), -rho)
    influences = torch.tensor([[3.0, 1.0, 2.0]])
    assert activation_perturbations(select_neurons(influences, 2, 0), 3, "tail-front").tolist() == [[-1, 0, -1]]
    assert activation_perturbations(select_neurons(influences, 0, 1), 3, "tail-front").tolist() == [[0, 1, 0]]
    assert activation_perturbations(select_neurons(influences, 3, 0), 3, "tail-front").tolist() == [[0, 0, 0]]


@pytest.mark.parametrize("shape", [(6, 7), (6, 7, 3, 2)])
def test_it_is_the_gradient_by_the_activations_scaled_as_in_equation_8(shape):
    torch.manual_seed(0)
    activations = torch.rand(shape, requires_grad=True)
    neurons = select_neurons(torch.randn(6, 7), 2, 3)
    outputs = neuron_outputs(activations)
    loss = outputs.gather(1, neurons.tail).sum() - outputs.gather(1, neurons.front).sum()
    gradient = torch.autograd.grad(loss, activations)[0].reshape(6, 7, -1)
    scaled = gradient / (gradient.amax((1, 2), keepdim=True) - gradient.amin((1, 2), keepdim=True))
    rho = activation_perturbations(neurons, 7, "tail-front")
    torch.testing.assert_close(scaled, rho.unsqueeze(2).expand_as(scaled))


@pytest.mark.parametrize("form", ["linear", "product", "deep", "maps"])
def test_shifted_activations_are_classified_by_what_lies_behind_them(subject, network, form):
    studied = subject(form)
    purifier, config = studied.purifier, studied.purifier.config
    layer = studied.classifier.resolve_layer(config.layer)
    candidates = torch.randn(config.candidates, config.shape[0], generator=torch.Generator().manual_seed(0))
    answer = shifting_answer(studied, purifier, read_chain(studied.classifier, layer), candidates)
    x = studied.clean.images[:9].float() / 255
    with torch.no_grad():
        still, shifted = answer(x, (0.0, 0.7))
        before, behind = network(form)
        activations = before(x)
        rho = candidates[purifier.nearest(x, activations, behind(activations))]
        rho = rho.reshape(*rho.shape, *[1] * (activations.ndim - 2))
        mean = activations.flatten(1).mean(1).reshape(-1, *[1] * (activations.ndim - 1))
        torch.testing.assert_close(still, behind(activations), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(shifted, behind(activations + 0.7 * mean * rho), rtol=1e-3, atol=1e-4)


def test_both_places_are_measured_with_the_same_candidates(subject):
    studied = subject(k1=2, k2=3)
    study = study_place(studied)
    assert [(row.place, row.outcome.recalibrated) for row in study.rows] == [
        (place, again) for place in ("image", "activations") for again in (False, True)
    ]
    assert study.candidates == studied.purifier.config.candidates
    image, activations = study.rows[0].outcome, study.rows[2].outcome
    assert_is(image, studied, studied.purifier)
    assert activations.undefended == image.undefended
    assert activations.attacks[0].right.images == image.attacks[0].right.images
    assert (activations.clean, activations.attacks) != (image.clean, image.attacks)


def test_behind_a_head_that_is_no_chain_activations_are_not_shifted(subject):
    with pytest.raises(HeadUnsuitable, match="Sigmoid"):
        study_place(subject("smooth"))
