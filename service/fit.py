"""Fitting a defense for a registered classifier and publishing it."""

import logging
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import nn

from defenses.attacks import attack
from defenses.calibration import check_budget
from defenses.checkpoint import save_protected, save_regulator
from defenses.classifier import Classifier
from defenses.coophance import (
    FitPlan,
    Fitted,
    Inspector,
    LabelledImages,
    Regulator,
    Splits,
    fit_coophance,
)
from defenses.evaluation import Progress
from defenses.footprint import saved_bytes, weight_bytes
from defenses.onnx_export import check_export, export_protected, save_graph
from defenses.protected import ProtectedClassifier
from model_store import Draft, Fetched, Manifest, Parent, Store, StoreError
from service.datasets import Dataset
from service.fit_draft import FIT, defense_draft, regulator_draft
from service.fit_job import FITS, FORMAT, FitJob, FitJobs
from service.fit_report import write_report
from service.hardware import DeviceName, find_device
from service.libraries import library_versions
from service.p_values import CALIBRATION, write_scores
from service.regulators import REGULATORS, PublishedRegulator, find_regulator, other_data_told, regulator_name
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


def fit_and_publish(
    root: Path,
    classifier: Fetched,
    dataset: Dataset,
    plan: FitPlan,
    *,
    regulator: str | None = None,
    device: DeviceName = "auto",
    fresh: bool = False,
    progress: Progress,
    notice: Callable[[str], None] = logger.warning,
    command: str = "",
) -> Manifest:
    """Fit CoopHANCE for a classifier and publish it as the next version of its name.

    ``root`` is the store's folder. Nothing is published unless every step succeeds: then the Regulator on its own,
    named after the data set, and after it the defense. ``regulator``, as NAME@VERSION, is one that is used again.

    Every finished stage is kept in the store's folder ``fits``. A fit that was killed or failed resumes there when the
    same is asked for again, and publishes nothing twice; ``fresh`` begins anew. ``notice`` is called with a sentence
    when a fit resumes, and when ``regulator`` was fitted on other data.

    Raises what ``defenses.coophance.fit_coophance`` raises, ``FitRunning`` where another process is at the same fit,
    ``MemoryTooSmall`` and ``DiskTooSmall`` before anything is computed, ``StageNotKept``, what
    ``service.regulators.find_regulator`` raises, ``DeviceMissing``, ``ExportBroken``, and the store's errors.
    """
    module = Classifier.load(classifier.folder / GRAPH).eval()
    layer = plan.inspector.layer or classifier.manifest.layers.get("tap")
    plan = replace(plan, inspector=replace(plan.inspector, layer=layer))
    place = find_device(device)
    _check_plan(module, dataset, plan)
    reused = find_regulator(root, regulator, classifier.manifest.input) if regulator else None
    if reused and (told := other_data_told(reused, dataset.name, dataset.digest)):
        notice(told)
    identity = _identity(classifier, dataset, plan, reused, place)
    name = f"{classifier.manifest.name}@{classifier.manifest.version}"
    jobs = FitJobs(root / FITS)
    with jobs.open(identity, model=name, dataset=dataset.name, command=command, fresh=fresh) as job:
        if published := _published(root / MODELS, classifier.manifest.name, job):
            notice(f"This fit was finished before: it is published as {published.name}@{published.version}.")
            return published
        if resumed := job.told():
            notice(resumed)
        structure = _structure(module, plan, reused)
        _check_resources(structure, dataset, plan, place, job, trains=reused is None)
        if not resumed:
            # A classifier whose graph allows no export fails here, and not after the training.
            check_export(export_protected(structure), structure, torch.full((2, *module.image_shape), 0.5))
        fitted = fit_coophance(
            module,
            splits_of(dataset),
            plan,
            stages=job.stages,
            regulator=reused.regulator if reused else None,
            device=place,
            progress=progress,
        )
        progress("export", 0, 1)
        graph = export_protected(fitted.protected)
        check_export(graph, fitted.protected, torch.from_numpy(dataset.test.images[:8]).float() / 255)
        progress("export", 1, 1)
        draft = defense_draft(classifier, dataset, plan, fitted, fit=job.record.id, command=command)
        return _publish(root, job, fitted, graph, draft, reused, place)


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


def _identity(
    classifier: Fetched, dataset: Dataset, plan: FitPlan, reused: PublishedRegulator | None, device: torch.device
) -> dict[str, Any]:
    """Return all that the result of a fit depends on."""
    return {
        "format": FORMAT,
        "plan": asdict(plan),
        "classifier": classifier.digest,
        "dataset": dataset.digest,
        "split_seed": dataset.split_seed,
        "regulator": f"{reused.reference} {reused.digest}" if reused else None,
        "device": device.type,
        "libraries": library_versions(),
    }


def _check_plan(classifier: Classifier, dataset: Dataset, plan: FitPlan) -> None:
    """Refuse what cannot be, before anything is computed.

    Raises ``CalibrationTooSmall``, ``AttackUnknown``, ``LayerNotFound``, and ``ValueError`` for a budget beyond (0, 1).
    """
    check_budget(len(dataset.calibration.targets), plan.budget)
    for text in plan.attacks:
        attack(text)
    if plan.inspector.layer:
        classifier.resolve_layer(plan.inspector.layer)


def _structure(classifier: Classifier, plan: FitPlan, reused: PublishedRegulator | None) -> ProtectedClassifier:
    """Return the protected classifier that a plan fits, before anything is fitted; its score is 0 for every image."""
    layer = classifier.resolve_layer(plan.inspector.layer) if plan.inspector.layer else classifier.tap
    regulator = reused.regulator if reused else Regulator(plan.regulator.config(classifier.image_shape))
    inspector = Inspector(plan.inspector.config(layer, classifier.classes))
    for parameter in inspector.parameters():
        nn.init.zeros_(parameter)
    return ProtectedClassifier(classifier, regulator, inspector, 0.0).eval()


def _check_resources(
    structure: ProtectedClassifier,
    dataset: Dataset,
    plan: FitPlan,
    device: torch.device,
    job: FitJob,
    *,
    trains: bool,
) -> None:
    """Refuse a fit that is too large for this machine; raises ``MemoryTooSmall`` and ``DiskTooSmall``."""
    classifier, regulator, inspector = structure.classifier, structure.purifier, structure.detector
    assert isinstance(regulator, Regulator)
    assert isinstance(inspector, Inspector)
    image, noise_on = torch.full((1, *classifier.image_shape), 0.5), torch.ones(())
    regulator.train(trains)
    trained_pass = saved_bytes(lambda x: regulator.reconstruct(x, noise_on), image) if trains else 0
    regulator.eval()
    size = FitSize(
        image_shape=classifier.image_shape,
        fit=len(dataset.fit.targets),
        validation=len(dataset.validation.targets),
        test=len(dataset.test.targets),
        classes=classifier.classes,
        attacks=len(plan.attacks),
        examples=plan.examples,
        validation_examples=plan.validation_examples,
        test_examples=plan.test_examples,
        negatives=plan.inspector.negatives,
        batch_size=plan.regulator.batch_size,
        features=inspector.config.features,
        regulator_pass=trained_pass,
        classifier_pass=saved_bytes(classifier, image),
        regulator_weights=weight_bytes(regulator),
        classifier_weights=weight_bytes(classifier),
        inspector_weights=weight_bytes(inspector),
    )
    device_memory = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
    check_memory(size, available=memory_available(), device_available=device_memory)
    check_disk(size, job.folder, kept=job.size)


def _publish(
    root: Path,
    job: FitJob,
    fitted: Fitted,
    graph: onnx.ModelProto,
    draft: Draft,
    reused: PublishedRegulator | None,
    device: torch.device,
) -> Manifest:
    payload = job.folder / "payload"
    shutil.rmtree(payload, ignore_errors=True)
    try:
        defense = payload / "defense"
        save_protected(fitted.protected, defense / CHECKPOINT)
        save_graph(graph, defense / GRAPH)
        reference = reused.reference if reused else _publish_regulator(root, job, fitted, draft, payload / "regulator")
        assert draft.parent is not None
        complete = draft.model_copy(update={"options": {**draft.options, "regulator_version": reference}})
        write_scores(fitted.calibration_scores.numpy(), defense / CALIBRATION)
        write_report(fitted, defense, name=draft.parent.name, draft=complete, device=device)
        return Store.open(root / MODELS).publish(draft.parent.name, complete, defense)
    finally:
        shutil.rmtree(payload, ignore_errors=True)


def _publish_regulator(root: Path, job: FitJob, fitted: Fitted, draft: Draft, folder: Path) -> str:
    """Publish a Regulator on its own, unless this fit did so before it was killed; return NAME@VERSION."""
    regulator = fitted.protected.purifier
    assert isinstance(regulator, Regulator)
    assert draft.data is not None
    name = regulator_name(draft.data.name, draft.input.shape)
    published = _published(root / REGULATORS, name, job)
    if published is None:
        folder.mkdir()
        save_regulator(regulator, folder)
        published = Store.open(root / REGULATORS).publish(name, regulator_draft(draft), folder)
    return f"{name}@{published.version}"


def _published(folder: Path, name: str, job: FitJob) -> Manifest | None:
    """Return the version that this fit published before it was killed, if it did."""
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
