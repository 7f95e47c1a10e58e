from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from defenses.coophance import (
    Inspector,
    InspectorConfig,
    InspectorExamples,
    Watched,
    fit_inspector,
    fit_regressions,
)
from defenses.coophance.inspector import pool_within
from defenses.detector import Evidence
from defenses.stages import Stages

CONFIG = InspectorConfig(layer="layer2", shape=(1, 2, 2), classes=3)
CPU = torch.device("cpu")


def evidence(activations: Tensor, logits: Tensor) -> Evidence:
    return Evidence(activations, logits, logits, torch.zeros(len(logits)))


def answers(classes: Tensor) -> Tensor:
    return 5 * torch.nn.functional.one_hot(classes, 3).float()


def watched(shift: float, count: int, classes: int, seed: int, corrected: bool = False) -> Watched:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 1, 2, 2, generator=generator) + shift
    return Watched(images, torch.arange(count) % classes, torch.full((count,), corrected))


def regressions(folder: Path, benign: Watched, adversarial: Watched, **changes):
    options = {"inverse_penalties": (1e-2,), "surviving": False, "progress": lambda done, total: None, **changes}
    penalties = options.pop("inverse_penalties")
    return fit_regressions(lambda x: x.flatten(1), benign, adversarial, 3, penalties, stages=Stages(folder), **options)


def test_score_is_the_decision_of_the_predicted_classs_regression():
    inspector = Inspector(CONFIG)
    inspector.weight.data = torch.tensor([[1.0, 0, 0, 0], [0, 2, 0, 0], [0, 0, 3, 0]])
    inspector.bias.data = torch.tensor([0.5, 0.0, -1.0])
    seen = evidence(torch.ones(3, 1, 2, 2), answers(torch.arange(3)))
    assert inspector(*seen).tolist() == [1.5, 2.0, 2.0]


def test_wide_maps_are_pooled_to_what_is_allowed():
    assert pool_within((32, 16, 16), 8192) == 1
    assert pool_within((128, 16, 16), 16384) == 2
    assert pool_within((64, 56, 56), 16384) == 4
    assert pool_within((512,), 10) == 1
    config = InspectorConfig("a", (2, 5, 4), classes=3, pool=2)
    assert config.features == 8
    activations = torch.arange(40.0).reshape(1, 2, 5, 4)
    expected = torch.nn.functional.avg_pool2d(activations, 2).flatten(1)
    assert torch.equal(Inspector(config).features(activations), expected)


def test_configuration_survives_json():
    config = InspectorConfig("layer2", (32, 16, 16), 10, "purified", 2, fusion=True)
    assert InspectorConfig.from_json(config.as_json()) == config


def test_fitted_regressions_tell_the_kinds_apart(tmp_path):
    fitted = regressions(tmp_path, watched(-1, 300, 3, 0), watched(1, 150, 3, 1))
    assert (fitted.negatives, fitted.positives, fitted.shared) == ((100,) * 3, (50,) * 3, ())
    assert fitted.weights.shape == (1, 3, 4)
    inspector = Inspector(CONFIG)
    inspector.weight.data, inspector.bias.data = fitted.weights[0], fitted.biases[0]
    for shift, caught in ((1, True), (-1, False)):
        fresh = watched(shift, 90, 3, 2)
        scores = inspector(*evidence(fresh.images, answers(fresh.predicted)))
        assert ((scores > 0) == caught).float().mean() > 0.9


def test_class_weights_balance_the_kinds(tmp_path):
    fitted = regressions(tmp_path, watched(-0.5, 3000, 3, 0), watched(0.5, 60, 3, 1))
    weight, bias = fitted.weights[0, 0], fitted.biases[0, 0]
    wrong = [
        ((watched(shift, 600, 3, 2).images.flatten(1) @ weight + bias > 0) == alarm).float().mean().item()
        for shift, alarm in ((-0.5, True), (0.5, False))
    ]
    assert wrong[0] == pytest.approx(wrong[1], abs=0.1)  # unbalanced, nearly all would be negative


def test_a_class_without_adversarial_examples_shares_the_regression_of_all(tmp_path):
    fitted = regressions(tmp_path, watched(-1, 300, 3, 0), watched(1, 100, 2, 1))
    assert fitted.positives == (50, 50, 0)
    assert fitted.shared == (2,)
    decisions = watched(1, 100, 3, 2).images.flatten(1) @ fitted.weights[0, 2] + fitted.biases[0, 2]
    assert (decisions > 0).float().mean() > 0.9


def test_what_the_regulator_undoes_is_left_out_where_enough_remains(tmp_path):
    left, undone = watched(1, 60, 3, 1), watched(-3, 60, 3, 4, corrected=True)
    both = Watched(*(torch.cat(column) for column in zip(left, undone, strict=True)))
    surviving = regressions(tmp_path / "a", watched(-1, 300, 3, 0), both, surviving=True)
    assert surviving.positives == (20, 20, 20)
    everything = regressions(tmp_path / "b", watched(-1, 300, 3, 0), both)
    assert everything.positives == (40, 40, 40)
    few = Watched(both.images, both.predicted, torch.ones(120, dtype=torch.bool))
    assert regressions(tmp_path / "c", watched(-1, 300, 3, 0), few, surviving=True).positives == (40, 40, 40)


def test_classes_that_are_kept_are_not_fitted_again(tmp_path):
    first = regressions(tmp_path, watched(-1, 300, 3, 0), watched(1, 150, 3, 1))

    def fails(images: Tensor) -> Tensor:
        raise AssertionError("nothing is left to be fitted")

    again = fit_regressions(
        fails,
        watched(-1, 300, 3, 0),
        watched(1, 150, 3, 1),
        3,
        (1e-2,),
        surviving=False,
        stages=Stages(tmp_path),
        progress=lambda done, total: None,
    )
    assert torch.equal(first.weights, again.weights)
    assert first.seconds == again.seconds


def test_too_few_examples_are_refused_with_the_number(tmp_path):
    with pytest.raises(ValueError, match="at least 10 adversarial images, got 4"):
        regressions(tmp_path, watched(-1, 300, 3, 0), watched(1, 4, 3, 1))


def whole_fit(folder: Path, config: InspectorConfig, evidence_of: Callable[[Tensor], Evidence], penalties, seed=0):
    examples = InspectorExamples(
        benign=watched(-0.3, 240, 3, seed),
        adversarial=watched(0.3, 120, 3, seed + 1),
        clean=watched(-0.3, 300, 3, seed + 2),
        attacks={"one": watched(0.3, 200, 3, seed + 3), "two": watched(0.4, 200, 3, seed + 4)},
    )
    return fit_inspector(
        config,
        lambda x: x,
        evidence_of,
        examples,
        penalties,
        surviving=True,
        device=CPU,
        seed=0,
        stages=Stages(folder),
        progress=lambda done, total: None,
    )


def by_mean(x: Tensor) -> Evidence:
    return evidence(x, answers(torch.arange(len(x)) % 3))


def test_the_inverse_penalty_that_does_best_on_validation_is_taken(tmp_path):
    inspector, report = whole_fit(tmp_path, CONFIG, by_mean, (1e-6, 1.0))
    assert set(report.areas) == {"1e-06", "1"}
    assert report.areas[f"{report.inverse_penalty:g}"] == max(report.areas.values())
    assert min(report.areas.values()) > 0.6
    assert inspector.fusion is None


def test_a_fusion_catches_what_the_activations_do_not_show(tmp_path):
    """Where the activations say nothing, the margin of the raw answer gives minimal attacks away."""

    def on_the_boundary(x: Tensor) -> Evidence:
        adversarial = x.mean((1, 2, 3)) > 0
        logits = answers(torch.arange(len(x)) % 3)
        raw = torch.where(adversarial[:, None], 0.01 * logits, logits + 0.1 * x.flatten(1)[:, :3])
        return Evidence(torch.zeros_like(x), logits, raw, torch.ones(len(x)))

    config = InspectorConfig("layer2", (1, 2, 2), 3, fusion=True)
    fused, _ = whole_fit(tmp_path / "a", config, on_the_boundary, (1e-2,))
    alone, _ = whole_fit(tmp_path / "b", CONFIG, on_the_boundary, (1e-2,))
    clean, attacked = watched(-2, 200, 3, 7).images, watched(2, 200, 3, 8).images
    threshold = fused(*on_the_boundary(clean)).quantile(0.95)
    assert (fused(*on_the_boundary(attacked)) > threshold).float().mean() > 0.95
    assert torch.equal(alone(*on_the_boundary(attacked)).sort().values, alone(*on_the_boundary(clean)).sort().values)


def test_a_fusion_has_gradients(tmp_path):
    def varied(x: Tensor) -> Evidence:
        logits, flat = answers(torch.arange(len(x)) % 3), x.flatten(1)
        return Evidence(x, logits + 0.2 * flat[:, :3], logits + 0.5 * flat[:, 1:], flat.norm(dim=1))

    config = InspectorConfig("layer2", (1, 2, 2), 3, fusion=True)
    fused, _ = whole_fit(tmp_path, config, varied, (1e-2,))
    logits = torch.tensor([[5.1, 0.1, 0.0]]).requires_grad_()
    raw = torch.tensor([[5.0, 0.2, 0.1]]).requires_grad_()
    fused(torch.ones(1, 1, 2, 2), logits, raw, torch.ones(1)).backward()
    for tensor in (logits, raw):
        assert tensor.grad is not None
        assert tensor.grad.abs().max() > 0
        assert torch.isfinite(tensor.grad).all()
