import math
from pathlib import Path

import pytest
import torch

from defenses.coophance import (
    Augmentation,
    RegulatorConfig,
    RegulatorPlan,
    TrainedRegulator,
    TrainingPlan,
    fit_regulator,
    steps_in,
)
from defenses.coophance.trainer import Trainer
from defenses.stages import Stages

CONFIG = RegulatorConfig((1, 16, 16), channels=(4, 4, 8, 8), skip_channels=(1, 2, 2, 4), dropout=0.1)
RESIDUAL = RegulatorConfig((1, 16, 16), channels=(4, 8), skip_channels=(2, 4), output="residual")
CPU = torch.device("cpu")


def squares(count: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    images = torch.zeros(count, 1, 16, 16, dtype=torch.uint8)
    for image in images:
        top, left = torch.randint(0, 10, (2,), generator=generator).tolist()
        image[0, top : top + 6, left : left + 6] = 230
    return images


def pairs() -> list[tuple[torch.Tensor, torch.Tensor]]:
    x = squares(16)
    return [(x, (x.float() / 255 + 0.1).clamp(0, 1))]


def plan(steps: int = 30, **changes) -> TrainingPlan:
    given = {"batch_size": 16, "learning_rate": 5e-3, "augmentation": Augmentation(flip=False), **changes}
    return TrainingPlan(steps, **given)


def fit(folder: Path, config: RegulatorConfig = CONFIG, progress=lambda *report: None, **changes) -> TrainedRegulator:
    stages = Stages(folder)
    return fit_regulator(config, squares(), pairs(), plan(**changes), stages=stages, device=CPU, progress=progress)


def weights(trained: TrainedRegulator) -> dict[str, torch.Tensor]:
    return {
        f"{step}.{name}": value
        for step, regulator in trained.stopping_points.items()
        for name, value in regulator.state_dict().items()
    }


def assert_same(first: TrainedRegulator, second: TrainedRegulator) -> None:
    left, right = weights(first), weights(second)
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


@pytest.mark.parametrize("config", [CONFIG, RESIDUAL])
def test_training_brings_the_loss_down_and_sets_the_statistics(tmp_path, config):
    reports = []
    trained = fit(tmp_path, config, steps=160, progress=lambda *report: reports.append(report))
    for curve in trained.curves.values():
        assert curve[-1][1] < curve[0][1]
        assert curve[-1][0] == 160
    regulator = trained.stopping_points[160]
    for layer, fluctuation in zip(regulator.confusion_layers, trained.fluctuations, strict=True):
        torch.testing.assert_close(layer.mu, fluctuation.mean)
        torch.testing.assert_close(layer.sigma, fluctuation.standard_deviation)
        assert layer.enabled
        assert layer.sigma.max() > 0
    assert ("sample model", 160, 160) in reports
    assert ("statistics", 16, 16) in reports
    assert reports[-1] == ("regulator", 160, 160)


def test_the_regulator_trains_only_the_last_forty_per_cent_and_may_stop_at_four_points(tmp_path):
    reports = []
    trained = fit(tmp_path, steps=30, progress=lambda *report: reports.append(report))
    assert [done for stage, done, _ in reports if stage == "regulator"] == list(range(19, 31))
    assert list(trained.stopping_points) == [21, 24, 27, 30]
    weights = [weight for regulator in trained.stopping_points.values() for weight in regulator.parameters()]
    assert all(weight.is_contiguous() for weight in weights), "else an exported graph transposes around its noise"


def test_without_confusion_there_is_no_sample_model(tmp_path):
    reports = []
    trained = fit(tmp_path, steps=30, confusion=False, progress=lambda *report: reports.append(report))
    assert {stage for stage, _, _ in reports} == {"regulator"}
    assert trained.fluctuations == []
    assert all(layer.sigma.max() == 0 for layer in trained.stopping_points[30].confusion_layers)


def test_same_seed_same_result_and_the_global_random_state_is_left_alone(tmp_path):
    torch.manual_seed(42)
    before = torch.get_rng_state()
    first = fit(tmp_path / "a", steps=10)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(7)
    assert_same(first, fit(tmp_path / "b", steps=10))
    other = fit(tmp_path / "c", steps=10, seed=1)
    assert not torch.equal(weights(first)["10.to_image.weight"], weights(other)["10.to_image.weight"])


class Killed(BaseException):
    """Stands for a kill: nothing of ours catches it."""


@pytest.mark.parametrize("confusion", [True, False])
def test_a_training_that_was_killed_again_and_again_comes_to_the_same(tmp_path, monkeypatch, confusion):
    monkeypatch.setattr("defenses.coophance.trainer.KEEP_EVERY", 0.0)
    monkeypatch.setattr("defenses.coophance.trainer.POINT_EVERY", 3)
    whole = fit(tmp_path / "whole", steps=30, confusion=confusion)
    taken: list[int] = []

    def dying(stage: str, done: int, total: int) -> None:
        taken.append(done)
        if len(taken) % 5 == 0:
            raise Killed

    kills = 0
    while True:
        try:
            resumed = fit(tmp_path / "killed", steps=30, confusion=confusion, progress=dying)
            break
        except Killed:
            kills += 1
    assert kills >= 5
    assert len(taken) < 30 * 3  # what was kept was not done again from the start
    assert_same(whole, resumed)
    assert whole.curves == resumed.curves


def test_a_finished_training_is_not_done_again(tmp_path):
    first = fit(tmp_path, steps=10)
    reports = []
    assert_same(first, fit(tmp_path, steps=10, progress=lambda *report: reports.append(report)))
    assert reports == []


def test_reduced_precision_trains_to_about_the_same_loss(tmp_path):
    exact = fit(tmp_path / "a", steps=60, confusion=False)
    reduced = fit(tmp_path / "b", steps=60, confusion=False, precision="bfloat16")
    assert reduced.curves["regulator"][-1][1] == pytest.approx(exact.curves["regulator"][-1][1], rel=0.1)
    assert all(value.dtype in (torch.float32, torch.int64) for value in weights(reduced).values())


def test_the_average_of_the_weights_follows_them():
    trainer = Trainer(CONFIG, squares(), plan(averaging=0.0), CPU)
    trainer.advance()
    for average, value in zip(trainer.average.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(average, value)
    slow = Trainer(CONFIG, squares(), plan(steps=40, averaging=0.999), CPU)
    for _ in range(40):
        slow.advance()
    apart = [
        float((a - b).detach().abs().max())
        for a, b in zip(slow.average.parameters(), slow.model.parameters(), strict=True)
    ]
    assert 0 < max(apart) < 0.2


@pytest.mark.parametrize(("schedule", "last"), [("cosine", 0.0), ("constant", 5e-3)])
def test_the_learning_rate_follows_its_schedule(schedule, last):
    trainer = Trainer(CONFIG, squares(), plan(steps=400, schedule=schedule), CPU)
    trainer.step = 399
    trainer.advance()
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(last, abs=1e-6)


def test_a_time_budget_buys_steps_in_proportion():
    few, many = (steps_in(CONFIG, plan(steps=1), seconds, device=CPU) for seconds in (1.0, 20.0))
    assert few < many
    assert steps_in(CONFIG, plan(steps=1), 0.0, device=CPU) == 5


@pytest.mark.parametrize(
    ("images", "epochs", "batch_size", "expected"),
    [(60, 20, 128, (20, 60)), (128, 20, 128, (20, 128)), (1280, 2.5, 128, (25, 128)), (200, 3, 64, (9, 64))],
)
def test_so_many_epochs_are_trained_as_were_asked_for(images, epochs, batch_size, expected):
    training = RegulatorPlan(epochs=epochs, batch_size=batch_size).training(images, 0, CPU)
    assert (training.steps, training.batch_size) == expected
    assert training.steps * training.batch_size / images == pytest.approx(epochs, rel=0.05)


def test_the_precision_is_settled_by_the_device(monkeypatch):
    for has, found in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr("defenses.coophance.plan.has_bfloat16", lambda device, has=has: has)
        automatic = RegulatorPlan(epochs=3)
        assert automatic.settled(CPU) == RegulatorPlan(epochs=3, precision=found)
        assert automatic.training(100, 0, CPU) == automatic.settled(CPU).training(100, 0, CPU)
        assert automatic.training(100, 0, CPU).precision == found
        for given in ("float32", "bfloat16"):
            assert RegulatorPlan(precision=given).settled(CPU).precision == given


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
