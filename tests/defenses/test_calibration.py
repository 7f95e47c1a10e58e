import pytest
import torch

from defenses.calibration import CalibrationTooSmall, calibrate, calibrate_classes, check_budget, p_values


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


@pytest.mark.parametrize(("count", "budget", "rank"), [(19, 0.05, 19), (99, 0.05, 95), (100, 0.05, 96), (9, 0.1, 9)])
def test_the_rank_of_the_threshold_is_told_without_any_scores(count, budget, rank):
    assert check_budget(count, budget) == rank


@pytest.mark.parametrize("budget", [0.01, 0.02, 0.05, 0.1, 0.2, 0.3])
def test_no_rounding_asks_for_one_image_more_than_the_budget_needs(budget):
    needed = round(1 / budget + 0.4999) - 1
    assert check_budget(needed, budget) == needed
    with pytest.raises(CalibrationTooSmall, match=f"at least {needed} benign calibration images, got {needed - 1}"):
        check_budget(needed - 1, budget)


def test_each_class_has_the_threshold_of_its_own_scores():
    scores = torch.cat([torch.arange(1.0, 100.0), torch.arange(1001.0, 1020.0)])
    predicted = torch.cat([torch.ones(99), torch.zeros(19)]).long()
    order = torch.randperm(118, generator=torch.Generator().manual_seed(0))
    assert calibrate_classes(scores[order], predicted[order], 2, 0.05) == [1019.0, 95.0]


def test_a_class_keeps_the_budget_on_average_however_its_scores_differ_from_the_others():
    generator = torch.Generator().manual_seed(0)

    def drawn(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        predicted = torch.arange(count) % 3
        return torch.randn(count, generator=generator) * (1 + predicted) + 5 * predicted, predicted

    rates = []
    for _ in range(400):
        thresholds = torch.tensor(calibrate_classes(*drawn(3 * 99), 3, 0.05))
        scores, predicted = drawn(600)
        rates.append((scores > thresholds[predicted]).reshape(-1, 3).float().mean(0))
    assert torch.stack(rates).mean(0).tolist() == pytest.approx([0.05] * 3, abs=0.005)


@pytest.mark.parametrize("count", [0, 18])
def test_a_class_that_too_few_images_are_given_is_named(count):
    predicted = torch.cat([torch.zeros(50), torch.full((count,), 2), torch.ones(40)]).long()
    told = f"at least 19 benign calibration images that are given class 2, got {count}"
    with pytest.raises(CalibrationTooSmall, match=told) as caught:
        calibrate_classes(torch.rand(90 + count), predicted, 3, 0.05)
    assert (caught.value.needed, caught.value.count) == (19, count)


def test_a_score_of_one_class_that_is_not_finite_is_refused():
    scores = torch.rand(60)
    scores[41] = float("inf")
    with pytest.raises(ValueError, match="finite"):
        calibrate_classes(scores, torch.arange(60) % 2, 2, 0.05)


def test_p_values_match_a_case_computed_by_hand():
    # n = 4: not below 2 are three of them, so (1 + 3) / 5; nothing is as high as 9, so 1 / 5
    scores = torch.tensor([2.0, 9.0, 1.0, 0.0, 3.0])
    expected = torch.tensor([0.8, 0.2, 1.0, 1.0, 0.4])
    torch.testing.assert_close(p_values(scores, torch.tensor([4.0, 1.0, 2.0, 2.0])), expected)


@pytest.mark.parametrize("budget", [0.01, 0.05, 0.1])
def test_a_score_is_above_the_threshold_just_where_its_p_value_is_within_the_budget(budget):
    generator = torch.Generator().manual_seed(2)
    benign = (torch.randn(499, generator=generator) * 20).round() / 20  # with ties
    scores = (2 * torch.randn(3000, generator=generator) * 20).round() / 20
    alerted = scores > calibrate(benign, budget)
    assert torch.equal(p_values(scores, benign) <= budget, alerted)
    assert alerted.any()


def test_the_p_value_of_a_further_benign_image_is_at_most_p_no_more_often_than_p():
    generator = torch.Generator().manual_seed(0)
    drawn = [p_values(torch.randn(20, generator=generator), torch.randn(49, generator=generator)) for _ in range(2000)]
    found = torch.cat(drawn)
    assert found.min() == pytest.approx(1 / 50)
    for p, share in ((0.02, 0.02), (0.05, 0.04), (0.1, 0.1), (0.5, 0.5)):
        # n = 49: no p-value lies between two fiftieths
        assert (found <= p).float().mean().item() == pytest.approx(share, abs=0.01)
