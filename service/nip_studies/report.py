"""Studying a published NIP defense from the store: its pool, and others like it that are made for the moment."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from defenses.attacks import AdversarialExamples, Attack, attack, craft
from defenses.evaluation import Progress
from defenses.nip import InversePerturbation, NipPlan
from defenses.nip.studies import (
    ConsistencyStudy,
    InfluenceStudy,
    PlaceStudy,
    StudySubject,
    Sweep,
    study_consistency,
    study_eta,
    study_influence,
    study_k,
    study_layer,
    study_place,
)
from defenses.protected import ProtectedClassifier
from defenses.splits import LabelledImages
from model_store import Fetched, Manifest
from service.datasets import Dataset, Split
from service.evaluate import in_seeded_order
from service.fit import splits_of
from service.hardware import hardware
from service.libraries import library_versions

StudyName = Literal["influence", "tknc", "k", "layer", "eta", "neurons"]
Study = InfluenceStudy | ConsistencyStudy | Sweep | PlaceStudy

STUDIES: Mapping[StudyName, Callable[[StudySubject], Study]] = {
    "influence": study_influence,
    "tknc": study_consistency,
    "k": study_k,
    "layer": study_layer,
    "eta": study_eta,
    "neurons": study_place,
}
"""The studies by name, in the order in which they are done."""

MOST_VALIDATION = 1000
"""Validation images that amplitudes are set anew on at most, so that many pools are measured in minutes."""

ACCURACY_LOSS = 0.01
"""The share of clean images that an amplitude set anew may cost, where the plan of a version names none."""


class StudyUnknown(ValueError):
    """There is no study of that name."""

    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(f"Expected a study of {', '.join(STUDIES)}, got {name!r}.")


class StudyUnsuitable(ValueError):
    """A version has no pool that could be studied."""

    def __init__(self, manifest: Manifest, found: str) -> None:
        self.found = found
        super().__init__(
            "The studies are about a pool of inverse perturbations, as portcullis fit nip --preset paper makes it, but "
            f"{manifest.name}@{manifest.version} has {found}."
        )


@dataclass(frozen=True)
class StudyPlan:
    """Say what is studied.

    ``limit`` test images, in an order drawn from ``seed``, are attempted per attack; clean rates are over as many.
    """

    studies: tuple[StudyName, ...]
    attacks: tuple[str, ...]
    limit: int = 300
    seed: int = 0


@dataclass(frozen=True)
class Attacked:
    """An attack that was crafted on the bare classifier.

    ``fooling`` of the ``attempted`` images fool it as crafted, with the mean L2 distance ``distortion_l2`` from the
    clean ones, None where none does; everything else in a report is over those. ``seconds`` is how long it took.
    """

    attack: str
    parameters: dict[str, float]
    attempted: int
    fooling: int
    distortion_l2: float | None
    seconds: float


@dataclass(frozen=True)
class StudyReport:
    """Studies of one published version, with all that is needed to repeat them.

    ``amplitude`` is the version's own, ``accuracy_loss`` what one that is set anew may cost, of ``validation_images``.
    ``seconds`` is how long each study took.
    """

    model: str
    version: int
    layer: str
    amplitude: float
    candidates: int
    accuracy_loss: float
    validation_images: int
    attacks: tuple[Attacked, ...]
    studies: dict[StudyName, Study]
    seconds: dict[StudyName, float]
    fitted: dict[str, Any]
    plan: StudyPlan
    dataset: dict[str, str | int]
    libraries: dict[str, str]
    hardware: dict[str, str | int]
    command: str

    def as_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return asdict(self)


def known_studies(names: Sequence[str]) -> tuple[StudyName, ...]:
    """Return the studies of those names, each once, in the order in which they are done; raises ``StudyUnknown``."""
    for name in names:
        if name not in STUDIES:
            raise StudyUnknown(name)
    return tuple(study for study in STUDIES if study in names)


def run_studies(
    fetched: Fetched,
    protected: ProtectedClassifier,
    dataset: Dataset,
    plan: StudyPlan,
    *,
    device: torch.device,
    progress: Progress,
    command: str = "",
) -> StudyReport:
    """Study a NIP defense: pools are made anew of the fit split, everything is measured on the test split.

    Nothing is published. ``protected`` is moved to the device. The same plan on the same machine finds the same.
    Raises ``StudyUnsuitable`` and ``AttackUnknown`` before anything is computed, ``HeadUnsuitable``, and ``ValueError``
    for a classifier that gets nothing right.
    """
    check_suitable(fetched.manifest, protected)
    known = [attack(text) for text in plan.attacks]
    protected = protected.to(device)
    examples, attacked = [], []
    for each in known:
        made, told = _crafted(each, protected, dataset.test, plan, device, progress)
        examples.append(made)
        attacked.append(told)
    subject = _subject(fetched.manifest, protected, dataset, plan, tuple(examples), device, progress)
    studies: dict[StudyName, Study] = {}
    seconds: dict[StudyName, float] = {}
    for name, study in STUDIES.items():
        if name in plan.studies:
            start = time.perf_counter()
            studies[name] = study(subject)
            seconds[name] = time.perf_counter() - start
    config = subject.purifier.config
    return StudyReport(
        model=fetched.manifest.name,
        version=fetched.manifest.version,
        layer=config.layer,
        amplitude=config.amplitude,
        candidates=config.candidates,
        accuracy_loss=subject.accuracy_loss,
        validation_images=len(subject.validation.targets),
        attacks=tuple(attacked),
        studies=studies,
        seconds=seconds,
        fitted=asdict(subject.plan),
        plan=plan,
        dataset={"name": dataset.name, "digest": dataset.digest, "split_seed": dataset.split_seed},
        libraries=library_versions(),
        hardware=hardware(device),
        command=command,
    )


def check_suitable(manifest: Manifest, protected: ProtectedClassifier) -> InversePerturbation:
    """Return the pool of a version; raises ``StudyUnsuitable`` for a version that has none."""
    if not isinstance(protected.purifier, InversePerturbation):
        raise StudyUnsuitable(manifest, f"another purifier, {type(protected.purifier).__name__}")
    if not isinstance(manifest.options.get("plan"), dict):
        raise StudyUnsuitable(manifest, "no plan on record to make others like it by")
    return protected.purifier


def _subject(
    manifest: Manifest,
    protected: ProtectedClassifier,
    dataset: Dataset,
    plan: StudyPlan,
    examples: tuple[AdversarialExamples, ...],
    device: torch.device,
    progress: Progress,
) -> StudySubject:
    fitted = _plan_of(manifest)
    return StudySubject(
        classifier=protected.classifier,
        purifier=check_suitable(manifest, protected),
        plan=fitted,
        fit=splits_of(dataset).fit,
        validation=_first(dataset.validation, plan.seed, MOST_VALIDATION),
        clean=_first(dataset.test, plan.seed, plan.limit),
        attacked=examples,
        accuracy_loss=ACCURACY_LOSS if fitted.accuracy_loss is None else fitted.accuracy_loss,
        device=device,
        seed=plan.seed,
        progress=progress,
    )


def _plan_of(manifest: Manifest) -> NipPlan:
    """Return the plan that a version was fitted by, as it is on record."""
    recorded: Any = manifest.options["plan"]
    fields: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in recorded.items()
    }
    return NipPlan(**fields)


def _first(split: Split, seed: int, most: int) -> LabelledImages:
    images, targets = in_seeded_order(split, seed)
    return LabelledImages(images[:most], targets[:most])


def _crafted(
    known: Attack,
    protected: ProtectedClassifier,
    test: Split,
    plan: StudyPlan,
    device: torch.device,
    progress: Progress,
) -> tuple[AdversarialExamples, Attacked]:
    start = time.perf_counter()
    examples = craft(
        known,
        protected.classifier,
        *in_seeded_order(test, plan.seed),
        limit=plan.limit,
        device=device,
        seed=plan.seed,
        progress=lambda done, total: progress(known.name, done, total),
    )
    told = Attacked(
        known.name,
        dict(known.parameters),
        len(examples.fooled),
        int(examples.fooled.sum()),
        examples.distortion,
        time.perf_counter() - start,
    )
    return examples, told
