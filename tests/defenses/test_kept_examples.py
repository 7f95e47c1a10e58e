"""Examples are kept piece by piece: a crafting that is killed goes on where it was, to the same examples to the bit."""

import multiprocessing
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from defenses.attacks import AdversarialExamples, attack, craft_once
from defenses.attacks.examples import NothingToAttack
from defenses.splits import LabelledImages
from defenses.stages import Stages

CPU = torch.device("cpu")
SHAPE = (1, 4, 4)
LIMIT = 20
WHOLE = "fit examples, pgd:steps=2"
FIELDS = ("x", "x_adv", "y", "rows", "fooled", "fooled_rounded")


class Brightness(nn.Module):
    """Answers 1 for images brighter than a half, else 0."""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((1, 2, 3))
        return torch.stack([0.5 - mean, mean - 0.5], 1)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch) -> None:
    """Pieces of 8 images, two batches of 4 each."""
    monkeypatch.setattr("defenses.attacks.kept.PIECE", 8)


@pytest.fixture(scope="module")
def part() -> LabelledImages:
    """50 images near the middle, of which the classifier gets about two in three right, but none from 16 to 31."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(100, 156, (50, *SHAPE), generator=generator).byte()
    targets = (images.float().mean((1, 2, 3)) > 127.5).long()
    wrong = torch.rand(50, generator=generator) < 1 / 3
    wrong[16:32] = True
    return LabelledImages(images, targets ^ wrong.long())


def quiet(told: str, done: int, total: int) -> None:
    pass


class Crafting:
    """Craft on a part in a folder, and count the images that the attack was run on."""

    def __init__(self, part: LabelledImages, limit: int = LIMIT, batch_size: int = 4) -> None:
        self.part, self.limit, self.batch_size = part, limit, batch_size
        self.attacked = 0

    def __call__(self, folder: Path, progress: Callable[[str, int, int], None] = quiet) -> AdversarialExamples:
        pgd = attack("pgd:steps=2")

        def run(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            self.attacked += len(x)
            return pgd.run(model, x, y)

        return craft_once(
            replace(pgd, run=run),
            Brightness().eval(),
            self.part,
            "fit",
            limit=self.limit,
            stages=Stages(folder),
            device=CPU,
            seed=3,
            batch_size=self.batch_size,
            progress=progress,
        )


def check_equal(found: AdversarialExamples, expected: AdversarialExamples) -> None:
    for field in FIELDS:
        assert torch.equal(getattr(found, field), getattr(expected, field)), field


class Cut(Exception):
    """What a kill is within one process."""


def cut_at(left: int, end: Callable[[], None]) -> Callable[[str, int, int], None]:
    """Return a progress that ends when it has been told of so many examples."""

    def progress(told: str, done: int, total: int) -> None:
        assert told == "pgd:steps=2 (fit)"
        assert total == LIMIT
        if done >= left:
            end()

    return progress


def cut() -> None:
    raise Cut


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("left", [1, 6, 10, 14, LIMIT])
def test_what_is_kept_is_not_crafted_again_and_the_rest_is_the_same(part, tmp_path, left):
    whole = Crafting(part)
    expected = whole(tmp_path / "whole")
    assert whole.attacked == len(expected.y) == LIMIT
    again = Crafting(part)
    with pytest.raises(Cut):
        again(tmp_path / "cut", cut_at(left, cut))
    stages = Stages(tmp_path / "cut")
    kept = sum(len(stages.load(name).tensors["y"]) for name in stages.names())
    assert left - 8 <= kept < left
    again.attacked = 0
    check_equal(again(tmp_path / "cut"), expected)
    assert again.attacked == LIMIT - kept
    assert stages.names() == [WHOLE]
    check_equal(again(tmp_path / "cut"), expected)
    assert again.attacked == LIMIT - kept, "nothing is crafted where the whole is kept"


def test_a_process_that_is_killed_leaves_whole_pieces(part, tmp_path):
    expected = Crafting(part)(tmp_path / "whole")
    process = multiprocessing.get_context("fork").Process(
        target=Crafting(part), args=(tmp_path / "killed", cut_at(16, kill))
    )
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    names = Stages(tmp_path / "killed").names()
    assert names == [f"{WHOLE}, piece {index}" for index in range(len(names))]
    assert len(names) >= 4
    told: list[int] = []
    again = Crafting(part)
    check_equal(again(tmp_path / "killed", lambda _, done, total: told.append(done)), expected)
    assert 0 < again.attacked <= LIMIT - 8
    assert told == sorted(told)
    assert told[-1] == LIMIT


def test_each_piece_has_a_seed_of_its_own(part, tmp_path):
    images = part.images[:1].expand(16, *SHAPE).contiguous()
    same = LabelledImages(images, Brightness()(images / 255).argmax(1))
    x_adv = Crafting(same)(tmp_path).x_adv
    assert not torch.equal(x_adv[:8], x_adv[8:]), "the attack begins at random"


@pytest.mark.parametrize("limit", [1, 5, 9, 16, 1000])
@pytest.mark.parametrize("batch_size", [3, 4, 20, 100])
def test_the_first_images_that_the_classifier_gets_right_are_attacked(part, tmp_path, limit, batch_size):
    found = Crafting(part, limit, batch_size)(tmp_path)
    right = (Brightness()(part.images / 255).argmax(1) == part.targets).nonzero().flatten()
    assert len(right) > 20
    assert torch.equal(found.rows, right[:limit])
    assert torch.equal(found.y, part.targets[found.rows])
    assert torch.equal(found.x, part.images[found.rows])
    assert torch.equal(found.fooled, Brightness()(found.x_adv).argmax(1) != found.y)
    assert found.x_adv.dtype == torch.float32
    assert Stages(tmp_path).names() == [WHOLE]
    assert Stages(tmp_path).seconds(WHOLE) > 0


def test_a_piece_that_is_damaged_is_crafted_again(part, tmp_path):
    expected = Crafting(part)(tmp_path / "whole")
    with pytest.raises(Cut):
        Crafting(part)(tmp_path / "cut", cut_at(LIMIT, cut))
    (damaged,) = (tmp_path / "cut").glob("*piece 0.safetensors")
    damaged.write_bytes(damaged.read_bytes()[:-3] + b"...")
    again = Crafting(part)
    check_equal(again(tmp_path / "cut"), expected)
    assert again.attacked < LIMIT


def test_pieces_that_a_kill_left_beside_the_whole_are_dropped(part, tmp_path):
    crafting = Crafting(part)
    expected = crafting(tmp_path)
    other = f"{WHOLE},epsilon=1, piece 0"
    for name in (f"{WHOLE}, piece 0", f"{WHOLE}, piece 11", other):
        Stages(tmp_path).save(name, {})
    check_equal(crafting(tmp_path), expected)
    assert set(Stages(tmp_path).names()) == {WHOLE, other}


def test_a_classifier_that_gets_nothing_right_is_refused(part, tmp_path):
    wrong = LabelledImages(part.images[16:32], part.targets[16:32])
    with pytest.raises(NothingToAttack, match="gets none of the 16 images right, so there is nothing to attack"):
        Crafting(wrong)(tmp_path)
