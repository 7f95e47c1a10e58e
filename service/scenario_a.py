"""Measuring a published defense from the store, without a gateway: scenario A."""

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from defenses.attacks import Attack, attack, craft
from defenses.checkpoint import load_protected
from defenses.classifier import Classifier
from defenses.coophance import Regulator
from defenses.evaluation import Progress
from defenses.evaluation.rates import CleanRow
from defenses.evaluation.scenario_a import ScenarioA, ScenarioARow
from defenses.protected import ProtectedClassifier
from model_store import Fetched, Manifest, Store
from service.datasets import Dataset
from service.evaluate import in_seeded_order
from service.fit import CHECKPOINT, find_classifier
from service.hardware import hardware
from service.libraries import library_versions
from service.served import GRAPH

ATTACKS = ("fgsm", "pgd-stop", "deepfool", "cw")
"""What a defense is measured against unless told otherwise: the attacks of the paper's table 1 that are built here."""


class DefenseMissing(ValueError):
    """A version that is to be measured has no defense."""

    def __init__(self, manifest: Manifest) -> None:
        self.kind = manifest.kind
        super().__init__(
            f"Expected a version with a CoopHANCE defense, got {manifest.name}@{manifest.version}, which is of kind "
            f"{manifest.kind}; a running gateway can be measured in any case, with --url."
        )


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
class AttackRun:
    """An attack that was measured: its parameters, and the seconds to craft its examples and to answer them."""

    attack: str
    parameters: dict[str, float]
    crafting_seconds: float
    answering_seconds: float


@dataclass(frozen=True)
class ScenarioAReport:
    """A measurement of one published version, with all that is needed to repeat it.

    ``threshold`` is one for all, or one for each class. ``rows`` has two entries per attack: its examples as crafted,
    and rounded to 8 bits.
    """

    model: str
    version: int
    threshold: float | list[float]
    clean: CleanRow
    rows: tuple[ScenarioARow, ...]
    attacks: tuple[AttackRun, ...]
    plan: ScenarioAPlan
    dataset: dict[str, str | int]
    libraries: dict[str, str]
    hardware: dict[str, str | int]
    command: str

    def as_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return asdict(self)


def load_defended(store: Store, name: str, ref: int | str | None) -> tuple[Fetched, ProtectedClassifier]:
    """Fetch a version with a defense, and put its classifier behind it, on the CPU and in evaluation mode.

    Raises the store's errors, ``DefenseMissing``, ``ParentChanged`` and ``CheckpointUnreadable``.
    """
    fetched = store.fetch(name, ref)
    if fetched.manifest.kind != "coophance":
        raise DefenseMissing(fetched.manifest)
    classifier = find_classifier(store, name, fetched.manifest.version)
    bare = Classifier.load(classifier.folder / GRAPH).eval()
    return fetched, load_protected(bare, fetched.folder / CHECKPOINT)


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
    scenario = ScenarioA(protected, device, plan.seed, noise_scale=float(plan.noise))
    images, targets = in_seeded_order(dataset.test, plan.seed)
    progress("clean", 0, 1)
    clean, clean_scores = scenario.clean(images, targets)
    progress("clean", 1, 1)
    measured = [_measure_attack(scenario, each, images, targets, clean_scores, plan, progress) for each in known]
    return ScenarioAReport(
        model=fetched.manifest.name,
        version=fetched.manifest.version,
        threshold=protected.threshold.tolist(),
        clean=clean,
        rows=tuple(row for rows, _ in measured for row in rows),
        attacks=tuple(run for _, run in measured),
        plan=plan,
        dataset={"name": dataset.name, "digest": dataset.digest, "split_seed": dataset.split_seed},
        libraries=library_versions(),
        hardware=hardware(device),
        command=command,
    )


def _measure_attack(
    scenario: ScenarioA,
    attack: Attack,
    images: torch.Tensor,
    targets: torch.Tensor,
    clean_scores: torch.Tensor,
    plan: ScenarioAPlan,
    progress: Progress,
) -> tuple[tuple[ScenarioARow, ...], AttackRun]:
    def advance(done: int, total: int) -> None:
        progress(attack.name, done, total)

    start = time.perf_counter()
    examples = craft(
        attack,
        scenario.protected.classifier,
        images,
        targets,
        limit=plan.limit,
        device=scenario.device,
        seed=plan.seed,
        progress=advance,
    )
    crafted = time.perf_counter()
    rows = scenario.attacked(examples, clean_scores)
    answered = time.perf_counter()
    return rows, AttackRun(attack.name, dict(attack.parameters), crafted - start, answered - crafted)
