"""A fit that was cut off anywhere, and goes on from the stages that it kept, gives the same defense to the bit."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defenses.classifier import Classifier
from defenses.coophance import (
    FitPlan,
    Fitted,
    InspectorPlan,
    RegulatorPlan,
    fit_coophance,
)
from defenses.onnx_import import canonicalise
from defenses.onnx_trace import export_classifier
from defenses.splits import LabelledImages, Splits
from defenses.stages import Stages

pytestmark = pytest.mark.long

SHAPE = (1, 16, 16)
CLASSES = 4
MOMENTS = 4
"""At how many moments, evenly spread over what a fit tells of its progress, it is cut off."""


class Cut(Exception):
    """What a kill is within one process."""


def labelled(count: int, seed: int) -> LabelledImages:
    """Noisy images with one bright quarter, which is their class."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(count) % CLASSES
    images = torch.randint(40, 140, (count, *SHAPE), generator=generator)
    for index, target in enumerate(targets.tolist()):
        row, column = 8 * (target // 2), 8 * (target % 2)
        images[index, :, row : row + 8, column : column + 8] += 45
    return LabelledImages(images.to(torch.uint8), targets)


@pytest.fixture(scope="module")
def splits() -> Splits:
    return Splits(*(labelled(count, seed) for seed, count in enumerate((240, 80, 80, 80))))


@pytest.fixture(scope="module")
def graph(splits):
    """A small classifier of the quarters, trained for real."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(
            *(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(8 * 16, CLASSES)),
        )
        optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
        for _ in range(40):
            loss = F.cross_entropy(network(splits.fit.images / 255), splits.fit.targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return canonicalise(export_classifier(network.eval(), SHAPE))


Fit = Callable[[Path, Callable[[str, int, int], None]], Fitted]


@pytest.fixture(params=["raw", "purified"])
def fit(request, graph, splits) -> Fit:
    plan = FitPlan(
        attacks=("fgsm:epsilon=40/255", "pgd-stop:step_size=4/255,steps=10"),
        examples=120,
        regulator=RegulatorPlan(channels=(8, 8), skip_channels=(4, 4), epochs=6, batch_size=32, flip=False),
        inspector=InspectorPlan(inspects=request.param, most_features=64),
    )

    def run(folder: Path, progress: Callable[[str, int, int], None]) -> Fitted:
        device = torch.device("cpu")
        return fit_coophance(Classifier(graph), splits, plan, stages=Stages(folder), device=device, progress=progress)

    return run


def quiet(stage: str, done: int, total: int) -> None:
    pass


def state(fitted: Fitted) -> dict[str, Tensor]:
    return {**fitted.protected.state_dict(), "calibration scores": fitted.calibration_scores}


def check_same(found: Fitted, expected: Fitted, where: str) -> None:
    theirs = state(expected)
    different = [name for name, value in state(found).items() if not torch.equal(value, theirs[name])]
    assert different == [], where
    assert found.metrics == expected.metrics, where
    assert found.selection == expected.selection, where


def test_a_fit_that_is_cut_off_anywhere_gives_the_same(fit, tmp_path, monkeypatch):
    monkeypatch.setattr("defenses.coophance.trainer.KEEP_EVERY", 0.0)  # so that parts of a training are kept too
    monkeypatch.setattr("defenses.coophance.trainer.POINT_EVERY", 4)
    told: list[str] = []
    expected = fit(tmp_path / "whole", lambda stage, done, total: told.append(stage))
    assert expected.metrics["attack_success_rate.fgsm:epsilon=40/255"] > 0.5
    assert expected.metrics["clean_accuracy_undefended"] > 0.9
    partial = 0
    for moment in range(1, MOMENTS + 1):
        left = len(told) * moment // (MOMENTS + 1)

        countdown = iter(range(left - 1, -1, -1))

        def cut(stage: str, done: int, total: int, countdown: Iterator[int] = countdown) -> None:
            if next(countdown) == 0:
                raise Cut

        folder = tmp_path / f"cut-{moment}"
        with pytest.raises(Cut):
            fit(folder, cut)
        partial += any("partial" in name for name in Stages(folder).names())
        check_same(fit(folder, quiet), expected, f"cut off in {told[left - 1]}")
    assert partial, "at least one cut is within a training, of which a part is kept"


def test_a_fit_goes_on_after_any_stage(fit, tmp_path):
    expected = fit(tmp_path / "whole", quiet)
    names = Stages(tmp_path / "whole").names()
    assert len(names) > 10
    for kept in range(3, len(names), 4):
        folder = tmp_path / f"kept-{kept}"
        shutil.copytree(tmp_path / "whole", folder)
        for name in names[kept:]:
            Stages(folder).drop(name)
        check_same(fit(folder, quiet), expected, f"with {names[:kept]} kept")
        assert set(Stages(folder).names()) == set(names)
