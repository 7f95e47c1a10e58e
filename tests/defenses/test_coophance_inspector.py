import pytest
import torch

from defenses.coophance import Inspector, InspectorConfig, fit_inspector

CONFIG = InspectorConfig(layer="layer2", features=4, classes=3)


def test_score_is_the_decision_of_the_predicted_classs_regression():
    inspector = Inspector(CONFIG)
    inspector.weight.data = torch.tensor([[1.0, 0, 0, 0], [0, 2, 0, 0], [0, 0, 3, 0]])
    inspector.bias.data = torch.tensor([0.5, 0.0, -1.0])
    activations = torch.ones(3, 1, 2, 2)
    logits = torch.tensor([[9.0, 0, 0], [0, 9, 0], [0, 0, 9]])
    assert inspector(activations, logits).tolist() == [1.5, 2.0, 2.0]


def examples(shift: float, count: int, classes: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 1, 2, 2, generator=generator) + shift
    return images, torch.arange(count) % classes


def fit(benign, adversarial):
    return fit_inspector(CONFIG, lambda images: images, benign, adversarial, progress=lambda done, total: None)


def test_fitted_regressions_tell_the_kinds_apart():
    inspector, report = fit(examples(-1, 300, 3, 0), examples(1, 150, 3, 1))
    fresh, classes = examples(1, 90, 3, 2)
    benign, _ = examples(-1, 90, 3, 3)
    logits = torch.nn.functional.one_hot(classes, 3).float()
    assert (inspector(fresh, logits) > 0).float().mean() > 0.9
    assert (inspector(benign, logits) > 0).float().mean() < 0.1
    assert report.negatives == (100, 100, 100)
    assert report.positives == (50, 50, 50)
    assert report.pooled == ()


def test_class_weights_balance_the_kinds():
    inspector, _ = fit(examples(-0.5, 3000, 3, 0), examples(0.5, 60, 3, 1))
    benign, classes = examples(-0.5, 300, 3, 2)
    adversarial, _ = examples(0.5, 300, 3, 3)
    logits = torch.nn.functional.one_hot(classes, 3).float()
    false_positives = (inspector(benign, logits) > 0).float().mean().item()
    false_negatives = (inspector(adversarial, logits) <= 0).float().mean().item()
    assert false_positives == pytest.approx(false_negatives, abs=0.1)  # unbalanced, nearly all would be negative


def test_a_class_without_adversarial_examples_shares_the_pooled_detector():
    benign, (images, classes) = examples(-1, 300, 3, 0), examples(1, 100, 2, 1)
    inspector, report = fit(benign, (images, classes))
    assert report.positives == (50, 50, 0)
    assert report.pooled == (2,)
    fresh, _ = examples(1, 100, 3, 2)
    assert (inspector(fresh, torch.tensor([[0.0, 0, 1]]).expand(100, 3)) > 0).float().mean() > 0.9


def test_too_few_examples_are_refused_with_the_number():
    with pytest.raises(ValueError, match="at least 10 adversarial images, got 4"):
        fit(examples(-1, 300, 3, 0), examples(1, 4, 3, 1))
