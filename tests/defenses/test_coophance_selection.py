from types import MappingProxyType

import pytest
import torch
from torch import Tensor, nn

from defenses.attacks import AdversarialExamples, Attack, Facts
from defenses.coophance import Regulator, RegulatorConfig, Selection, select
from defenses.coophance.selection import NothingToChooseBy, answers_of

CPU = torch.device("cpu")


class Brightness(nn.Module):
    """Answers 1 for images brighter than a half, else 0."""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((1, 2, 3))
        return torch.stack([0.5 - mean, mean - 0.5], 1)


def brightening(by: float) -> Regulator:
    """Return a Regulator that adds a constant to every pixel."""
    regulator = Regulator(RegulatorConfig((1, 4, 4), channels=(2, 2), skip_channels=(0, 1), output="residual")).eval()
    torch.nn.init.constant_(regulator.to_image.bias, by)
    return regulator


def grey(*levels: float) -> Tensor:
    return torch.tensor(levels).reshape(-1, 1, 1, 1).expand(-1, 1, 4, 4).contiguous()


def attacked(*levels: float) -> AdversarialExamples:
    """Return bright images that an attack made as dark as given."""
    x_adv = grey(*levels)
    fooled = x_adv.mean((1, 2, 3)) < 0.5
    kinds = (torch.ones(len(levels), dtype=torch.int64), torch.arange(len(levels)), fooled, fooled)
    darken = Attack("darken", MappingProxyType({}), lambda model, x, y: x, Facts("none", "nothing", 0, "no paper"))
    return AdversarialExamples(darken, (grey(*levels) * 0 + 200).byte(), x_adv, *kinds)


CLEAN = (grey(0.1, 0.2, 0.35, 0.44, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0), torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 1, 1]))


def chosen(accuracy_loss: float) -> Selection:
    return select(
        Brightness(),
        {10: brightening(0.1), 20: brightening(0.4)},
        (0.5, 1.0),
        CLEAN,
        [attacked(0.48, 0.42, 0.32, 0.25)],
        accuracy_loss,
        seed=0,
        device=CPU,
        progress=lambda stage, done, total: None,
    )


@pytest.mark.parametrize(
    ("accuracy_loss", "step", "strength", "corrected"),
    [(0.0, 10, 0.5, 0.25), (0.1, 10, 1.0, 0.5), (0.2, 20, 0.5, 0.75), (0.3, 20, 1.0, 1.0)],
)
def test_the_most_that_is_corrected_within_the_loss_is_chosen(accuracy_loss, step, strength, corrected):
    selection = chosen(accuracy_loss)
    assert selection.within
    assert selection.undefended_accuracy == 1.0
    assert (selection.chosen.step, selection.chosen.strength) == (step, strength)
    assert selection.chosen.corrected == pytest.approx(corrected)
    assert len(selection.tried) == 4


def test_where_nothing_is_within_the_loss_the_least_costly_is_chosen_and_said():
    selection = select(
        Brightness(),
        {20: brightening(0.4)},
        (0.5, 1.0),
        CLEAN,
        [attacked(0.48)],
        0.01,
        seed=0,
        device=CPU,
        progress=lambda stage, done, total: None,
    )
    assert not selection.within
    assert selection.chosen.strength == 0.5


def test_a_selection_survives_json():
    selection = chosen(0.1)
    assert Selection.from_json(selection.as_json()) == selection


def without_examples(*strengths: float) -> Selection:
    return select(
        Brightness(),
        {1: brightening(0.1)},
        strengths,
        CLEAN,
        [attacked(0.9)],
        0.1,
        seed=0,
        device=CPU,
        progress=lambda stage, done, total: None,
    )


def test_nothing_to_choose_by_is_refused():
    with pytest.raises(NothingToChooseBy, match="to choose the stopping point and the strength by; there are none"):
        without_examples(0.5, 1.0)


def test_the_only_candidate_needs_no_examples():
    selection = without_examples(1.0)
    assert (selection.chosen.step, selection.chosen.strength, selection.chosen.corrected) == (1, 1.0, None)
    assert selection.chosen.accuracy == 0.9
    assert selection.within
    assert Selection.from_json(selection.as_json()) == selection


def test_the_answers_are_counted_in_batches():
    images = torch.cat([CLEAN[0]] * 30)
    assert answers_of(Brightness(), images, CPU).tolist() == CLEAN[1].tolist() * 30
