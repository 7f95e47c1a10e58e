"""The pool: which images become candidates, what a candidate is, and that one seed makes one pool."""

import pytest
import torch
from torch import nn

from defenses.classifier import Classifier
from defenses.nip import (
    InversePerturbation,
    NipPlan,
    PoolTooLarge,
    build_pool,
    choose_examples,
    head_behind,
    inverse_perturbations,
)
from defenses.onnx_import import canonicalise
from defenses.onnx_trace import export_classifier
from defenses.splits import LabelledImages

CPU = torch.device("cpu")


def quiet(*_: object) -> None:
    pass


def chosen(classifier, part: LabelledImages, count: int, *, seed: int = 0, batch_size: int = 128) -> torch.Tensor:
    return choose_examples(
        classifier, *part, count, seed=seed, batch_size=batch_size, device=CPU, progress=lambda done, total: None
    )


def test_candidates_are_distinct_images_that_are_right_one_of_each_class_first(classifier, splits):
    subject = classifier("linear")
    rows = chosen(subject, splits.fit, 60)
    images, targets = splits.fit
    with torch.no_grad():
        assert (subject(images[rows].float() / 255).argmax(1) == targets[rows]).all()
    assert len(rows) == len(set(rows.tolist())) == 60
    assert sorted(targets[rows[:10]].tolist()) == list(range(10))


@pytest.mark.parametrize("batch_size", [1, 7])
def test_the_choice_depends_on_the_seed_and_not_on_the_batches(classifier, splits, batch_size):
    subject = classifier("linear")
    rows = chosen(subject, splits.fit, 30)
    assert sorted(chosen(subject, splits.fit, 30, batch_size=batch_size).tolist()) == sorted(rows.tolist())
    assert sorted(chosen(subject, splits.fit, 30, seed=1).tolist()) != sorted(rows.tolist())


def test_every_class_is_there_even_where_fewer_are_asked_for(classifier, splits):
    rows = chosen(classifier("linear"), splits.fit, 3)
    assert sorted(splits.fit.targets[rows].tolist()) == list(range(10))


def test_a_class_that_is_never_right_has_no_candidate_and_holds_nothing_up(classifier, splits):
    images, targets = splits.fit
    mislabelled = targets.masked_fill(targets == 3, 4)  # what was a 3 is now never right
    swapped = torch.where(targets == 4, 3, mislabelled)
    rows = chosen(classifier("linear"), LabelledImages(images, swapped), 20)
    assert len(rows) == 20
    assert set(swapped[rows].tolist()) >= {0, 1, 2, 5, 6, 7, 8, 9}


def test_a_classifier_that_gets_nothing_right_is_refused(classifier, splits):
    images = splits.fit.images
    subject = classifier("linear")
    with torch.no_grad():
        wrong = (subject(images.float() / 255).argmax(1) + 1) % 10
    with pytest.raises(ValueError, match="none of the 800 images right"):
        chosen(subject, LabelledImages(images, wrong), 20)


@pytest.mark.parametrize(("sign", "factor"), [("tail-front", 1), ("front-tail", -1)])
@pytest.mark.parametrize("form", ["linear", "maps"])
def test_a_candidate_is_the_gradient_of_equation_6_normalised_by_equation_8(
    network, classifier, layer_of, splits, form, sign, factor
):
    subject, (before, behind) = classifier(form), network(form)
    layer = subject.resolve_layer(layer_of(form))
    x = splits.fit.images[:12].float() / 255
    made = inverse_perturbations(subject, layer.name, head_behind(subject, layer), x, k1=3, k2=2, sign=sign)
    for row in range(len(x)):
        image = x[row : row + 1].requires_grad_()
        outputs = before(image)
        phi = outputs.mean((2, 3)) if outputs.ndim == 4 else outputs
        y = behind(outputs).softmax(1).amax()
        (slope,) = torch.autograd.grad(y, outputs, retain_graph=True)
        slope = slope.sum((2, 3)) if slope.ndim == 4 else slope
        order = (slope * phi).argsort(dim=1, descending=True)[0]
        assert set(made.neurons.front[row].tolist()) == set(order[:3].tolist())
        (rho,) = torch.autograd.grad(phi[0, made.neurons.tail[row]].sum() - phi[0, order[:3]].sum(), image)
        expected = factor * rho[0] / (rho.max() - rho.min())
        torch.testing.assert_close(made.rho[row], expected, rtol=1e-3, atol=1e-5)
    assert made.usable.all()
    assert (made.rho.flatten(1).amax(1) - made.rho.flatten(1).amin(1) - 1).abs().max() < 1e-5


def test_the_pool_is_the_same_for_one_seed_and_the_batches_change_rounding_alone(purifier):
    first, again = purifier(candidates=40).pool, purifier(candidates=40).pool
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(first, again, strict=True))
    small = purifier(candidates=40, batch_size=7).pool
    assert sorted(small.classes.tolist()) == sorted(first.classes.tolist())
    torch.testing.assert_close(small.perturbations, first.perturbations, rtol=1e-3, atol=1e-5)
    assert not torch.equal(purifier(candidates=40, seed=1).pool.perturbations, first.perturbations)


def test_no_more_than_a_batch_is_computed_at_once(classifier, splits):
    subject = classifier("linear")
    seen: list[int] = []
    hook = subject.graph.register_forward_pre_hook(lambda module, arguments: seen.append(len(arguments[0])))
    try:
        plan = NipPlan(candidates=60, batch_size=16)
        build_pool(subject, subject.head_layer, *splits.fit, plan, device=CPU, progress=quiet)
    finally:
        hook.remove()
    assert max(seen) == 16
    assert seen.count(16) >= 6


def test_progress_counts_the_candidates_of_every_stage(classifier, splits):
    told: list[tuple[str, int, int]] = []
    subject = classifier("linear")
    plan = NipPlan(candidates=60, batch_size=16)
    build_pool(subject, subject.head_layer, *splits.fit, plan, device=CPU, progress=lambda *each: told.append(each))
    for stage in ("benign examples", "template", "candidates"):
        ours = [each for each in told if each[0] == stage]
        assert ours[-1] == (stage, 60, 60)
        assert ours == sorted(ours)


def test_keys_are_the_similarities_of_the_candidates_own_images(classifier, splits, purifier):
    subject = classifier("linear")
    made = purifier(candidates=40, template="class")
    rows = chosen(subject, splits.fit, 40)
    x = splits.fit.images[rows].float() / 255
    with torch.no_grad():
        logits, activations = subject.logits_and_features(x, made.config.layer)
        # Among the candidates of its own class an image finds one whose similarity is its own.
        nearest = made.nearest(x, activations, logits)
    torch.testing.assert_close(made.pool.keys[nearest], made.pool.keys, rtol=0, atol=1e-6)
    assert made.pool.classes.tolist() == splits.fit.targets[rows].tolist()
    assert made.pool.keys.unique().numel() > 5


def test_eta_is_how_many_candidates_there_are_for_an_unknown_input(purifier):
    assert purifier(candidates=60, eta=0.3).config.candidates == 18
    assert NipPlan(candidates=5000, eta=0.01).pool_size == 50


def test_an_image_without_a_gradient_is_left_out_and_counted():
    torch.manual_seed(0)
    network = nn.Sequential(
        *(nn.Conv2d(1, 12, 3, bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 3))
    )
    subject = Classifier(canonicalise(export_classifier(network.eval(), (1, 8, 8)))).eval()
    images = torch.randint(0, 256, (40, 1, 8, 8), dtype=torch.uint8)
    images[[3, 11, 12]] = 0  # no neuron of a black image gives anything, nor does it change anything
    with torch.no_grad():
        targets = subject(images.float() / 255).argmax(1)
    plan = NipPlan(candidates=40, k1=2, k2=2, precision="float32", batch_size=16)
    built = build_pool(subject, subject.head_layer, images, targets, plan, device=CPU, progress=quiet)
    assert (built.config.candidates, built.left_out) == (37, 3)
    spread = built.pool.perturbations.flatten(1)
    torch.testing.assert_close(spread.amax(1) - spread.amin(1), torch.ones(37))
    black = torch.zeros(6, 1, 8, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match="None of the 6 benign images gives a gradient"):
        build_pool(subject, subject.head_layer, black, targets[[3] * 6], plan, device=CPU, progress=quiet)


def test_a_pool_that_no_graph_could_hold_is_refused_before_anything_is_computed(classifier, splits):
    subject = classifier("linear")
    images = splits.fit.images[:1].expand(20_000_000, -1, -1, -1)
    plan = NipPlan(candidates=20_000_000, precision="float32")
    with pytest.raises(PoolTooLarge, match=r"20000000 candidates of shape \(1, 8, 8\) in float32 take 4\.9"):
        build_pool(subject, subject.head_layer, images, torch.zeros(1), plan, device=CPU, progress=quiet)


def test_fifty_thousand_candidates_of_cifar_size_fit_into_a_graph_in_either_precision(purifier):
    config = purifier().config
    sizes = {}
    for precision in ("float16", "float32"):
        wide = type(config)(
            **{**config.as_json(), "image_shape": (3, 32, 32), "candidates": 50_000, "precision": precision}
        )
        sizes[precision] = wide.pool_bytes
    assert sizes["float16"] == pytest.approx(307.8e6, rel=1e-3)
    assert sizes["float32"] < 2**31 - 2**28


def test_a_pool_of_other_shapes_is_not_taken(classifier, purifier):
    made = purifier(candidates=40)
    other = InversePerturbation(made.config, made.head)
    with pytest.raises(ValueError, match=r"Expected keys of shape \(40,\)"):
        other.set_pool(made.pool._replace(keys=made.pool.keys[:39]))
    assert (other.pool.perturbations == 0).all(), "nothing is taken of a pool that is refused"
