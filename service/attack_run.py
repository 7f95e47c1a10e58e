"""One attack of a measurement: crafted, answered, timed."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from defenses.attacks import AdversarialExamples, Attack, craft
from defenses.classifier import Classifier
from defenses.evaluation import Progress

T = TypeVar("T")


@dataclass(frozen=True)
class AttackRun:
    """An attack that was measured: its parameters, and the seconds to craft its examples and to answer them."""

    attack: str
    parameters: dict[str, float]
    crafting_seconds: float
    answering_seconds: float


def run_attack(
    attack: Attack,
    classifier: Classifier,
    images: Tensor,
    targets: Tensor,
    answer: Callable[[AdversarialExamples], T],
    *,
    limit: int,
    device: torch.device,
    seed: int,
    progress: Progress,
) -> tuple[T, AttackRun]:
    """Craft an attack's examples on a bare classifier (see ``craft``); return what ``answer`` makes of them."""
    start = time.perf_counter()
    examples = craft(
        attack,
        classifier,
        images,
        targets,
        limit=limit,
        device=device,
        seed=seed,
        progress=lambda done, total: progress(attack.name, done, total),
    )
    crafted = time.perf_counter()
    answers = answer(examples)
    answered = time.perf_counter()
    return answers, AttackRun(attack.name, dict(attack.parameters), crafted - start, answered - crafted)
