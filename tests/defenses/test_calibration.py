import pytest
import torch

from defenses.calibration import CalibrationTooSmall, calibrate


def test_threshold_is_the_order_statistic_of_a_case_computed_by_hand():
    scores = torch.arange(1.0, 100.0)[torch.randperm(99, generator=torch.Generator().manual_seed(0))]
    # n = 99: k = ceil(100 * 0.95) = 95, and exactly the 4 scores above 95 would be alerted
    assert calibrate(scores, 0.05) == 95.0
    assert (scores > calibrate(scores, 0.05)).sum() == 4


def test_the_smallest_sample_that_supports_a_budget_gives_its_largest_score():
    assert calibrate(torch.arange(19.0), 0.05) == 18.0
    with pytest.raises(CalibrationTooSmall, match="at least 19 benign calibration images, got 18") as caught:
        calibrate(torch.arange(18.0), 0.05)
    assert (caught.value.needed, caught.value.count) == (19, 18)


def test_rate_realised_on_fresh_scores_keeps_the_budget_on_average():
    generator = torch.Generator().manual_seed(0)
    rates = []
    for _ in range(400):
        threshold = calibrate(torch.randn(99, generator=generator), 0.05)
        rates.append((torch.randn(200, generator=generator) > threshold).float().mean())
    assert torch.stack(rates).mean().item() == pytest.approx(0.05, abs=0.004)


@pytest.mark.parametrize("budget", [0.0, 1.0, -0.1, 2.0])
def test_a_budget_outside_zero_and_one_is_refused(budget):
    with pytest.raises(ValueError, match="between 0 and 1"):
        calibrate(torch.arange(100.0), budget)


def test_a_score_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="finite"):
        calibrate(torch.tensor([float("nan")] * 50), 0.05)
