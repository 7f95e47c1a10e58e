"""Choosing how far a Regulator goes: where its training stops, and how much of the purified image is taken."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from defenses.attacks import AdversarialExamples
from defenses.coophance.regulator import Regulator
from defenses.evaluation import Progress
from defenses.pixels import to_float

STRENGTHS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""The shares of the purified image that are tried."""


class NothingToChooseBy(ValueError):
    """No attacked validation image fools the classifier, but something is to be chosen by such; `what` names it."""

    def __init__(self, what: Sequence[str]) -> None:
        super().__init__(
            f"Expected attacked validation images that fool the classifier, to choose {', '.join(what)} by; there are "
            "none. Another attack may fool it, or the same with a larger bound."
        )
        self.what = tuple(what)


@dataclass(frozen=True)
class Candidate:
    """What the classifier makes of validation images that a Regulator purified, with its noise on.

    ``accuracy`` is that on the clean images, ``corrected`` the share of adversarial ones that are answered with the
    true class, averaged over the attacks, each of which counts the same; None where there are none.
    """

    step: int
    strength: float
    accuracy: float
    corrected: float | None


@dataclass(frozen=True)
class Selection:
    """Hold the candidate that was chosen, the bare classifier's accuracy on the same images, and all that were tried.

    ``within`` says whether the chosen one costs no more accuracy than allowed; if not, it is the one that costs least.
    """

    chosen: Candidate
    undefended_accuracy: float
    within: bool
    tried: tuple[Candidate, ...]

    def as_json(self) -> dict[str, Any]:
        """Return the selection as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Return the selection that ``as_json`` described."""
        tried = tuple(Candidate(**each) for each in values["tried"])
        return cls(**{**values, "chosen": Candidate(**values["chosen"]), "tried": tried})


@torch.no_grad()
def select(
    classifier: nn.Module,
    regulators: Mapping[int, Regulator],
    strengths: Sequence[float],
    clean: tuple[Tensor, Tensor],
    examples: Sequence[AdversarialExamples],
    accuracy_loss: float,
    *,
    seed: int,
    device: torch.device,
    progress: Progress,
) -> Selection:
    """Choose the stopping point and the strength that correct most, at no more than a loss of clean accuracy.

    ``regulators`` are by the step they were trained to; ``clean`` is (images, targets) and ``examples`` are attacked
    images, none of which anything was fitted on. Both the classifier and the Regulators are in evaluation mode, the
    classifier on ``device``. Where there is but one candidate, no example need fool the classifier; raises
    ``NothingToChooseBy`` where there are several and none does.
    """
    images, targets = clean
    fooling = [(each.x_adv[each.fooled], each.y[each.fooled]) for each in examples if each.fooled.any()]
    if not fooling and len(regulators) * len(strengths) > 1:
        raise NothingToChooseBy(["the stopping point and the strength"])
    groups = [(images, targets), *fooling]
    undefended = accuracy_of(classifier, images, targets, device)
    tried: list[Candidate] = []
    total = len(regulators) * len(groups)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for step, regulator in regulators.items():
            torch.manual_seed(seed)
            rates: list[list[float]] = []
            for group in groups:
                rates.append(_rates(classifier, regulator.to(device), strengths, *group, device))
                progress("selection", len(tried) // len(strengths) * len(groups) + len(rates), total)
            regulator.cpu()
            for strength, (accuracy, *corrected) in zip(strengths, zip(*rates, strict=True), strict=True):
                share = sum(corrected) / len(corrected) if corrected else None
                tried.append(Candidate(step, strength, accuracy, share))
    allowed = [each for each in tried if each.accuracy >= undefended - accuracy_loss]
    chosen = (
        max(allowed, key=lambda each: (each.corrected or 0.0, each.accuracy))
        if allowed
        else max(tried, key=lambda each: (each.accuracy, each.corrected or 0.0))
    )
    return Selection(chosen, undefended, bool(allowed), tuple(tried))


def _rates(
    classifier: nn.Module,
    regulator: Regulator,
    strengths: Sequence[float],
    images: Tensor,
    targets: Tensor,
    device: torch.device,
) -> list[float]:
    """Return the share of images answered with the true class at each strength."""
    noise_on = torch.ones((), device=device)
    right = [0] * len(strengths)
    for batch, y in zip(images.split(128), targets.to(device).split(128), strict=True):
        x = to_float(batch.to(device))
        purified = regulator(x, noise_on)
        for index, strength in enumerate(strengths):
            right[index] += int((classifier(x + strength * (purified - x)).argmax(1) == y).sum())
    return [count / len(targets) for count in right]


def accuracy_of(classifier: nn.Module, images: Tensor, targets: Tensor, device: torch.device) -> float:
    """Return the share of images, uint8 or float (N, C, H, W), that a classifier answers with their class."""
    return int((answers_of(classifier, images, device) == targets).sum()) / len(targets)


@torch.no_grad()
def answers_of(classifier: nn.Module, images: Tensor, device: torch.device) -> Tensor:
    """Return the classes, int64 (N,) on the CPU, that a classifier answers images with, uint8 or float (N, C, H, W)."""
    return torch.cat([classifier(to_float(x.to(device))).argmax(1).cpu() for x in images.split(128)])
