"""S-ALA and R-ALA: what they do to a real classifier and its neurons, and what they refuse."""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defenses.attacks import AttackUnknown, attack, craft
from defenses.attacks.adaptive import ClassifierOpaque, influence_by_autograd
from defenses.classifier import Classifier, LayerNotFound
from defenses.nip import LayerUnsuitable, head_behind, influence, log_odds_influence, select_neurons
from defenses.onnx_import import canonicalise
from defenses.onnx_trace import export_classifier

CPU = torch.device("cpu")
EPSILON = 48 / 255
BALL = "epsilon=48/255,step_size=12/255,steps=10"
PRINTED, ON_LOG_ODDS = "lambda=1/10", "log_odds=1,lambda=3/10"
"""Parameters with which the neurons' part of the loss is felt on the digits."""


class Attacked(NamedTuple):
    """Images that a classifier gets right, and what an attack made of them."""

    x: Tensor
    x_adv: Tensor
    fooled: Tensor


@pytest.fixture(scope="module")
def attacked(classifier, splits):
    """Attack 100 digits that a network gets right: ``attacked("product", "s-ala")``."""
    made: dict[tuple[str, str], Attacked] = {}

    def run(form: str, text: str) -> Attacked:
        if (form, text) not in made:
            examples = craft(
                attack(text),
                classifier(form),
                *splits.test,
                limit=100,
                device=CPU,
                seed=0,
                progress=lambda done, total: None,
            )
            made[form, text] = Attacked(examples.x.float() / 255, examples.x_adv, examples.fooled)
        return made[form, text]

    return run


def unlike(subject: Classifier, x: Tensor, x_adv: Tensor, *, log_odds: bool, remaining: bool) -> Tensor:
    """Return (N,) the MSE of equation 11 or 12, of the influences that the defense itself computes."""
    layer = subject.head_layer
    head = head_behind(subject, layer)
    found = []
    with torch.no_grad():
        for images in (x, x_adv):
            logits, activations = subject.logits_and_features(images, layer.name)
            of_odds = log_odds_influence(head, images, activations, logits)
            found.append((of_odds, of_odds if log_odds else influence(head, images, activations, logits)))
    (order, clean), (_, moved) = found
    difference = moved - clean
    if remaining:
        difference = difference.gather(1, select_neurons(order, 5, 5).remaining)
    return difference.square().mean(1)


@pytest.mark.parametrize("form", ["linear", "product", "deep", "smooth"])
@pytest.mark.parametrize("name", ["s-ala", "r-ala"])
def test_both_fool_classifiers_with_heads_of_every_form_within_their_ball(attacked, form, name):
    x, x_adv, fooled = attacked(form, f"{name}:{BALL}")
    assert len(x) == 100
    assert fooled.float().mean() > 0.8
    assert (x_adv - x).abs().max() <= EPSILON + 1e-6
    assert (x_adv - x).abs().max() > EPSILON - 1e-3
    assert 0 <= x_adv.min() <= x_adv.max() <= 1


@pytest.mark.parametrize("form", ["linear", "product"])
@pytest.mark.parametrize("pulling", [PRINTED, ON_LOG_ODDS])
def test_s_ala_stays_nearer_the_clean_neurons_than_pgd_and_r_ala_goes_farther(classifier, attacked, form, pulling):
    subject, log_odds = classifier(form), pulling == ON_LOG_ODDS
    plain = attacked(form, f"pgd:{BALL}")
    near, far = (attacked(form, f"{name}:{BALL},{pulling}") for name in ("s-ala", "r-ala"))
    # Of the examples that fool alike: an example that is nearer since it does not fool is no feat.
    for run, remaining in ((near, False), (far, True)):
        fooled = plain.fooled & run.fooled
        assert fooled.sum() > 60
        own, by_pgd = (
            unlike(subject, each.x, each.x_adv, log_odds=log_odds, remaining=remaining)[fooled].mean()
            for each in (run, plain)
        )
        assert own > 1.1 * by_pgd if remaining else own < 0.9 * by_pgd


def test_the_less_the_cross_entropy_weighs_the_nearer_s_ala_stays(classifier, attacked):
    subject = classifier("product")
    runs = [attacked("product", f"s-ala:{BALL},log_odds=1,lambda={weight}") for weight in ("1", "1/10", "1/100")]
    distances = [unlike(subject, run.x, run.x_adv, log_odds=True, remaining=False).mean() for run in runs]
    assert distances[0] > distances[1] > distances[2]
    assert runs[0].fooled.sum() > runs[1].fooled.sum() > runs[2].fooled.sum()


@pytest.mark.parametrize("name", ["s-ala", "r-ala"])
def test_one_step_is_along_the_sign_of_the_printed_objective_s_gradient(network, classifier, splits, name):
    # At x itself the MSE has no gradient: the first of two steps is FGSM's, the second feels it.
    before, behind = (part.double() for part in network("smooth"))
    x, y = splits.test.images[:20].double() / 255, splits.test.targets[:20]
    weight, step = 0.01, 0.05

    def influences(images: Tensor, steering: bool) -> tuple[Tensor, Tensor]:
        phi = before(images)
        logits = behind(phi)
        y_c = logits.softmax(1).amax(1)
        (derivative,) = torch.autograd.grad(y_c.sum(), phi, create_graph=steering)
        return derivative * phi, logits

    clean = influences(x, steering=False)[0].detach()
    order = clean.argsort(dim=1, descending=True)
    chosen = order if name == "s-ala" else order[:, 5:-5]
    x_adv = x.clone()
    for _ in range(2):
        x_adv.requires_grad_()
        sigma, logits = influences(x_adv, steering=True)
        error = (sigma - clean).gather(1, chosen).square().mean(1)
        gain = weight * F.cross_entropy(logits, y, reduction="none") + (error if name == "r-ala" else -error)
        (gradient,) = torch.autograd.grad(gain.sum(), x_adv)
        x_adv = (x_adv.detach() + step * gradient.sign()).clamp(0, 1)
    before.float(), behind.float()
    run = attack(f"{name}:epsilon=1,step_size={step},steps=2,lambda={weight}").run
    found = run(classifier("smooth"), x.float(), y)
    plain = attack(f"{name}:epsilon=1,step_size={step},steps=2,lambda=1000000").run(classifier("smooth"), x.float(), y)
    agree, alone = ((each - x_adv).abs() < 1e-5 for each in (found, plain))
    assert agree.double().mean() > 0.99, "but for gradients that are all but 0"
    assert alone.double().mean() < 0.97


@pytest.mark.parametrize("form", ["linear", "product", "deep", "smooth"])
@pytest.mark.parametrize("log_odds", [False, True])
def test_influences_by_autograd_are_those_of_the_defense(classifier, splits, form, log_odds):
    subject = classifier(form)
    layer, x = subject.head_layer, splits.test.images[:40].float() / 255
    found, logits = influence_by_autograd(subject, layer, x, log_odds=log_odds)
    with torch.no_grad():
        expected_logits, activations = subject.logits_and_features(x, layer.name)
        of = log_odds_influence if log_odds else influence
        expected = of(head_behind(subject, layer), x, activations, expected_logits)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(logits, expected_logits)


@pytest.mark.parametrize("text", ["s-ala", "r-ala:k1=0,log_odds=1"])
def test_neither_draws_anything_nor_sees_its_neighbours(classifier, splits, text):
    subject, x, y = classifier("deep"), splits.test.images[:12].float() / 255, splits.test.targets[:12]
    run = attack(text).run
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    together = run(subject, x, y)
    assert torch.equal(torch.rand(2), expected)
    apart = torch.cat([run(subject, *part) for part in zip(x.split(5), y.split(5), strict=True)])
    assert ((together - apart).abs() < 1e-6).float().mean() > 0.999
    assert not together.requires_grad
    assert not x.requires_grad


@pytest.mark.parametrize("name", ["s-ala", "r-ala"])
def test_without_cross_entropy_there_is_no_way_from_the_clean_image(classifier, splits, name):
    x, y = splits.test.images[:8].float() / 255, splits.test.targets[:8]
    assert torch.equal(attack(f"{name}:lambda=0").run(classifier("product"), x, y), x)


def test_they_are_found_by_name_with_the_paper_s_parameters():
    ball = {"epsilon": 8 / 255, "step_size": 2 / 255, "steps": 10, "lambda": 1.0, "log_odds": False}
    assert attack("s-ala").parameters == ball
    assert attack("r-ala").parameters == {**ball, "k1": 5, "k2": 5}
    given = attack("r-ala:epsilon=4/255,steps=3,lambda=1/2,log_odds=1,k1=0,k2=7").parameters
    assert dict(given) == {
        **ball, "epsilon": 4 / 255, "steps": 3, "lambda": 0.5, "log_odds": True, "k1": 0, "k2": 7,
    }  # fmt: skip


@pytest.mark.parametrize(
    "text",
    ["s-ala:k1=5", "s-ala:steps=0", "s-ala:log_odds=2", "s-ala:log_odds=1/2", "r-ala:lambda=-1", "r-ala:k2=-1",
     "r-ala:k1=2.5", "r-ala:weight=1", "r-ala:lambda"],
)  # fmt: skip
def test_bad_parameters_are_refused_by_name(text):
    with pytest.raises(AttackUnknown, match=rf"got '{text}'\. There are: .*r-ala \(epsilon, .*lambda, .*k1, k2\)"):
        attack(text)


@pytest.mark.parametrize(
    ("chosen", "sentence"),
    [
        ("k1=30,k2=2", r"neurons that remain beside 30 front and 2 tail neurons, but the layer .* has shape \(32,\)"),
        ("k1=30,k2=5", r"30 front and 5 tail neurons, at least 35 in all, but the layer .* has shape \(32,\)"),
    ],
)
def test_r_ala_refuses_a_layer_in_which_no_neuron_remains(classifier, splits, chosen, sentence):
    x, y = splits.test.images[:4].float() / 255, splits.test.targets[:4]
    with pytest.raises(LayerUnsuitable, match=sentence):
        attack(f"r-ala:{chosen}").run(classifier("linear"), x, y)


@pytest.mark.parametrize("name", ["s-ala", "r-ala"])
def test_a_model_without_neurons_to_look_at_is_refused_by_name(network, splits, name):
    x, y = splits.test.images[:4].float() / 255, splits.test.targets[:4]
    with pytest.raises(ClassifierOpaque, match=r"Expected a Classifier.*got a model of type Sequential"):
        attack(name).run(nn.Sequential(*network("linear")), x, y)
    convolutional = nn.Sequential(nn.Conv2d(1, 10, 8), nn.Flatten()).eval()
    subject = Classifier(canonicalise(export_classifier(convolutional, (1, 8, 8)))).eval()
    with pytest.raises(LayerNotFound, match="No layer was found for NIP"):
        attack(name).run(subject, x, y)
