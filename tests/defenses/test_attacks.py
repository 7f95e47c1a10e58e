import pytest
import torch
from torch import nn

from defenses.attacks import AttackUnknown, attack, craft
from defenses.attacks.stopped_pgd import stopped_pgd

CPU = torch.device("cpu")


class Brightness(nn.Module):
    """Answers 1 where the mean of the image is above a level, else 0; the logits are linear in the image."""

    def __init__(self, level: float = 0.5) -> None:
        super().__init__()
        self.level = level
        self.eval()

    def forward(self, x):
        margin = 10 * (x.flatten(1).mean(1) - self.level)
        return torch.stack([-margin, margin], 1)


def greys(*values: float) -> torch.Tensor:
    return torch.tensor(values).reshape(-1, 1, 1, 1).expand(-1, 1, 4, 4).clone()


def test_fgsm_moves_every_pixel_by_epsilon_against_the_true_class():
    x_adv = attack("fgsm:epsilon=8/255").run(Brightness(), greys(0.51, 0.49), torch.tensor([1, 0]))
    torch.testing.assert_close(x_adv, greys(0.51 - 8 / 255, 0.49 + 8 / 255))


def test_stopped_pgd_stops_each_image_at_its_first_success():
    x = greys(0.51, 0.53, 0.40)
    x_adv = stopped_pgd(Brightness(), x, torch.tensor([1, 1, 1]), step_size=0.02, steps=50)
    # 0.51 needs one step, 0.53 two, and 0.40 is misclassified from the start
    torch.testing.assert_close(x_adv, greys(0.49, 0.49, 0.40))


def test_stopped_pgd_gives_up_after_its_steps_and_stays_in_range():
    x_adv = stopped_pgd(Brightness(), greys(0.9), torch.tensor([1]), step_size=0.01, steps=5)
    torch.testing.assert_close(x_adv, greys(0.85))
    low = stopped_pgd(Brightness(), greys(0.02), torch.tensor([0]), step_size=0.3, steps=9)
    assert low.min() >= 0
    assert low.max() <= 1


def test_stopped_pgd_keeps_8_bit_images_on_their_grid():
    x = torch.randint(100, 160, (8, 1, 4, 4)).float() / 255
    x_adv = stopped_pgd(Brightness(), x, Brightness()(x).argmax(1), step_size=1 / 255, steps=9)
    torch.testing.assert_close((x_adv * 255).round() / 255, x_adv, atol=1e-6, rtol=0)
    assert not torch.equal(x, x_adv)


def test_pgd_stays_within_its_ball():
    x = torch.rand(4, 1, 4, 4)
    x_adv = attack("pgd:epsilon=0.05").run(Brightness(), x, torch.tensor([0, 1, 0, 1]))
    assert (x_adv - x).abs().max() <= 0.05 + 1e-6


def test_crafted_examples_count_success_after_rounding_to_8_bits():
    images = torch.tensor([128, 140, 120, 250]).reshape(-1, 1, 1, 1).expand(-1, 1, 4, 4).to(torch.uint8)
    examples = craft(
        attack("fgsm:epsilon=5/255"),
        Brightness(),
        images,
        torch.tensor([1, 1, 1, 1]),
        limit=10,
        device=CPU,
        seed=0,
        progress=lambda done, total: None,
    )
    assert len(examples.y) == 3  # 120 is misclassified without any attack
    assert examples.fooled.tolist() == [True, False, False]
    assert examples.success_rate == pytest.approx(1 / 3)
    assert examples.distortion == pytest.approx(5 / 255 * 4, rel=1e-5)
    torch.testing.assert_close(examples.x_adv * 255, (examples.x_adv * 255).round())


def test_an_example_that_rounding_undoes_does_not_count():
    images = torch.full((1, 1, 4, 4), 128, dtype=torch.uint8)
    examples = craft(
        attack("fgsm:epsilon=4/2550"),
        Brightness(127.65 / 255),
        images,
        torch.tensor([1]),
        limit=1,
        device=CPU,
        seed=0,
        progress=lambda done, total: None,
    )
    assert examples.fooled_unrounded.tolist() == [True]
    assert examples.fooled.tolist() == [False]


def test_a_classifier_that_gets_nothing_right_cannot_be_attacked():
    images = torch.zeros(5, 1, 4, 4, dtype=torch.uint8)
    with pytest.raises(ValueError, match="none of the 5 images right"):
        craft(
            attack("fgsm"),
            Brightness(),
            images,
            torch.ones(5).long(),
            limit=5,
            device=CPU,
            seed=0,
            progress=lambda done, total: None,
        )


@pytest.mark.parametrize("text", ["fgms", "fgsm:steps=3", "fgsm:epsilon=wide", "fgsm:epsilon=1/0"])
def test_an_attack_that_cannot_be_read_is_refused_with_what_there_is(text):
    with pytest.raises(AttackUnknown, match="fgsm:epsilon=8/255, got"):
        attack(text)
