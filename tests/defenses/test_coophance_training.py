import math

import pytest
import torch

from defenses.coophance import Augmentation, RegulatorConfig, TrainingPlan, fit_regulator, steps_in

CONFIG = RegulatorConfig((1, 16, 16), channels=(4, 4, 8, 8), skip_channels=(1, 2, 2, 4), dropout=0.0)
CPU = torch.device("cpu")


def squares(count: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    images = torch.zeros(count, 1, 16, 16, dtype=torch.uint8)
    for image in images:
        top, left = torch.randint(0, 10, (2,), generator=generator).tolist()
        image[0, top : top + 6, left : left + 6] = 230
    return images


def pairs() -> list[tuple[torch.Tensor, torch.Tensor]]:
    x = squares(16).float() / 255
    return [(x, (x + 0.1).clamp(0, 1))]


def fit(steps: int = 30, seed: int = 0):
    stages = []
    plan = TrainingPlan(steps, batch_size=16, learning_rate=5e-3, seed=seed, augmentation=Augmentation(flip=False))
    fitted = fit_regulator(CONFIG, squares(), pairs(), plan, device=CPU, progress=lambda *report: stages.append(report))
    return fitted, stages


def test_training_brings_the_loss_down_and_sets_the_statistics():
    short, _ = fit(steps=5)
    long, stages = fit(steps=150)
    assert long.final_loss < 0.5 * short.final_loss
    for layer, statistics in zip(long.regulator.confusion_layers, long.statistics, strict=True):
        torch.testing.assert_close(layer.mu, statistics.mean)
        torch.testing.assert_close(layer.sigma, statistics.standard_deviation)
        assert layer.enabled
        assert layer.sigma.max() > 0
    assert ("sample model", 150, 150) in stages
    assert ("statistics", 16, 16) in stages
    assert stages[-1] == ("regulator", 60, 60)


def test_the_regulator_trains_only_the_last_forty_per_cent():
    _, stages = fit(steps=30)
    assert [done for stage, done, _ in stages if stage == "regulator"] == list(range(1, 13))


def test_same_seed_same_result_and_the_global_random_state_is_left_alone():
    torch.manual_seed(42)
    before = torch.get_rng_state()
    first, _ = fit(steps=10)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(7)
    second, _ = fit(steps=10)
    third, _ = fit(steps=10, seed=1)
    for name, value in first.regulator.state_dict().items():
        assert torch.equal(value, second.regulator.state_dict()[name]), name
    assert not torch.equal(first.regulator.to_image.weight, third.regulator.to_image.weight)


def test_a_time_budget_buys_steps_in_proportion():
    plan = TrainingPlan(steps=1, batch_size=16)
    few, many = (steps_in(CONFIG, plan, seconds, device=CPU) for seconds in (1.0, 20.0))
    assert few < many
    assert steps_in(CONFIG, plan, 0.0, device=CPU) == 5


def test_augmentation_without_amplitude_is_the_identity():
    x = torch.rand(4, 3, 16, 16)
    still = Augmentation(rotation=0, shift=0, zoom=0, flip=False)
    torch.testing.assert_close(still(x, torch.Generator().manual_seed(0)), x, atol=1e-5, rtol=0)


def test_augmentation_flips_half_of_the_images():
    x = torch.arange(16.0).expand(200, 1, 16, 16) / 16
    flipped = Augmentation(rotation=0, shift=0, zoom=0, flip=True)(x, torch.Generator().manual_seed(0))
    mirrored = (flipped[:, 0, 0, 0] > 0.5).sum().item()
    assert 70 < mirrored < 130


def test_augmentation_shifts_by_at_most_its_fraction():
    x = torch.zeros(100, 1, 32, 32)
    x[:, :, 15:17, 15:17] = 1
    moved = Augmentation(rotation=0, shift=5 / 32, zoom=0, flip=False)(x, torch.Generator().manual_seed(0))
    rows = (moved.sum(3)[:, 0] * torch.arange(32.0)).sum(1) / moved.sum((1, 2, 3))
    assert (rows - 15.5).abs().max() == pytest.approx(5, abs=0.5)


def test_rotation_keeps_distances():
    x = torch.zeros(50, 1, 33, 33)
    x[:, :, 16, 28] = 1
    turned = Augmentation(rotation=15, shift=0, zoom=0, flip=False)(x, torch.Generator().manual_seed(0))
    weights = turned[:, 0] / turned.sum((1, 2, 3)).reshape(-1, 1, 1)
    offsets = torch.arange(33.0) - 16
    rows, columns = (weights.sum(2) * offsets).sum(1), (weights.sum(1) * offsets).sum(1)
    torch.testing.assert_close(torch.hypot(rows, columns), torch.full((50,), 12.0), atol=0.3, rtol=0)
    assert rows.abs().max() <= 12 * math.sin(math.radians(15)) + 0.3
    assert rows.abs().max() > 1.5
