import pytest
import torch
from torch import nn

from defenses.coophance import ConfusionLayer, Fluctuation, FluctuationStatistics, measure_fluctuations

ON, OFF = torch.ones(()), torch.zeros(())


def test_statistics_match_a_case_computed_by_hand():
    statistics = FluctuationStatistics(2)
    clean = torch.tensor([[[[0.0, 1.0]], [[2.0, 2.0]]]])
    adversarial = torch.tensor([[[[1.0, 4.0]], [[2.0, 2.0]]]])
    statistics.add(clean, adversarial)
    statistics.add(clean, clean - torch.tensor([2.0, 1.0]).reshape(1, 2, 1, 1))
    # channel 0: distances 1, 3, -2, -2: mean 0, variance (1 + 9 + 4 + 4) / 4; channel 1: 0, 0, -1, -1
    assert statistics.count == 4
    mean, standard_deviation = statistics.fluctuation()
    torch.testing.assert_close(mean, torch.tensor([0.0, -0.5]))
    torch.testing.assert_close(standard_deviation, torch.tensor([4.5**0.5, 0.5]))


def test_statistics_of_batches_equal_those_of_the_whole():
    clean, adversarial = torch.rand(10, 3, 4, 4), torch.rand(10, 3, 4, 4)
    whole, parts = FluctuationStatistics(3), FluctuationStatistics(3)
    whole.add(clean, adversarial)
    for rows in (slice(0, 3), slice(3, 10)):
        parts.add(clean[rows], adversarial[rows])
    distance = (adversarial - clean).transpose(0, 1).flatten(1)
    expected = (distance.mean(1), distance.std(1, correction=0))
    for fluctuation in (whole.fluctuation(), parts.fluctuation()):
        torch.testing.assert_close(tuple(fluctuation), expected)


class Doubling(nn.Module):
    """Feeds its input, doubled, to one confusion layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = ConfusionLayer(1, alpha=1.0)

    def forward(self, x, noise_scale):
        return self.layer(2 * x, noise_scale)


def test_fluctuations_are_adversarial_minus_clean_at_the_layers_input():
    model = Doubling().eval()
    x = torch.zeros(4, 1, 2, 2)
    (fluctuation,) = measure_fluctuations(model, [model.layer], [(x, x + 0.25), (x, x + 0.75)])
    assert fluctuation.mean.item() == pytest.approx(1.0)  # 2 * (0.25 + 0.75) / 2, positive: it imitates the attack
    assert fluctuation.standard_deviation.item() == pytest.approx(0.5)
    assert not model.layer._forward_pre_hooks


def test_fluctuations_without_pairs_are_refused():
    model = Doubling()
    with pytest.raises(ValueError, match="at least one pair"):
        measure_fluctuations(model, [model.layer], [])


def test_noise_has_the_mean_and_deviation_that_were_set_per_channel():
    layer = ConfusionLayer(2, alpha=3.0)
    layer.imitate(Fluctuation(torch.tensor([1.0, -2.0]), torch.tensor([0.5, 0.1])))
    torch.manual_seed(0)
    noise = layer(torch.zeros(64, 2, 32, 32), ON).transpose(0, 1).flatten(1)
    torch.testing.assert_close(noise.mean(1), torch.tensor([1.0, -2.0]), atol=0.03, rtol=0)
    torch.testing.assert_close(noise.std(1), torch.tensor([1.5, 0.3]), atol=0.02, rtol=0)


def test_noise_differs_between_images_and_calls_and_repeats_under_a_seed():
    layer = ConfusionLayer(1, alpha=1.0)
    layer.imitate(Fluctuation(torch.zeros(1), torch.ones(1)))
    zeros = torch.zeros(2, 1, 4, 4)
    torch.manual_seed(1)
    first = layer(zeros, ON)
    second = layer(zeros, ON)
    torch.manual_seed(1)
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, second)
    assert torch.equal(layer(zeros, ON), first)


@pytest.mark.parametrize("quiet", ["scale", "disabled", "unset"])
def test_a_layer_that_is_off_is_the_identity(quiet):
    layer = ConfusionLayer(1, alpha=1.0)
    if quiet != "unset":
        layer.imitate(Fluctuation(torch.ones(1), torch.ones(1)))
    layer.enabled = quiet != "disabled"
    x = torch.rand(2, 1, 4, 4)
    assert torch.equal(layer(x, OFF if quiet == "scale" else ON), x)
