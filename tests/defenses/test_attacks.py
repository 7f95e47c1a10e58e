import pytest
import torch
from torch import nn

from defenses.attacks import AdversarialExamples, AttackUnknown, attack, craft
from defenses.attacks.stopped_pgd import stopped_pgd

CPU = torch.device("cpu")
WRONG_NUMBERS = ("fgsm:epsilon=-1/255", "pgd-stop:steps=0", "cw:searches=2.5", "deepfool:epsilon=8/255")


class Brightness(nn.Module):
    """Answers 1 where the mean of the image is above a level, else 0; the logits are linear in the image."""

    def __init__(self, level: float = 0.5) -> None:
        super().__init__()
        self.level = level
        self.eval()

    def forward(self, x):
        margin = 10 * (x.flatten(1).mean(1) - self.level)
        return torch.stack([-margin, margin], 1)


class Curved(Brightness):
    """Answers as Brightness does, with logits that flatten out, so that one linear step falls short."""

    def forward(self, x):
        return super().forward(x).tanh()


@pytest.fixture(scope="module")
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """120 handwritten digits, uint8 (120, 1, 8, 8), and their classes."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(data.images * 255 / 16).round().to(torch.uint8).unsqueeze(1)
    return images[:120], torch.from_numpy(data.target)[:120].long()


@pytest.fixture(scope="module")
def network(digits) -> nn.Module:
    """A small convolutional classifier of those digits, trained for real."""
    images, targets = digits[0].float() / 255, digits[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8 * 16, 10)
        )
        optimizer = torch.optim.Adam(layers.parameters(), lr=0.01)
        for _ in range(120):
            loss = nn.functional.cross_entropy(layers(images), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return layers.eval()


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


def crafted(text: str, model: nn.Module, images: torch.Tensor, targets: torch.Tensor, **options) -> AdversarialExamples:
    quiet = {"limit": len(images), "device": CPU, "seed": 0, "progress": lambda done, total: None}
    return craft(attack(text), model, images, targets, **{**quiet, **options})


def test_crafted_examples_count_success_as_crafted_and_rounded():
    images = torch.tensor([128, 140, 120, 250]).reshape(-1, 1, 1, 1).expand(-1, 1, 4, 4).to(torch.uint8)
    examples = crafted("fgsm:epsilon=5/255", Brightness(), images, torch.tensor([1, 1, 1, 1]))
    assert examples.rows.tolist() == [0, 1, 3]  # 120 is misclassified without any attack
    assert torch.equal(examples.x, images[[0, 1, 3]])
    assert examples.fooled.tolist() == examples.fooled_rounded.tolist() == [True, False, False]
    assert examples.success_rate == examples.success_rate_rounded == pytest.approx(1 / 3)
    assert examples.distortion == pytest.approx(5 / 255 * 4, rel=1e-5)
    assert examples.distortion_rounded == pytest.approx(5 / 255 * 4, rel=1e-5)
    assert torch.equal(examples.rounded, images[[0, 1, 3]] - 5)


def test_an_example_that_rounding_undoes_counts_only_as_crafted():
    images = torch.full((1, 1, 4, 4), 128, dtype=torch.uint8)
    examples = crafted("fgsm:epsilon=4/2550", Brightness(127.65 / 255), images, torch.tensor([1]))
    assert examples.fooled.tolist() == [True]
    assert examples.fooled_rounded.tolist() == [False]
    assert examples.distortion == pytest.approx(4 * 0.4 / 255, rel=1e-3)
    assert examples.distortion_rounded is None
    assert torch.equal(examples.rounded, images)


@pytest.mark.parametrize("text", ["fgsm:epsilon=40/255", "pgd-stop"])
def test_steps_of_whole_grey_levels_come_to_the_same_rounded_or_not(network, digits, text):
    examples = crafted(text, network, *digits)
    torch.testing.assert_close(examples.rounded / 255, examples.x_adv, atol=1e-6, rtol=0)
    assert torch.equal(examples.fooled, examples.fooled_rounded)
    assert examples.fooled.any()
    assert examples.distortion == pytest.approx(examples.distortion_rounded, rel=1e-4)


@pytest.mark.parametrize("text", ["deepfool", "cw:searches=4,steps=80,step_size=0.05,initial_const=1"])
def test_attacks_of_least_distance_stay_nearer_than_a_step_and_lose_by_rounding(network, digits, text):
    images, targets = digits[0][:40], digits[1][:40]
    least, step = crafted(text, network, images, targets), crafted("fgsm:epsilon=40/255", network, images, targets)
    assert least.success_rate > 0.9
    assert least.success_rate_rounded < least.success_rate
    both = least.fooled & step.fooled
    assert both.sum() > 5
    reach = [(each.x_adv - each.x / 255)[both].flatten(1).norm(dim=1) for each in (least, step)]
    assert (reach[0] < reach[1]).all()
    assert 0 <= least.x_adv.min() <= least.x_adv.max() <= 1
    with torch.no_grad():
        assert torch.equal(network(least.x_adv).argmax(1) != least.y, least.fooled)
        assert torch.equal(network(least.rounded / 255).argmax(1) != least.y, least.fooled_rounded)


@pytest.mark.parametrize("text", ["deepfool:steps=1,overshoot=0", "cw:confidence=50,searches=2,steps=5"])
def test_where_nothing_is_found_the_image_comes_back_unchanged(text):
    # A black image, which is what the library then gives for C&W, would be misclassified.
    x = greys(0.9, 0.7)
    assert torch.equal(attack(text).run(Curved(), x, torch.tensor([1, 1])), x)
    assert Curved()(torch.zeros_like(x)).argmax(1).tolist() == [0, 0]


def test_confidence_leaves_the_boundary_further_behind(network, digits):
    images, targets = digits[0][:16], digits[1][:16]
    options = "searches=3,steps=80,step_size=0.05,initial_const=1"
    plain = crafted(f"cw:{options}", network, images, targets)
    sure = crafted(f"cw:confidence=5,{options}", network, images, targets)
    assert sure.fooled.sum() > 8
    assert sure.distortion > plain.distortion
    assert sure.success_rate_rounded > plain.success_rate_rounded


@pytest.mark.parametrize("text", ["fgsm:epsilon=40/255", "pgd-stop", "deepfool"])
def test_examples_do_not_depend_on_how_the_images_are_batched(network, digits, text):
    together = crafted(text, network, *digits, limit=50, batch_size=64)
    apart = crafted(text, network, *digits, limit=50, batch_size=7)
    assert torch.equal(together.rows, apart.rows)
    assert len(together.rows) == 50
    torch.testing.assert_close(together.x_adv, apart.x_adv, atol=1e-5, rtol=0)
    assert torch.equal(together.fooled, apart.fooled)


def test_a_classifier_that_gets_nothing_right_cannot_be_attacked():
    images = torch.zeros(5, 1, 4, 4, dtype=torch.uint8)
    with pytest.raises(ValueError, match="none of the 5 images right"):
        crafted("fgsm", Brightness(), images, torch.ones(5).long())


@pytest.mark.parametrize("text", ["fgms", "fgsm:steps=3", "fgsm:epsilon=wide", "fgsm:epsilon=1/0", *WRONG_NUMBERS])
def test_an_attack_that_cannot_be_read_is_refused_with_what_there_is(text):
    with pytest.raises(AttackUnknown, match="fgsm:epsilon=8/255, got"):
        attack(text)
