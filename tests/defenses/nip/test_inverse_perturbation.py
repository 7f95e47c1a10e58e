"""Equation 8 by hand, which candidate is taken, and the controls that replace the direction alone."""

import pytest
import torch
from torch import Tensor

from defenses.nip import ChainHead, InversePerturbation, InversePerturbationConfig, NipPlan, Pool
from defenses.nip.head import Step
from defenses.purifier import PurifierNotExportable

ON = torch.ones(())


def made(**choices: object) -> InversePerturbation:
    """Four candidates for images (1, 2, 2), a layer of 4 neurons, k1 = k2 = 1, and a linear head of 3 classes."""
    given = {"similarity": "index", "search": "all", "amplitude": 1.0, **choices}
    config = InversePerturbationConfig("pooled", (4,), (1, 2, 2), 3, 4, 1, 1, (2,), precision="float32", **given)
    weight = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.0, 0.0], [0.2, 0.0, 0.0], [-1.0, 0.0, 0.0]])
    purifier = InversePerturbation(config, ChainHead([Step("product", weight)]))
    perturbations = torch.tensor([[0.5, -0.5, 0.0, 0.0], [0.0, 0.0, -0.5, 0.5], [1.0, 0.5, 0.2, 0.0], [0.0, 1.0, 0, 0]])
    keys = torch.tensor([0.4, 0.9, 0.9, -0.2])
    if config.similarity == "influence":
        keys = torch.eye(4)
    template = torch.tensor([[1.0, 2.0]])
    purifier.set_pool(Pool(perturbations.reshape(4, 1, 2, 2), keys, torch.tensor([0, 1, 2, 0]), template))
    return purifier.eval()


IMAGE = torch.tensor([[[[0.2, 0.4], [0.6, 0.8]]]])
LOGITS = torch.tensor([[2.0, 1.0, 0.0]])


def shown(*outputs: float) -> tuple[Tensor, Tensor]:
    return torch.tensor([outputs]), LOGITS


def test_equation_8_by_hand():
    # The influences are 1.0, 0.5, 0.2 and -1.0 times a factor: 1 and 2 remain, as in the template, so that the
    # similarity is 1, to which the second and the third candidate are equally near. The image's mean is 0.5.
    found = made()(IMAGE, ON, *shown(1, 1, 1, 1))
    assert found.flatten().tolist() == pytest.approx([0.2, 0.4, 0.6 - 0.25, 1.0])


def test_the_result_is_clipped_to_the_range_of_images():
    found = made(amplitude=4.0)(IMAGE, ON, *shown(1, 1, 1, 1))
    assert found.flatten().tolist() == pytest.approx([0.2, 0.4, 0.0, 1.0])


def test_the_amplitude_multiplies_the_perturbation():
    purifier = made()
    purifier.set_amplitude(0.1)
    found = purifier(IMAGE, ON, *shown(1, 1, 1, 1))
    assert found.flatten().tolist() == pytest.approx([0.2, 0.4, 0.6 - 0.025, 0.8 + 0.025])


def test_the_nearest_similarity_is_taken_and_of_equal_ones_the_first():
    purifier = made()
    # 2 and 1 remain, in that order: the similarity is (2 * 1 + 1 * 2) / 5 = 0.8.
    assert purifier.nearest(IMAGE, *shown(1, 0.1, 1, 1)).tolist() == [1]
    purifier.keys = torch.tensor([0.9, 0.7, 0.78, 0.85])
    assert purifier.nearest(IMAGE, *shown(1, 0.1, 1, 1)).tolist() == [2]


def test_an_empty_template_makes_every_similarity_zero():
    purifier = made()
    purifier.template = torch.zeros(1, 2)
    for outputs in ((1, 1, 1, 1), (1, 0.1, 1, 1)):
        assert purifier.nearest(IMAGE, *shown(*outputs)).tolist() == [3]
    purifier.keys = torch.zeros(4)
    assert purifier.nearest(IMAGE, *shown(1, 1, 1, 1)).tolist() == [0]


def test_candidates_of_the_predicted_class_come_before_all_others():
    purifier = made(search="class")
    assert purifier.nearest(IMAGE, *shown(1, 1, 1, 1)).tolist() == [0]
    purifier.classes = torch.tensor([1, 2, 1, 1])
    assert purifier.nearest(IMAGE, *shown(1, 1, 1, 1)).tolist() == [1], "the nearest of others, where it has none"


def test_influence_vectors_are_compared_themselves():
    purifier = made(similarity="influence")
    assert purifier.nearest(IMAGE, *shown(1, 1, 1, 1)).tolist() == [0]
    assert purifier.nearest(IMAGE, *shown(0, 0.1, 3, 0)).tolist() == [2]
    assert purifier.nearest(IMAGE, *shown(0, 0, 0, 0)).tolist() == [0], "no influence at all is equally far from all"


def test_a_random_candidate_replaces_the_direction_and_is_drawn_whatever_the_noise_scale():
    purifier = made()
    purifier.control = "random"
    x = IMAGE.expand(400, -1, -1, -1)
    activations, logits = (each.expand(400, -1) for each in shown(1, 1, 1, 1))
    torch.manual_seed(0)
    first = purifier(x, torch.zeros(()), activations, logits)
    torch.manual_seed(0)
    assert torch.equal(purifier(x, ON, activations, logits), first)
    distinct, counts = first.flatten(1).unique(dim=0, return_counts=True)
    assert len(distinct) == 4
    assert counts.min() > 60
    norms = purifier.direction(x, activations, logits).flatten(1).norm(dim=1)
    torch.testing.assert_close(norms, torch.full((400,), 0.5**0.5))  # that of the nearest candidate


def test_gaussian_noise_has_the_norm_of_the_nearest_candidate():
    purifier = made()
    own = purifier.direction(IMAGE, *shown(1, 1, 1, 1))
    purifier.control = "gaussian"
    first, second = (purifier.direction(IMAGE, *shown(1, 1, 1, 1)) for _ in range(2))
    assert first.norm() == pytest.approx(own.norm().item())
    assert not torch.allclose(first, second)


def test_a_control_is_not_served():
    purifier = made()
    purifier.check_exportable()
    purifier.control = "gaussian"
    with pytest.raises(PurifierNotExportable, match="got 'gaussian'"):
        purifier.check_exportable()


def test_half_precision_moves_no_pixel_by_more_than_its_rounding(purifier, splits, classifier):
    single, half = (purifier(precision=precision) for precision in ("float32", "float16"))
    assert half.pool.perturbations.dtype == torch.float16
    x = splits.test.images.float() / 255
    with torch.no_grad():
        logits, activations = classifier("linear").logits_and_features(x, single.config.layer)
        ours, theirs = (each(x, ON, activations, logits) for each in (half, single))
    # A perturbation lies within [-1, 1], where half precision rounds by at most 2^-12; the mean is below 1.
    assert 0 < (ours - theirs).abs().max() <= 2**-12


def test_gradients_reach_the_image_through_the_inverse_perturbation(purifier, classifier, splits):
    subject, moved = classifier("linear"), purifier()
    x = (splits.test.images[:3].float() / 255).requires_grad_()
    logits, activations = subject.logits_and_features(x, moved.config.layer)
    (gradient,) = torch.autograd.grad(subject(moved(x, ON, activations, logits)).square().sum(), x)
    assert gradient.abs().flatten(1).amax(1).min() > 0


@pytest.mark.parametrize(
    ("choices", "sentence"),
    [
        ({"k1": 0, "k2": 0}, "not both 0, got 0 and 0"),
        ({"k1": -1}, "got -1 and 5"),
        ({"eta": 0.0}, "eta above 0 and at most 1, got 0.0"),
        ({"template_share": 1.5}, "template_share above 0 and at most 1, got 1.5"),
        ({"candidates": 0}, "candidates above 0, got 0"),
        ({"amplitude": 0.0}, "amplitude above 0, got 0.0"),
        ({"accuracy_loss": -0.1}, "accuracy_loss of 0 or more"),
        ({"amplitudes": ()}, "amplitudes to try"),
        ({"amplitudes": (0.1, 0.0)}, "amplitudes above 0"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(choices, sentence):
    with pytest.raises(ValueError, match=sentence):
        NipPlan(**choices)


def test_the_paper_s_plan_is_the_printed_method():
    plan = NipPlan.paper()
    assert (plan.k1, plan.k2, plan.sign, plan.template, plan.similarity) == (5, 5, "tail-front", "global", "index")
    assert (plan.search, plan.eta, plan.amplitude, plan.accuracy_loss) == ("all", 1.0, 1.0, None)
