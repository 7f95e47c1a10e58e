"""Measuring a published NIP defense from the store, beside its controls."""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from defenses.attacks import attack
from defenses.evaluation import Progress
from defenses.nip import CleanSuccess, DefenseSuccess, Direction, SuccessRow
from defenses.protected import ProtectedClassifier
from model_store import Fetched
from service.attack_run import AttackRun, run_attack
from service.datasets import Dataset
from service.evaluate import in_seeded_order
from service.hardware import hardware
from service.libraries import library_versions

DIRECTIONS: tuple[Direction, ...] = ("nearest", "random", "gaussian", "oracle")
"""Where images are moved: as is served, by a random candidate or by Gaussian noise of the same L2 norm, or by the
oracle, which knows the clean image."""


@dataclass(frozen=True)
class SuccessPlan:
    """Say what is measured.

    ``limit`` test images, taken in an order drawn from ``seed``, are attempted per attack; the clean rates are over
    all test images.
    """

    attacks: tuple[str, ...]
    limit: int = 300
    seed: int = 0


@dataclass(frozen=True)
class SuccessReport:
    """A measurement of one published version, with all that is needed to repeat it.

    There is no ``threshold``. ``clean`` has an entry for each direction but the oracle, ``rows`` two for each attack
    and direction: its examples as crafted, and rounded to 8 bits.
    """

    model: str
    version: int
    threshold: None
    amplitude: float
    candidates: int
    template_sizes: tuple[int, ...]
    clean: tuple[CleanSuccess, ...]
    rows: tuple[SuccessRow, ...]
    attacks: tuple[AttackRun, ...]
    plan: SuccessPlan
    dataset: dict[str, str | int]
    libraries: dict[str, str]
    hardware: dict[str, str | int]
    command: str

    def as_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return asdict(self)


def measure_success(
    fetched: Fetched,
    protected: ProtectedClassifier,
    dataset: Dataset,
    plan: SuccessPlan,
    *,
    device: torch.device,
    progress: Progress,
    command: str = "",
) -> SuccessReport:
    """Measure a NIP defense on a data set's test split: clean, and under attacks crafted on the bare classifier.

    ``protected`` is moved to the device. The same plan on the same machine gives the same rates. Raises
    ``AttackUnknown`` before anything is computed, and ``ValueError`` for a classifier that gets nothing right.
    """
    known = [attack(text) for text in plan.attacks]
    success = DefenseSuccess.of(protected, device, plan.seed)
    images, targets = in_seeded_order(dataset.test, plan.seed)
    clean = []
    for direction in DIRECTIONS:
        if direction != "oracle":
            progress(f"clean, {direction}", 0, 1)
            clean.append(success.clean(images, targets, direction))
            progress(f"clean, {direction}", 1, 1)
    measured = [
        run_attack(
            each,
            protected.classifier,
            images,
            targets,
            lambda examples: [row for direction in DIRECTIONS for row in success.attacked(examples, direction)],
            limit=plan.limit,
            device=device,
            seed=plan.seed,
            progress=progress,
        )
        for each in known
    ]
    config = success.purifier.config
    return SuccessReport(
        model=fetched.manifest.name,
        version=fetched.manifest.version,
        threshold=None,
        amplitude=config.amplitude,
        candidates=config.candidates,
        template_sizes=config.template_sizes,
        clean=tuple(clean),
        rows=tuple(row for rows, _ in measured for row in rows),
        attacks=tuple(run for _, run in measured),
        plan=plan,
        dataset={"name": dataset.name, "digest": dataset.digest, "split_seed": dataset.split_seed},
        libraries=library_versions(),
        hardware=hardware(device),
        command=command,
    )
