"""What every fit of a defense goes through: its job, what is checked beforehand, the export, and publishing."""

import logging
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from defenses.checkpoint import save_protected
from defenses.classifier import Classifier
from defenses.evaluation import Progress
from defenses.onnx_export import check_export, export_protected, save_graph
from defenses.protected import ProtectedClassifier
from defenses.splits import LabelledImages, Splits
from defenses.stages import Stages
from model_store import Draft, Fetched, Manifest, Parent, Store, StoreError
from service.datasets import Dataset
from service.fit_draft import FIT, findings_of
from service.fit_job import FITS, FORMAT, FitJob, FitJobs
from service.fit_splits import check_splits
from service.libraries import library_versions
from service.repository import MODELS
from service.resources import FitSize, check_disk, check_memory, memory_available
from service.served import GRAPH

logger = logging.getLogger("portcullis")

CHECKPOINT = "checkpoint"


class ParentChanged(ValueError):
    """The classifier that a defense names is not the one that it was fitted for."""

    def __init__(self, name: str, parent: Parent, found: str) -> None:
        super().__init__(
            f"{name} was fitted for {parent.name}@{parent.version} with digest {parent.digest}, "
            f"but that version now has digest {found}."
        )


class FittedDefense(Protocol):
    """What a method's fit gives, whatever else it tells: the protected classifier, on the CPU."""

    @property
    def protected(self) -> ProtectedClassifier: ...


FittedT = TypeVar("FittedT", bound=FittedDefense)


class Method(Protocol[FittedT]):
    """What a method adds to the steps that every fit takes (see ``fit_and_publish``)."""

    def identity(self) -> dict[str, Any]:
        """Return all that the method's result depends on besides classifier, data, device and libraries."""

    def structure(self) -> ProtectedClassifier:
        """Return the protected classifier that is fitted, before anything is fitted."""

    def size(self, structure: ProtectedClassifier) -> FitSize:
        """Return what the fit takes of memory and disk."""

    def fit(self, splits: Splits, stages: Stages, device: torch.device, progress: Progress) -> FittedT:
        """Fit, and measure what was fitted."""

    def draft(self, fitted: FittedT, *, fit: str, command: str) -> Draft:
        """Return what is recorded about the defense; ``fit`` is the id of the fit that made it."""

    def complete(self, fitted: FittedT, draft: Draft, job: FitJob, folder: Path) -> Draft:
        """Write what is published beside graph and checkpoint into ``folder``; return the draft, completed."""


@dataclass(frozen=True)
class Subject:
    """What a defense is fitted for and on: a registered classifier, its torch form, and a data set."""

    fetched: Fetched
    classifier: Classifier
    dataset: Dataset

    @classmethod
    def open(cls, fetched: Fetched, dataset: Dataset) -> "Subject":
        """Load a classifier's torch form, in evaluation mode."""
        return cls(fetched, Classifier.load(fetched.folder / GRAPH).eval(), dataset)

    @property
    def name(self) -> str:
        """The classifier's name, under which the defense is published."""
        return self.fetched.manifest.name


def fit_and_publish(
    root: Path,
    subject: Subject,
    method: Method[FittedT],
    *,
    device: torch.device,
    fresh: bool,
    progress: Progress,
    notice: Callable[[str], None],
    command: str,
) -> Manifest:
    """Fit a defense by a method and publish it as the next version of the classifier's name.

    ``root`` is the store's folder. Nothing is published unless every step succeeds. Every finished stage is kept in
    the store's folder ``fits``. A fit that was killed or failed resumes there when the same is asked for again, and
    publishes nothing twice; ``fresh`` begins anew. ``notice`` is called with a sentence when a fit resumes, and for
    each thing that was found out in it that its user should know, such as an empty template.

    Raises what the method raises, ``FitRunning`` where another process is at the same fit, ``MemoryTooSmall``,
    ``DiskTooSmall`` and, for a classifier that was trained on images that are to be new to it, ``OtherSplits`` before
    anything is computed, ``PurifierNotExportable``, ``StageNotKept``, ``ExportBroken``, and the store's errors.
    """
    jobs = FitJobs(root / FITS)
    name = f"{subject.name}@{subject.fetched.manifest.version}"
    check_splits(name, subject.fetched.manifest.data, subject.dataset)
    identity = _identity(subject, method, device)
    with jobs.open(identity, model=name, dataset=subject.dataset.name, command=command, fresh=fresh) as job:
        if published := published_by(root / MODELS, subject.name, job):
            notice(f"This fit was finished before: it is published as {published.name}@{published.version}.")
            return _with_findings_told(published, notice)
        if resumed := job.told():
            notice(resumed)
        structure = method.structure()
        _check_resources(method.size(structure), device, job)
        if not resumed:
            # A classifier whose graph allows no export fails here, and not after the long work.
            grey = torch.full((2, *subject.classifier.image_shape), 0.5)
            check_export(export_protected(structure), structure, grey)
        fitted = method.fit(splits_of(subject.dataset), job.stages, device, progress)
        return _with_findings_told(_publish(root, subject, method, fitted, job, progress, command), notice)


def _with_findings_told(manifest: Manifest, notice: Callable[[str], None]) -> Manifest:
    for finding in findings_of(manifest):
        notice(finding)
    return manifest


def find_classifier(store: Store, name: str, ref: int | str | None) -> Fetched:
    """Fetch the classifier that a reference means: itself, or the one that the defense was fitted for.

    Raises the store's errors, and ``ParentChanged``.
    """
    fetched = store.fetch(name, ref)
    parent = fetched.manifest.parent
    if parent is None:
        return fetched
    classifier = store.fetch(parent.name, parent.version)
    if classifier.digest != parent.digest:
        raise ParentChanged(name, parent, classifier.digest)
    return classifier


def published_by(folder: Path, name: str, job: FitJob) -> Manifest | None:
    """Return the version of a name that a fit published before it was killed, if it did."""
    store = Store.open(folder)
    for version in reversed(store.versions(name)):
        with suppress(StoreError):  # one that is damaged is not this fit's concern
            manifest = store.manifest(name, version)
            if manifest.options.get(FIT) == job.record.id:
                return manifest
    return None


def splits_of(dataset: Dataset) -> Splits:
    """Return the splits of a data set as tensors, which share its memory."""
    parts = (dataset.fit, dataset.validation, dataset.calibration, dataset.test)
    return Splits(*(LabelledImages(torch.from_numpy(part.images), torch.from_numpy(part.targets)) for part in parts))


def _identity(subject: Subject, method: Method[FittedT], device: torch.device) -> dict[str, Any]:
    """Return all that the result of a fit depends on."""
    return {
        "format": FORMAT,
        **method.identity(),
        "classifier": subject.fetched.digest,
        "dataset": subject.dataset.digest,
        "split_seed": subject.dataset.split_seed,
        "device": device.type,
        "libraries": library_versions(),
    }


def _check_resources(size: FitSize, device: torch.device, job: FitJob) -> None:
    """Refuse a fit that is too large for this machine; raises ``MemoryTooSmall`` and ``DiskTooSmall``."""
    device_memory = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
    check_memory(size, available=memory_available(), device_available=device_memory)
    check_disk(size, job.folder, kept=job.size)


def _publish(
    root: Path,
    subject: Subject,
    method: Method[FittedT],
    fitted: FittedT,
    job: FitJob,
    progress: Progress,
    command: str,
) -> Manifest:
    progress("export", 0, 1)
    graph = export_protected(fitted.protected)
    check_export(graph, fitted.protected, torch.from_numpy(subject.dataset.test.images[:8]).float() / 255)
    progress("export", 1, 1)
    payload = job.folder / "payload"
    shutil.rmtree(payload, ignore_errors=True)
    try:
        save_protected(fitted.protected, payload / CHECKPOINT)
        save_graph(graph, payload / GRAPH)
        draft = method.complete(fitted, method.draft(fitted, fit=job.record.id, command=command), job, payload)
        return Store.open(root / MODELS).publish(subject.name, draft, payload)
    finally:
        shutil.rmtree(payload, ignore_errors=True)
