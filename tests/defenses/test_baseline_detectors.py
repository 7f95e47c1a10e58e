"""Baselines that detect: their statistics against other forms of them, what they are shown, and how they are fitted."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from torch import nn

from defenses.attacks import AdversarialExamples, attack
from defenses.baselines import BaselinePlan, fit_baseline
from defenses.baselines.bit_depth import reduce_bit_depth
from defenses.baselines.exceedance import LEVELS, Exceedance
from defenses.baselines.feature_squeezing import FeatureSqueezing
from defenses.baselines.identity import Identity
from defenses.baselines.lid import LidDetector, local_dimensionality, watched_layers
from defenses.baselines.lid_fit import fit_lid
from defenses.baselines.magnet import MagNetDetector, Reformer, divergence
from defenses.baselines.magnet_training import train_reformer
from defenses.baselines.non_local_means import non_local_means
from defenses.baselines.smoothing import median_filter
from defenses.calibration import CalibrationTooSmall
from defenses.classifier import Classifier, LayerNotFound
from defenses.detector import Evidence
from defenses.onnx_trace import export_classifier
from defenses.protected import ProtectedClassifier
from defenses.splits import LabelledImages, Splits
from defenses.stages import Stages

SHAPE = (3, 16, 16)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def classifier(randomised) -> Classifier:
    layers = randomised(
        nn.Sequential(
            *(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(128, 5)),
        )
    )
    with torch.no_grad():
        layers[5].bias -= layers(pictures(200)).mean(0)
    return Classifier(export_classifier(layers, SHAPE)).eval()


def pictures(count: int, seed: int = 0) -> torch.Tensor:
    """Smooth images of many colours."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 4, 4, generator=generator)
    return nn.functional.interpolate(coarse, (16, 16), mode="bilinear")


@pytest.fixture(scope="module")
def splits(classifier) -> Splits:
    """Images that the classifier gets right, as it is what names their classes."""

    def part(count: int, seed: int) -> LabelledImages:
        images = (pictures(count, seed) * 255).round().to(torch.uint8)
        return LabelledImages(images, classifier(images.float() / 255).argmax(1))

    return Splits(part(150, 1), part(60, 2), part(99, 3), part(80, 4))


def fitted(classifier, splits, method, folder, **given):
    return fit_baseline(
        classifier,
        splits,
        BaselinePlan.chosen(method, given),
        stages=Stages(folder),
        device=CPU,
        progress=lambda stage, done, total: None,
    )


def test_feature_squeezing_scores_the_largest_change_of_the_probabilities(classifier):
    x, detector = pictures(12), FeatureSqueezing(2, 2, 5, 0.1)
    output = ProtectedClassifier(classifier, Identity(), detector, 0.5)(x)
    squeezed = [reduce_bit_depth(x, 2), median_filter(x, 2), non_local_means(x, 5, 3, 0.1)]
    raw = classifier(x).softmax(1)
    changes = torch.stack([(classifier(each).softmax(1) - raw).abs().sum(1) for each in squeezed])
    torch.testing.assert_close(output.scores, changes.amax(0))
    assert len(set(changes.argmax(0).tolist())) > 1, "more than one squeezer counts"
    assert torch.equal(output.alerts, output.scores > 0.5)
    torch.testing.assert_close(output.logits, output.undefended_logits)


def test_each_image_is_shown_with_its_own_views(classifier):
    x = pictures(4)
    protected = ProtectedClassifier(classifier, Identity(), FeatureSqueezing(3, 2, 5, 0.1), 0.5)
    shown = protected.evidence(x).activations
    assert shown.shape == (4, 3, 5)
    torch.testing.assert_close(shown[2, 1], classifier(median_filter(x[2:3], 2))[0])
    torch.testing.assert_close(protected.activations(x), shown)


def test_gradients_reach_the_score_through_every_squeezer(classifier):
    x = pictures(2).requires_grad_()
    views = FeatureSqueezing(3, 2, 5, 0.1).views(x)
    for place in range(3):
        (gradient,) = torch.autograd.grad(views[:, place].square().sum(), x, retain_graph=True)
        assert torch.isfinite(gradient).all()
        assert gradient.any()


def test_several_layers_are_shown_flattened_and_joined(classifier):
    x = pictures(3)
    first, second = (layer.name for layer in classifier.layers() if layer.operator == "Relu")
    watched = watched_layers(classifier, (second, first))
    protected = ProtectedClassifier(classifier, Identity(), LidDetector(watched, 6, 4), 0.5)
    expected = torch.cat([classifier.features(x, name).flatten(1) for name in (second, first)], 1)
    torch.testing.assert_close(protected.evidence(x).activations, expected)
    torch.testing.assert_close(protected.activations(x), expected)


def test_layers_are_found_over_the_depth_or_named(classifier):
    found = watched_layers(classifier, ())
    assert len(found) == 5
    assert (found[-1].name, found[-1].shape) == ("logits", (5,))
    assert len({watch.name for watch in found}) == 5
    with pytest.raises(LayerNotFound, match="elsewhere"):
        watched_layers(classifier, ("elsewhere",))


def test_wide_maps_are_averaged_before_they_are_compared(randomised):
    wide = randomised(
        nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 32 * 32, 3))
    )
    classifier = Classifier(export_classifier(wide, (3, 32, 32))).eval()
    (watch,) = watched_layers(classifier, [next(each.name for each in classifier.layers() if each.operator == "Relu")])
    assert (watch.shape, watch.pool, watch.features) == ((16, 32, 32), 2, 16 * 16 * 16)
    detector = LidDetector((watch,), 6, 4)
    x = torch.rand(2, 3, 32, 32)
    shown = ProtectedClassifier(classifier, Identity(), detector, 0.5).activations(x)
    (features,) = detector.features(shown)
    expected = classifier.features(x, watch.name).reshape(2, 16, 16, 2, 16, 2).mean((3, 5))
    torch.testing.assert_close(features, expected.flatten(1))


def test_local_dimensionality_is_the_estimate_of_its_equation():
    features, references = torch.randn(7, 12), torch.randn(30, 12)
    distances = np.linalg.norm(features.numpy()[:, None] - references.numpy(), axis=2)
    nearest = np.sort(distances, 1)[:, :9]
    expected = -1 / np.log(nearest / nearest[:, -1:]).mean(1)
    np.testing.assert_allclose(local_dimensionality(features, references, 9), expected, rtol=1e-3)


@pytest.mark.parametrize("dimension", [2, 8])
def test_local_dimensionality_is_near_that_of_what_the_references_fill(dimension):
    generator = torch.Generator().manual_seed(0)
    turned = torch.linalg.qr(torch.randn(40, 40, generator=generator)).Q[:dimension]
    references = torch.rand(4000, dimension, generator=generator) @ turned
    inside = (0.4 + 0.2 * torch.rand(50, dimension, generator=generator)) @ turned
    found = local_dimensionality(inside, references, 50).mean().item()
    assert found == pytest.approx(dimension, rel=0.15)


def test_an_image_among_the_references_still_has_a_finite_dimensionality():
    references = torch.rand(20, 5)
    same = torch.zeros(3, 5)
    assert torch.isfinite(local_dimensionality(references, references, 5)).all()
    assert torch.isfinite(local_dimensionality(same, torch.zeros(20, 5), 5)).all()


def test_a_lid_regression_tells_attacked_images_from_clean_and_noisy_ones(classifier):
    torch.manual_seed(0)
    x = (pictures(80, seed=5) * 255).round().to(torch.uint8)
    # Further off the smooth images than their own distances: a change that is not smooth.
    x_adv = (x.float() / 255 + 0.3 * torch.randn(1, *SHAPE).sign()).clamp(0, 1)
    every = torch.ones(80, dtype=torch.bool)
    examples = AdversarialExamples(attack("fgsm"), x, x_adv, torch.zeros(80).long(), torch.arange(80), every, every)
    detector = LidDetector(watched_layers(classifier, ()), 50, 10)
    protected = ProtectedClassifier(classifier, Identity(), detector, 0.5).eval()
    references = (pictures(50, seed=6) * 255).round().to(torch.uint8)
    fit_lid(detector, protected.activations, references, [examples], batch_size=32, device=CPU)
    with torch.no_grad():
        benign = protected(pictures(80, seed=7)).scores
        attacked = protected((pictures(80, seed=8) + 0.3 * torch.randn(1, *SHAPE).sign()).clamp(0, 1)).scores
        known = [classifier.features(references.float() / 255, watch.name) for watch in detector.watched]
    for kept, expected in zip(detector.references, known, strict=True):
        torch.testing.assert_close(kept, expected.flatten(1))
    assert (attacked[:, None] > benign).float().mean() > 0.8
    nobody = AdversarialExamples(*(examples.attack, x, x_adv, examples.y, examples.rows, ~every, ~every))
    with pytest.raises(ValueError, match="at least 10 images that fool the classifier, got 0"):
        fit_lid(detector, protected.activations, references, [nobody], batch_size=32, device=CPU)


@pytest.mark.parametrize("temperature", [1.0, 10.0, 40.0])
def test_the_divergence_is_scipys(temperature):
    first, second = 5 * torch.randn(9, 6), 5 * torch.randn(9, 6)
    expected = [
        jensenshannon(p, q) ** 2
        for p, q in zip(
            (first.double() / temperature).softmax(1).numpy(),
            (second.double() / temperature).softmax(1).numpy(),
            strict=True,
        )
    ]
    np.testing.assert_allclose(divergence(first, second, temperature), expected, rtol=1e-6)
    assert divergence(first, first, temperature).max() < 1e-15


def test_exceedance_says_how_rare_a_statistic_is_whatever_its_units():
    benign = torch.rand(20_000, 2).double()
    benign[:, 1] = 1e-6 * benign[:, 1].square()
    ranks = Exceedance(2)
    ranks.fit(benign)
    found = ranks(benign.quantile(torch.tensor([*LEVELS[1:], 0.995]).double(), dim=0))
    expected = -np.log2(1 - np.array([*LEVELS[1:]]))
    np.testing.assert_allclose(found[:-1], np.stack([expected] * 2, 1), atol=2e-2)
    assert (found[-1] > found[-2]).all(), "it goes on rising beyond the last quantile that is kept"
    ascending = ranks(torch.linspace(-0.5, 2, 100).double().unsqueeze(1).repeat(1, 2))
    assert (ascending.diff(dim=0) > 0).all()
    with pytest.raises(ValueError, match="benign validation images"):
        ranks.fit(benign[:0])


def test_exceedance_stays_finite_where_benign_images_are_all_alike():
    ranks = Exceedance(1)
    ranks.fit(torch.full((30, 1), 0.25))
    assert torch.isfinite(ranks(torch.tensor([[0.0], [0.25], [1.0]]).double())).all()


def test_magnet_scores_the_most_unusual_of_its_statistics():
    detector = MagNetDetector()
    evidence = Evidence(torch.zeros(40, 0), torch.randn(40, 5), torch.randn(40, 5), torch.rand(40))
    statistics = detector.statistics(evidence)
    torch.testing.assert_close(statistics[:, 0], evidence.distance.double())
    torch.testing.assert_close(statistics[:, 2], divergence(evidence.undefended_logits, evidence.logits, 40))
    detector.exceedance.fit(statistics)
    scores = detector(*evidence)
    torch.testing.assert_close(scores, detector.exceedance(statistics).amax(1).float())
    assert set(detector.exceedance(statistics).argmax(1).tolist()) > {0}


def test_an_autoencoder_learns_and_goes_on_where_it_was_left(tmp_path):
    images = (pictures(64, seed=9) * 255).to(torch.uint8)

    def train(folder, epochs):
        torch.manual_seed(0)
        reformer = Reformer(3)
        loss = train_reformer(
            reformer,
            images,
            epochs=epochs,
            sigma=0.025,
            batch_size=16,
            seed=3,
            stages=Stages(folder),
            device=CPU,
            progress=lambda done, total: None,
        )
        return reformer, loss

    _, once = train(tmp_path / "once", 1)
    whole, loss = train(tmp_path / "whole", 6)
    train(tmp_path / "parts", 2)
    resumed, resumed_loss = train(tmp_path / "parts", 6)
    assert loss < 0.7 * once
    assert resumed_loss == loss
    for ours, theirs in zip(resumed.state_dict().values(), whole.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_detector_is_calibrated_to_its_budget(classifier, splits, tmp_path):
    found = fitted(classifier, splits, "magnet", tmp_path / "a", epochs=1, budget=0.1)
    scores = found.calibration_scores
    assert scores.tolist() == sorted(scores.tolist())
    assert (scores > found.protected.threshold).float().mean() <= 0.1
    assert found.metrics.keys() == {
        "clean_accuracy_undefended",
        "clean_accuracy",
        "clean_accuracy_accepted",
        "false_positive_rate",
    }
    assert found.metrics["clean_accuracy_undefended"] == 1
    assert found.metrics["false_positive_rate"] == found.clean.false_positive_rate < 0.4
    assert "autoencoder" in found.seconds
    with pytest.raises(CalibrationTooSmall, match="needs at least 199"):
        fitted(classifier, splits, "feature-squeezing", tmp_path / "b", budget=0.005)


def test_lid_is_fitted_to_attacks_on_images_that_it_does_not_compare_with(classifier, splits, tmp_path):
    given = {"attacks": ("fgsm:epsilon=40/255",), "examples": 60, "references": 40, "neighbors": 10}
    found = fitted(classifier, splits, "lid", tmp_path / "a", **given)
    again = fitted(classifier, splits, "lid", tmp_path / "a", **given)
    (examples,) = found.examples
    assert len(examples.y) == 60
    assert examples.fooled.sum() >= 10
    reference = found.protected.detector.references[0]
    seen = found.protected.detector.features(found.protected.activations(examples.x.float() / 255))[0]
    assert torch.cdist(seen, reference).min() > 1e-3
    assert torch.equal(again.protected.threshold, found.protected.threshold)
    assert found.protected.detector.weight.any()
    with pytest.raises(ValueError, match="more than 150 benign fitting images, 150 of them to compare with, got 150"):
        fitted(classifier, splits, "lid", tmp_path / "b", references=150)


def test_a_purifier_is_measured_and_alerts_of_nothing(classifier, splits, tmp_path):
    found = fitted(classifier, splits, "bit-depth", tmp_path, bits=1)
    assert found.calibration_scores is None
    assert found.metrics.keys() == {"clean_accuracy_undefended", "clean_accuracy"}
    assert found.metrics["clean_accuracy"] < found.metrics["clean_accuracy_undefended"] == 1
    assert not found.protected(torch.rand(4, *SHAPE)).alerts.any()
