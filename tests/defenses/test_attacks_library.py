"""The attacks that libraries run: what they find, what they may change, what they cost, and what they leave alone."""

import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from defenses.attacks import ATTACKS, AdversarialExamples, attack, craft
from defenses.attacks.from_art import FROM_ART, ParameterUnsuitable
from defenses.attacks.from_autoattack import FROM_AUTOATTACK, ClassesTooFew
from defenses.attacks.from_foolbox import FROM_FOOLBOX

CPU = torch.device("cpu")

# What each must reach on the classifier of coloured digits, of the images that it is given; chance is none.
REACHED = {
    "bim:epsilon=40/255,step_size=8/255": 0.9,
    "mi-fgsm:epsilon=40/255,step_size=8/255": 0.9,
    "auna:epsilon=0.6": 0.5,
    "boundary:steps=60": 0.99,
    "pwa:steps=40": 0.99,
    "jsma": 0.9,
    "uap:epsilon=0.5,max_iter=2": 0.5,
    "one-pixel:pixels=3,max_iter=2": 0.5,
    "autoattack:epsilon=48/255": 0.99,
    "autoattack-rand:epsilon=48/255,samples=2": 0.9,
    "square:epsilon=48/255,queries=300": 0.9,
}
RANDOM = [text for text in REACHED if not text.startswith(("bim", "mi-fgsm"))]


@pytest.fixture(scope="module")
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Handwritten digits, each in a colour of its own, uint8 (300, 3, 8, 8), and their classes."""
    from sklearn.datasets import load_digits

    data = load_digits()
    colours = torch.rand(300, 3, 1, 1, generator=torch.Generator().manual_seed(0)) * 0.7 + 0.3
    images = torch.from_numpy(data.images[:300] * 255 / 16).float().unsqueeze(1) * colours
    return images.round().to(torch.uint8), torch.from_numpy(data.target)[:300].long()


@pytest.fixture(scope="module")
def network(digits) -> nn.Module:
    """A small convolutional classifier of those digits, trained for real; its parameters still ask for gradients."""
    images, targets = digits[0].float() / 255, digits[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = nn.Sequential(
            nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12 * 16, 10)
        )
        optimizer = torch.optim.Adam(layers.parameters(), lr=0.01)
        for _ in range(100):
            loss = nn.functional.cross_entropy(layers(images), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    layers.zero_grad()
    return layers.eval()


class Stubborn(nn.Module):
    """Answers with the first of some classes, whatever it sees, by logits that do depend on the image."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.classes = classes
        self.eval()

    def forward(self, x):
        weights = torch.linspace(-1, 1, x[0].numel() * self.classes).sin().reshape(-1, self.classes)
        return x.flatten(1) @ (weights / weights.abs().sum(0)) + 5 * torch.eye(self.classes)[0]


class Counted(nn.Module):
    """Answers as another model does, and counts the images that go through it, forward and backward."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.passes = 0
        self.eval()

    def forward(self, x):
        self.passes += len(x)
        if x.requires_grad:
            x = x.clone()
            x.register_hook(lambda gradient: self.count(len(gradient)))
        return self.model(x)

    def count(self, images: int) -> None:
        self.passes += images


class Noisy(nn.Module):
    """Answers as another model does, with noise on the logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.eval()

    def forward(self, x):
        logits = self.model(x)
        return logits + 2 * torch.randn_like(logits)


class Middling(nn.Module):
    """Answers 1 where the mean of the image is between 0.4 and 0.6, as that of noise is, else 0."""

    def __init__(self) -> None:
        super().__init__()
        self.eval()

    def forward(self, x):
        margin = 0.1 - (x.flatten(1).mean(1) - 0.5).abs()
        return torch.stack([-margin, margin], 1)


def crafted(text: str, model: nn.Module, images: torch.Tensor, targets: torch.Tensor, seed: int = 0):
    options = {"limit": 8, "device": CPU, "seed": seed, "progress": lambda done, total: None}
    return craft(attack(text), model, images, targets, **options)


@pytest.fixture(scope="module")
def examples(network, digits) -> dict[str, AdversarialExamples]:
    """What each attack makes of eight digits."""
    return {text: crafted(text, network, *digits) for text in REACHED}


def perturbations(examples: AdversarialExamples) -> torch.Tensor:
    return examples.x_adv - examples.x / 255


def ran(text: str, model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(0)
    return attack(text).run(model, x, y)


def test_every_attack_of_the_libraries_is_measured_here():
    elsewhere = {"fgsm", "pgd", "deepfool", "cw"}
    families = {attack(text).family for text in REACHED}
    assert families | elsewhere == {*FROM_ART, *FROM_AUTOATTACK, *FROM_FOOLBOX}
    assert families | elsewhere <= ATTACKS.keys()


@pytest.mark.parametrize("text", REACHED)
def test_it_fools_an_undefended_classifier_within_range(examples, text):
    found = examples[text]
    assert found.x_adv.shape == found.x.shape == (8, 3, 8, 8)
    assert found.x_adv.dtype == torch.float32
    assert 0 <= found.x_adv.min() <= found.x_adv.max() <= 1
    assert found.success_rate >= REACHED[text]


@pytest.mark.parametrize("text", [text for text in REACHED if attack(text).facts.norm == "linf"])
def test_it_stays_within_its_ball(examples, text):
    reach = perturbations(examples[text]).abs().amax()
    assert attack(text).epsilon is not None
    assert attack(text).epsilon / 2 < reach <= attack(text).epsilon + 1e-6


def test_one_pixel_changes_no_more_pixels_than_it_may_and_to_8_bit_colours(examples, network, digits):
    changed = (perturbations(examples["one-pixel:pixels=3,max_iter=2"]) != 0).any(1).flatten(1).sum(1)
    assert changed.max() == 3
    one = crafted("one-pixel:max_iter=2", network, *digits)
    assert set((perturbations(one) != 0).any(1).flatten(1).sum(1).tolist()) == {0, 1}
    assert torch.equal(one.fooled, (perturbations(one) != 0).flatten(1).any(1))
    torch.testing.assert_close(one.rounded / 255, one.x_adv, atol=1e-6, rtol=0)


def test_jsma_raises_values_to_the_top_and_no_more_of_them_than_its_share(examples, network, digits):
    raised = perturbations(examples["jsma"]) > 0
    assert torch.equal(raised, perturbations(examples["jsma"]) != 0)
    assert (examples["jsma"].x_adv[raised] == 1).all()
    few = perturbations(crafted("jsma:gamma=0.05", network, *digits)).flatten(1).ne(0).sum(1)
    assert 0 < few.max() <= 0.05 * 192 + 2
    assert few.max() < raised.flatten(1).sum(1).max()


def test_a_universal_perturbation_is_the_same_for_all_images(examples):
    found = examples["uap:epsilon=0.5,max_iter=2"]
    free = (found.x_adv > 0) & (found.x_adv < 1)
    change = perturbations(found)
    universal = change.where(free, torch.nan).nanmedian(0).values
    torch.testing.assert_close(change[free], universal.expand_as(change)[free], atol=1e-6, rtol=0)
    assert free.float().mean() > 0.3


def test_the_pointwise_attack_leaves_no_value_that_could_be_reset(examples, network):
    found = examples["pwa:steps=40"]
    x = found.x / 255
    for x_adv, clean, y in zip(found.x_adv, x, found.y, strict=True):
        places = (x_adv != clean).nonzero()
        assert 0 < len(places) < 60
        for place in places.tolist():
            reset = x_adv.clone()
            reset[tuple(place)] = clean[tuple(place)]
            assert network(reset.unsqueeze(0)).argmax() == y


def test_mi_fgsm_adds_up_gradients_of_norm_one(network, digits):
    x, y = digits[0][:6] / 255, digits[1][:6]
    expected, velocity = x.clone(), torch.zeros_like(x)
    for _ in range(4):
        expected.requires_grad_(True)
        (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(network(expected), y, reduction="sum"), expected)
        velocity = 0.5 * velocity + gradient / gradient.abs().sum((1, 2, 3), keepdim=True)
        step = expected.detach() + 0.02 * velocity.sign()
        expected = step.clamp(x - 0.05, x + 0.05).clamp(0, 1)
    x_adv = ran("mi-fgsm:epsilon=0.05,step_size=0.02,steps=4,momentum=0.5", network, x, y)
    torch.testing.assert_close(x_adv, expected, atol=1e-6, rtol=0)


def state() -> tuple:
    python, numpy = random.getstate(), np.random.get_state(legacy=False)
    return python, numpy["state"]["key"].tolist(), numpy["state"]["pos"], torch.get_rng_state().tolist()


@pytest.mark.parametrize("text", REACHED)
def test_a_seed_gives_the_same_examples_and_nothing_else_is_touched(network, digits, examples, text, capfd):
    weights = {name: value.clone() for name, value in network.state_dict().items()}
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    before = state()
    with torch.no_grad():
        again = crafted(text, network, *digits)
        assert not torch.is_grad_enabled()
    assert state() == before
    assert torch.equal(again.x_adv, examples[text].x_adv)
    assert all(torch.equal(value, weights[name]) for name, value in network.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in network.parameters())
    assert not network.training
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("text", RANDOM)
def test_another_seed_gives_other_examples(network, digits, examples, text):
    assert not torch.equal(crafted(text, network, *digits, seed=1).x_adv, examples[text].x_adv)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("bim:steps=2", "bim:steps=3"),
        ("bim:steps=2,step_size=2/255", "bim:steps=2,step_size=3/255"),
        ("mi-fgsm:steps=2", "mi-fgsm:steps=3"),
        ("mi-fgsm:momentum=0.1", "mi-fgsm:momentum=3"),
        ("mi-fgsm:steps=2,step_size=2/255", "mi-fgsm:steps=2,step_size=3/255"),
        ("auna:epsilon=0.6,repeats=1", "auna:epsilon=0.6,repeats=50"),
        ("boundary:steps=5", "boundary:steps=20"),
        ("pwa:steps=5", "pwa:steps=20"),
        ("jsma:theta=1", "jsma:theta=0.5"),
        ("jsma:gamma=0.02", "jsma:gamma=0.2"),
        ("uap:epsilon=0.3,max_iter=1,delta=0", "uap:epsilon=0.3,max_iter=2,delta=0"),
        ("uap:epsilon=0.3,max_iter=2,delta=0", "uap:epsilon=0.3,max_iter=2,delta=0.99"),
        ("uap:epsilon=0.3,max_iter=1,overshoot=0.02", "uap:epsilon=0.3,max_iter=1,overshoot=0.5"),
        ("one-pixel:max_iter=1", "one-pixel:max_iter=5"),
        ("one-pixel:max_iter=1", "one-pixel:pixels=2,max_iter=1"),
        ("autoattack-rand:epsilon=0.05,samples=1", "autoattack-rand:epsilon=0.05,samples=2"),
        ("square:epsilon=0.2,queries=2", "square:epsilon=0.2,queries=60"),
    ],
)
def test_a_parameter_reaches_the_library(network, digits, one, other):
    model = Noisy(network) if "samples" in one else network
    x, y = digits[0][:5] / 255, digits[1][:5]
    assert not torch.equal(ran(one, model, x, y), ran(other, model, x, y))


@pytest.mark.parametrize("text", ["fgsm", "bim", "mi-fgsm", "pgd", "pgd-stop", "deepfool", "auna", "one-pixel"])
def test_it_asks_the_model_as_often_as_its_facts_say_where_nothing_helps(text):
    model = Counted(Stubborn())
    attack(text).run(model, torch.rand(1, 3, 8, 8), torch.zeros(1).long())
    assert model.passes == attack(text).facts.passes


# What the default parameters ask beyond those given, of an image of 3x8x8: 9 samples more forward and backward for two
# losses at 101 points each; two rounds more of DeepFool and what is asked about it; and 1,440 steps more of JSMA.
@pytest.mark.parametrize(
    ("text", "beyond"),
    [
        ("autoattack-rand:samples=11", 9 * 2 * 101 * 2),
        ("square:queries=500", 4500),
        ("uap:max_iter=3", 2 * 135),
        ("jsma", (3072 - 192) // 2 * 3),
    ],
)
def test_what_it_asks_grows_to_what_its_facts_say(text, beyond):
    model = Counted(Stubborn())
    attack(text).run(model, torch.rand(1, 3, 8, 8), torch.zeros(1).long())
    assert 0 <= attack(text).facts.passes - beyond - model.passes <= attack(text).facts.passes // 100


def test_standard_autoattack_asks_as_often_as_its_facts_say_where_nothing_helps(monkeypatch):
    from pyautoattack.square import SquareAttack

    monkeypatch.setattr(SquareAttack, "attack_single_run", lambda self, x, y: (None, x))  # that part asks 5,001 times
    model = Counted(Stubborn())
    attack("autoattack").run(model, torch.rand(1, 3, 8, 8), torch.zeros(1).long())
    assert model.passes + 5001 == attack("autoattack").facts.passes


def test_the_boundary_attack_asks_no_more_than_its_facts_say(network, digits):
    model = Counted(network)
    attack("boundary:steps=500").run(model, digits[0][:1] / 255, digits[1][:1])
    assert 550 < model.passes <= attack("boundary").facts.passes - 4500 * 1.1


@pytest.mark.parametrize(
    "text",
    [
        "auna",
        "boundary:steps=5",
        "pwa:steps=5",
        "one-pixel:max_iter=1",
        "autoattack-rand:samples=1",
        "square:queries=9",
    ],
)
def test_where_nothing_is_found_the_image_comes_back_unchanged(digits, text):
    x = digits[0][:3] / 255
    assert torch.equal(ran(text, Stubborn(), x, torch.zeros(3).long()), x)


def test_the_boundary_attack_starts_at_another_image_where_all_noise_is_of_its_class():
    x = torch.tensor([0.5, 0.2]).reshape(-1, 1, 1, 1).expand(-1, 3, 16, 16)
    together = ran("boundary:steps=300", Middling(), x, torch.tensor([1, 0]))
    assert Middling()(together).argmax(1).tolist() == [0, 1]
    assert (together[0] - x[0]).norm() < 0.6 * (x[1] - x[0]).norm()
    assert torch.equal(ran("boundary:steps=300", Middling(), x[:1], torch.tensor([1])), x[:1])


@pytest.mark.parametrize("text", ["boundary:steps=20", "pwa:steps=20"])
def test_noise_in_the_model_does_not_end_an_attack(network, digits, text):
    x, y = digits[0][:8] / 255, digits[1][:8]
    with pytest.raises((ValueError, AssertionError)):
        library_run(text, Noisy(network), x, y)
    x_adv = ran(text, Noisy(network), x, y)
    assert x_adv.isfinite().all()
    assert (x_adv != x).flatten(1).any(1).sum() > 4


def library_run(text: str, model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
    """Run the library's attack as it comes."""
    from foolbox.attacks import BoundaryAttack, PointwiseAttack
    from foolbox.models.pytorch import PyTorchModel

    torch.manual_seed(0)
    known = BoundaryAttack(steps=1) if text.startswith("boundary") else PointwiseAttack(l2_binary_search=False)
    known.run(PyTorchModel(model, bounds=(0, 1), device=CPU), x, y)


@pytest.mark.parametrize("text", ["autoattack:epsilon=0.01", "autoattack-rand:epsilon=0.01,samples=1"])
def test_autoattack_takes_a_classifier_of_fewer_classes_and_refuses_one_of_two(text, monkeypatch):
    from pyautoattack.square import SquareAttack

    monkeypatch.setattr(SquareAttack, "attack_single_run", lambda self, x, y: (None, x))  # it compares no classes
    x, y = torch.rand(1, 1, 4, 4), torch.zeros(1).long()
    assert torch.equal(ran(text, Stubborn(4), x, y), x)
    with pytest.raises(ClassesTooFew, match="got one of 2"):
        ran(text, Stubborn(2), x, y)


@pytest.mark.parametrize(
    "text", ["jsma", "one-pixel:max_iter=2", "uap:epsilon=0.5", "square:epsilon=0.5", "boundary:steps=50"]
)
def test_two_classes_will_do_for_the_others(text):
    x = torch.tensor([0.5, 0.58]).reshape(-1, 1, 1, 1).expand(-1, 3, 4, 4).clone()
    y = torch.tensor([1, 1])
    x_adv = ran(text, Middling(), x, y)
    assert Middling()(x_adv).argmax(1).tolist()[1] == 0


def test_autoattack_gives_a_debugger_its_trace_back():
    def trace(frame, event, argument):
        return None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        ran("autoattack-rand:samples=1", Stubborn(3), torch.rand(1, 1, 2, 2), torch.ones(1).long())
        assert sys.gettrace() is trace
    finally:
        sys.settrace(before)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("jsma:theta=0", "Expected theta above 0, got 0"),
        ("jsma:gamma=1.5", "Expected gamma above 0 and at most 1, got 1.5"),
        ("uap:delta=1", "Expected delta below 1, got 1"),
        ("uap:epsilon=0", "Expected epsilon above 0, got 0"),
    ],
)
def test_a_parameter_that_an_attack_cannot_be_run_with_is_refused(text, told):
    with pytest.raises(ParameterUnsuitable, match=told):
        attack(text)


WITHOUT = """
import sys

for name in ("art", "pyautoattack"):
    sys.modules[name] = None
import torch
from defenses.attacks import attack

assert "foolbox" not in sys.modules
model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3)).eval()
for text in ("fgsm", "bim", "auna:repeats=2"):
    attack(text).run(model, torch.rand(2, 1, 2, 2), torch.tensor([0, 1]))
try:
    attack("jsma").run(model, torch.rand(2, 1, 2, 2), torch.tensor([0, 1]))
except ModuleNotFoundError as error:
    print(error)
"""


def test_attacks_are_imported_late_and_do_without_the_other_libraries():
    answer = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=True, timeout=120)
    assert "art" in answer.stdout
