"""Fast adversarial training on digits: what it gains, that it goes on where it was cut off, and what it is made of."""

import copy
import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from defenses.attacks import attack, craft
from defenses.baselines import adversarial_training
from defenses.baselines.adversarial_outcome import Epoch, TrainingDiverged, has_collapsed
from defenses.baselines.adversarial_plan import AdversarialPlan, ImagesTooFew
from defenses.baselines.adversarial_step import Normalised, augmented, perturbed, triangle
from defenses.baselines.adversarial_training import PACE, TEST, TRAINING, precision_on, train_adversarially
from defenses.splits import LabelledImages, Splits
from defenses.stages import Stages

CPU = torch.device("cpu")
EPSILON = 0.1
PLAN = AdversarialPlan(
    epochs=4, epsilon=EPSILON, batch_size=64, learning_rate=0.1, flip=False, validation_examples=60, test_examples=100
)
MEAN, STD = (0.3,), (0.4,)


class Cut(Exception):
    """What a kill is in a test of one process: nothing after it is done."""


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Add up in the same order every time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def splits() -> Splits:
    """Handwritten digits of 16x16 pixels."""
    digits = load_digits()
    small = torch.from_numpy(digits.images / 16).float()[:, None]
    images = (F.interpolate(small, scale_factor=2, mode="bilinear").clamp(0, 1) * 255).round().to(torch.uint8)
    targets = torch.from_numpy(digits.target).long()
    parts = zip(images.split([1200, 200, 200, 197]), targets.split([1200, 200, 200, 197]), strict=True)
    return Splits(*(LabelledImages(*part) for part in parts))


def network() -> nn.Module:
    """A small network with batch norm, its weights always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        widths = itertools.pairwise((1, 16, 32))
        blocks = [(nn.Conv2d(a, b, 3, 2, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU()) for a, b in widths]
        head = (nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 10))
        return Normalised(nn.Sequential(*itertools.chain(*blocks), *head), MEAN, STD)


def train(model: nn.Module, splits: Splits, plan: AdversarialPlan, folder, progress=lambda *told: None):
    return train_adversarially(model, splits, plan, stages=Stages(folder), device=CPU, progress=progress)


def cut_at(step: int):
    """A progress that ends the training, in whatever epoch it is, with a step."""

    def progress(stage: str, done: int, total: int) -> None:
        if (stage, done) == (TRAINING, step):
            raise Cut

    return progress


@pytest.fixture(scope="module")
def robust(splits, tmp_path_factory) -> SimpleNamespace:
    """A network that was trained undisturbed, and what became of it."""
    model = network()
    return SimpleNamespace(model=model, outcome=train(model, splits, PLAN, tmp_path_factory.mktemp("undisturbed")))


def check_equal(one: nn.Module, other: nn.Module) -> None:
    for (name, value), found in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        # Not to the bit: the order of a sum may depend on where memory lies.
        torch.testing.assert_close(found, value, atol=1e-3, rtol=1e-3, msg=name)


def robust_accuracy(model: nn.Module, test: LabelledImages) -> float:
    """The share of the first hundred test images that is answered rightly under PGD of more steps than in training."""
    pgd = attack(f"pgd:epsilon={EPSILON},step_size=0.02,steps=20")
    count = {"limit": 100, "device": CPU, "seed": 1, "progress": lambda done, total: None}
    examples = craft(pgd, model, test.images[:100], test.targets[:100], **count)
    return int((~examples.fooled).sum()) / 100


def test_it_is_more_accurate_under_pgd_than_plain_training(splits, robust):
    plain = network().train()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(0)
    for _ in range(PLAN.epochs):
        for rows in torch.randperm(1200, generator=generator).split(64):
            loss = F.cross_entropy(plain(splits.fit.images[rows] / 255), splits.fit.targets[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        plainly = plain.eval()(splits.test.images / 255).argmax(1) == splits.test.targets
    assert plainly.float().mean() > 0.85
    undefended, defended = robust_accuracy(plain, splits.test), robust_accuracy(robust.model, splits.test)
    assert undefended < 0.1
    assert defended > 0.25
    assert robust.outcome.robust_accuracy == pytest.approx(defended, abs=0.1)


def test_what_became_of_it_is_told_of_every_epoch_and_of_the_test_images(splits, robust):
    outcome = robust.outcome
    assert [each.number for each in outcome.epochs] == [1, 2, 3, 4]
    assert (outcome.planned, outcome.kept, outcome.collapsed, outcome.attacked) == (4, 4, None, 100)
    assert outcome.epochs[-1].loss < outcome.epochs[0].loss
    assert outcome.epochs[-1].robust_accuracy > outcome.epochs[0].robust_accuracy
    assert all(each.robust_accuracy <= each.clean_accuracy for each in outcome.epochs)
    assert outcome.precision == precision_on(CPU)
    assert outcome.seconds.keys() == {TRAINING, TEST}
    assert not robust.model.training
    with torch.no_grad():
        right = robust.model(splits.test.images / 255).argmax(1) == splits.test.targets
    assert right.float().mean().item() == pytest.approx(outcome.clean_accuracy)
    assert all(value.is_contiguous() for value in robust.model.state_dict().values())


def test_a_training_that_is_cut_off_goes_on_to_the_same_weights(splits, robust, tmp_path):
    steps = 1200 // PLAN.batch_size
    for step in (steps + 3, 2 * steps + 1):
        with pytest.raises(Cut):
            train(network(), splits, PLAN, tmp_path, cut_at(step))
    assert len(Stages(tmp_path).load(TRAINING).values["epochs"]) == 2
    model, seen = network(), []
    before = torch.get_rng_state()
    outcome = train(model, splits, PLAN, tmp_path, lambda *told: seen.append(told))
    assert torch.equal(torch.get_rng_state(), before), "the global random state is left as it was"
    assert min(done for stage, done, _ in seen if stage == TRAINING) == 2 * steps + 1
    check_equal(robust.model, model)
    assert [each.number for each in outcome.epochs] == [1, 2, 3, 4]
    assert outcome.clean_accuracy == pytest.approx(robust.outcome.clean_accuracy, abs=0.02)


def test_another_seed_gives_other_weights(splits, tmp_path):
    short = AdversarialPlan(epochs=1, epsilon=EPSILON, batch_size=400, learning_rate=0.1, validation_examples=50)
    models = [network(), network(), network()]
    for seed, model in zip((0, 1, 2**40), models, strict=True):
        train(model, splits, replace(short, seed=seed), tmp_path / str(seed))
    heads = [model.state_dict()["network.8.weight"] for model in models]
    assert all((one - other).abs().max() > 1e-3 for one, other in itertools.combinations(heads, 2))


def test_after_a_collapse_the_weights_are_those_of_the_epoch_before(splits, tmp_path, monkeypatch):
    told = iter([0.4, 0.5, 0.1])
    monkeypatch.setattr(
        adversarial_training._Training,
        "robust_accuracy",
        lambda self, split, stage="validation": 0.3 if stage == TEST else next(told),
    )
    steps = 1200 // PLAN.batch_size
    with pytest.raises(Cut):
        train(network(), splits, PLAN, tmp_path, cut_at(2 * steps + 1))
    second = copy.deepcopy(Stages(tmp_path).load(TRAINING).tensors)
    model = network()
    outcome = train(model, splits, PLAN, tmp_path)
    assert (outcome.collapsed, outcome.kept, outcome.planned) == (3, 2, 4)
    assert [each.robust_accuracy for each in outcome.epochs] == [0.4, 0.5, 0.1]
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, second[f"model.{name}"], atol=0, rtol=0)
    again = network()
    assert train(again, splits, PLAN, tmp_path).collapsed == 3, "what is kept says so too"
    check_equal(model, again)


@pytest.mark.parametrize(
    ("accuracies", "collapsed"),
    [
        ([(0.1, 0.0)], False),
        ([(0.3, 0.2), (0.4, 0.35)], False),
        ([(0.5, 0.5), (0.5, 0.31)], False),
        ([(0.5, 0.5), (0.5, 0.29)], True),
        ([(0.5, 0.5), (0.6, 0.4), (0.9, 0.25)], True),
        ([(0.3, 0.2), (0.7, 0.09)], True),
        ([(0.3, 0.2), (0.1, 0.09)], False),
        ([(0.1, 0.0), (0.1, 0.0)], False),
    ],
)
def test_a_collapse_is_a_fall_that_its_own_examples_do_not_share(accuracies, collapsed):
    epochs = [Epoch(at + 1, 1.0, own, 0.9, under_pgd) for at, (own, under_pgd) in enumerate(accuracies)]
    assert has_collapsed(epochs) is collapsed


def test_minutes_are_settled_to_epochs_once_and_leave_no_trace(splits, tmp_path):
    timed, counted = network(), network()
    few = {"epsilon": EPSILON, "batch_size": 300, "validation_examples": 50, "test_examples": 20}
    outcome = train(timed, splits, AdversarialPlan(minutes=1e-6, **few), tmp_path / "timed")
    assert (outcome.planned, Stages(tmp_path / "timed").load(PACE).values) == (1, {"epochs": 1})
    train(counted, splits, AdversarialPlan(epochs=1, **few), tmp_path / "counted")
    check_equal(counted, timed)
    Stages(tmp_path / "kept").save(PACE, {}, {"epochs": 2})
    assert train(network(), splits, AdversarialPlan(minutes=1e-6, **few), tmp_path / "kept").planned == 2


def test_an_example_is_the_one_that_the_gradient_asks_for():
    weight = torch.tensor([[1.0, -1.0, 1.0, -1.0], [-1.0, 1.0, -1.0, 1.0]])
    x = torch.tensor([0.5, 0.5, 0.95, 0.02]).reshape(1, 1, 2, 2)

    def logits(image):
        return image.flatten(1) @ weight.T

    torch.manual_seed(0)
    found = perturbed(logits, x, torch.tensor([0]), epsilon=0.1, step_size=0.2)
    # A step of twice epsilon ends on the boundary wherever it began: of the ball, or of [0, 1].
    torch.testing.assert_close(found.flatten(), torch.tensor([0.4, 0.6, 0.85, 0.12]))
    up = perturbed(logits, x, torch.tensor([1]), epsilon=0.1, step_size=0.2)
    torch.testing.assert_close(up.flatten(), torch.tensor([0.6, 0.4, 1.0, 0.0]))
    starts = {float(perturbed(logits, x, torch.tensor([0]), epsilon=0.1, step_size=0.01)[0, 0, 0, 0]) for _ in range(9)}
    assert len(starts) == 9, "a small step shows where it began"
    assert all(0.4 <= value <= 0.6 for value in starts)


def test_images_are_shifted_and_mirrored_and_no_more():
    torch.manual_seed(0)
    images = torch.randint(1, 256, (60, 3, 8, 16), dtype=torch.uint8)
    padded = F.pad(images, (2, 2, 1, 1))
    for flip in (False, True):
        seen = set()
        for found, wide in zip(augmented(images, flip=flip), padded, strict=True):
            cut = {
                (down, right, mirrored): crop.flip(2) if mirrored else crop
                for down, right in itertools.product(range(3), range(5))
                for mirrored in (False, True)
                for crop in (wide[:, down : down + 8, right : right + 16],)
            }
            (which,) = [key for key, value in cut.items() if torch.equal(value, found)]
            seen.add(which)
        assert {mirrored for _, _, mirrored in seen} == ({False, True} if flip else {False})
        assert {down for down, _, _ in seen} == {0, 1, 2}
        assert {right for _, right, _ in seen} == {0, 1, 2, 3, 4}
    assert augmented(images, flip=True).is_contiguous(memory_format=torch.channels_last)


def test_the_learning_rate_rises_to_the_middle_and_falls_to_the_end():
    rates = [triangle(step, 9) for step in range(9)]
    assert rates == pytest.approx([1 / 9, 3 / 9, 5 / 9, 7 / 9, 1, 7 / 9, 5 / 9, 3 / 9, 1 / 9])


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"epsilon": 0.0}, "Expected epsilon above 0 and below 1, got 0"),
        ({"epsilon": 8.0}, "Expected epsilon above 0 and below 1, got 8"),
        ({"epsilon": 0.1, "alpha": 0.3}, "alpha above 0 and at most twice epsilon, 0.2, got 0.3"),
        ({"epochs": 0}, "Expected epochs of 1 or more, got 0"),
        ({"minutes": 0.0}, "Expected minutes above 0 and finite, got 0"),
        ({"learning_rate": float("nan")}, "Expected learning_rate above 0 and finite, got nan"),
        ({"batch_size": 1}, "Expected batch_size of 2 or more, got 1"),
        ({"seed": -1}, "Expected seed of 0 or more, got -1"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(given, sentence):
    with pytest.raises(ValueError, match=sentence):
        AdversarialPlan(**given)


def test_too_few_images_are_refused_before_anything_is_kept(splits, tmp_path):
    few = LabelledImages(*(column[:49] for column in splits.validation))
    with pytest.raises(ImagesTooFew, match="at least 50 images to validate on, got 49"):
        train(network(), splits._replace(validation=few), PLAN, tmp_path)
    with pytest.raises(ImagesTooFew, match="images to fit on, as many as are in a batch, got 49") as caught:
        train(network(), splits._replace(fit=few), PLAN, tmp_path)
    assert (caught.value.expected, caught.value.found) == (64, 49)
    assert Stages(tmp_path).names() == []


def test_a_training_that_diverges_says_so_and_keeps_nothing_of_that_epoch(splits, tmp_path):
    plan = AdversarialPlan(epochs=2, learning_rate=1e30, batch_size=200, validation_examples=50)
    with pytest.raises(TrainingDiverged, match="got none in epoch 1 at a highest learning rate of 1e\\+30") as caught:
        train(network(), splits, plan, tmp_path)
    assert (caught.value.epoch, caught.value.learning_rate) == (1, 1e30)
    assert Stages(tmp_path).names() == []
