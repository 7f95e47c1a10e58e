"""Measuring a published defense from the store, without a gateway: scenario A."""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from defenses.attacks import attack
from defenses.coophance import Regulator
from defenses.detector import NoDetector
from defenses.evaluation import Progress
from defenses.evaluation.measurement import ExampleRow, Measurement
from defenses.evaluation.rates import CleanRow
from defenses.protected import ProtectedClassifier
from model_store import Fetched
from service.attack_run import AttackRun, run_attack
from service.datasets import Dataset
from service.evaluate import in_seeded_order
from service.hardware import hardware
from service.libraries import library_versions

ATTACKS = ("fgsm", "pgd-stop", "deepfool", "cw")
"""What a defense is measured against unless told otherwise: the attacks of the paper's table 1 that are built here."""


@dataclass(frozen=True)
class ScenarioAPlan:
    """Say what is measured.

    ``limit`` test images, taken in an order drawn from ``seed``, are attempted per attack; the clean rates are over
    all test images. ``confusion`` switches the confusion layers on or off, as they were published when None, and
    ``noise`` all noise of the defense.
    """

    attacks: tuple[str, ...] = ATTACKS
    limit: int = 300
    seed: int = 0
    confusion: bool | None = None
    noise: bool = True


@dataclass(frozen=True)
class ScenarioAReport:
    """A measurement of one published version, with all that is needed to repeat it.

    ``threshold`` is one for all, or one for each class, and None without a detector. ``rows`` has two entries per
    attack: its examples as crafted, and rounded to 8 bits.
    """

    model: str
    version: int
    threshold: float | list[float] | None
    clean: CleanRow
    rows: tuple[ExampleRow, ...]
    attacks: tuple[AttackRun, ...]
    plan: ScenarioAPlan
    dataset: dict[str, str | int]
    libraries: dict[str, str]
    hardware: dict[str, str | int]
    command: str

    def as_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return asdict(self)


def measure_scenario_a(
    fetched: Fetched,
    protected: ProtectedClassifier,
    dataset: Dataset,
    plan: ScenarioAPlan,
    *,
    device: torch.device,
    progress: Progress,
    command: str = "",
) -> ScenarioAReport:
    """Measure a defense on a data set's test split: clean, and under attacks crafted on the bare classifier.

    ``protected`` is moved to the device, and its confusion layers are switched as the plan says. The same plan on the
    same machine gives the same rates. Raises ``AttackUnknown`` before anything is computed, and ``ValueError`` for a
    classifier that gets nothing right.
    """
    known = [attack(text) for text in plan.attacks]
    protected = protected.to(device)
    if plan.confusion is not None:
        assert isinstance(protected.purifier, Regulator)
        protected.purifier.set_confusion(plan.confusion)
    scenario = Measurement(protected, device, plan.seed, noise_scale=float(plan.noise))
    images, targets = in_seeded_order(dataset.test, plan.seed)
    progress("clean", 0, 1)
    clean, clean_scores = scenario.clean(images, targets)
    progress("clean", 1, 1)
    measured = [
        run_attack(
            each,
            protected.classifier,
            images,
            targets,
            lambda examples: scenario.attacked(examples, clean_scores),
            limit=plan.limit,
            device=device,
            seed=plan.seed,
            progress=progress,
        )
        for each in known
    ]
    return ScenarioAReport(
        model=fetched.manifest.name,
        version=fetched.manifest.version,
        threshold=None if isinstance(protected.detector, NoDetector) else protected.threshold.tolist(),
        clean=clean,
        rows=tuple(row for rows, _ in measured for row in rows),
        attacks=tuple(run for _, run in measured),
        plan=plan,
        dataset={"name": dataset.name, "digest": dataset.digest, "split_seed": dataset.split_seed},
        libraries=library_versions(),
        hardware=hardware(device),
        command=command,
    )
