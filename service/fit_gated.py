"""Fitting a correction behind the alerts of a published CoopHANCE version, and publishing it."""

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import onnx
import torch

from defenses.attacks import attack_to_fit
from defenses.calibration import check_budget
from defenses.evaluation import Progress
from defenses.footprint import saved_bytes, weight_bytes
from defenses.judge import AlertedAnswer
from defenses.nip import (
    FittedGate,
    GatedPlan,
    InspectorMissing,
    InverseCorrection,
    check_correction,
    export_correction,
    fit_gated,
    gated_parts,
)
from defenses.onnx_export import save_graph
from defenses.protected import ProtectedClassifier
from defenses.splits import Splits
from defenses.stages import Stages
from model_store import Draft, Fetched, Manifest, NameInvalid, Store, parse_reference
from service.datasets import Dataset
from service.defended import load_defended
from service.fit import Subject, fit_and_publish
from service.fit_draft import gated_draft
from service.fit_job import FitJob
from service.fit_size import MeasuredSize
from service.fit_splits import OtherSplits
from service.hardware import DeviceName, find_device
from service.p_values import CALIBRATION, write_scores
from service.repository import MODELS
from service.served import CORRECTION

logger = logging.getLogger("portcullis")


class OtherClassifier(ValueError):
    """An Inspector was fitted for another classifier than the one that is to be defended."""

    def __init__(self, reference: str, fitted: str, wanted: str) -> None:
        super().__init__(f"Expected an Inspector that was fitted for {wanted}, but {reference} was for {fitted}.")


def publish_gated(
    root: Path,
    classifier: Fetched,
    dataset: Dataset,
    plan: GatedPlan,
    inspector: str,
    *,
    device: DeviceName = "auto",
    fresh: bool = False,
    progress: Progress,
    notice: Callable[[str], None] = logger.warning,
    command: str = "",
) -> Manifest:
    """Fit a correction behind an Inspector's alerts and publish it as the next version (see ``fit_and_publish``).

    ``inspector``, as NAME@VERSION, is a version of kind coophance for the same classifier, whose Regulator and
    Inspector are used, fitted on the same splits where on the same images. Where the plan names no layer it is the one
    that the classifier was registered with. Before anything is computed raises what ``fit_and_publish``,
    ``defenses.nip.fit_gated`` and ``load_defended`` raise, ``AttackUnsuitable``, ``NameInvalid`` for a reference
    without a number, ``OtherClassifier``, ``OtherSplits``, ``InspectorMissing``, ``HeadUnsuitable``,
    ``GradientUnsupported``, ``ExportBroken`` and ``DeviceMissing``.
    """
    subject = Subject.open(classifier, dataset)
    plan = replace(plan, layer=plan.layer or classifier.manifest.layers.get("head"))
    place = find_device(device)
    for text in plan.attacks:
        attack_to_fit(text)
    check_budget(len(dataset.calibration.targets), plan.budget)
    fetched, inspected = _inspected(Store.open(root / MODELS), inspector)
    parent, own = fetched.manifest.parent, classifier.manifest
    if parent is None or parent.digest != classifier.digest:
        fitted = f"{parent.name}@{parent.version}" if parent else "none that is known"
        raise OtherClassifier(inspector, fitted, f"{own.name}@{own.version}")
    if data := fetched.manifest.data:
        if data.digest != dataset.digest:
            notice(f"{inspector} was fitted on other images than these, so that it may know some of these.")
        elif data.split_seed != dataset.split_seed:
            raise OtherSplits(inspector, data.split_seed, dataset.split_seed)
    reference = f"{fetched.manifest.name}@{fetched.manifest.version}"
    return fit_and_publish(
        root,
        subject,
        _Gated(subject, plan, inspected, reference, fetched.digest),
        device=place,
        fresh=fresh,
        progress=progress,
        notice=notice,
        command=command,
    )


def _inspected(store: Store, reference: str) -> tuple[Fetched, ProtectedClassifier]:
    """Fetch the version whose Inspector is used; raises ``NameInvalid``, ``InspectorMissing``, the store's errors."""
    name, version = parse_reference(reference)
    if not isinstance(version, int):
        raise NameInvalid(reference, "an Inspector is that of a version given as NAME@VERSION, such as resnet20@2")
    kind = store.manifest(name, version).kind
    if kind != "coophance":
        raise InspectorMissing(f"{reference}, which is of kind {kind}")
    return load_defended(store, name, version)


@dataclass(frozen=True)
class _Gated:
    """A gated correction as a ``service.fit.Method``; ``inspected`` is the defense whose alerts it answers."""

    subject: Subject
    plan: GatedPlan
    inspected: ProtectedClassifier
    reference: str
    digest: str

    def identity(self) -> dict[str, Any]:
        return {"gated": asdict(self.plan), "inspector": f"{self.reference} {self.digest}"}

    def structure(self) -> ProtectedClassifier:
        """Return the protected classifier before anything is fitted; its correction can be exported."""
        inspector, corrector = gated_parts(self.inspected, self.plan)
        classifier = self.inspected.classifier
        self.exported(corrector)
        return ProtectedClassifier(
            classifier, self.inspected.purifier, inspector, 0.0, judge=AlertedAnswer(), corrector=corrector
        ).eval()

    def size(self, structure: ProtectedClassifier) -> MeasuredSize:
        classifier, plan, dataset = structure.classifier, self.plan, self.subject.dataset
        fitted = min(plan.validation_examples, len(dataset.validation.targets))
        measured = min(plan.test_examples, len(dataset.test.targets))
        return MeasuredSize(
            image_shape=classifier.image_shape,
            examples=len(plan.attacks) * (fitted + measured),
            batch_size=plan.batch_size,
            classifier_pass=saved_bytes(classifier, torch.full((1, *classifier.image_shape), 0.5)),
            weights=3 * weight_bytes(classifier) + weight_bytes(structure.purifier) + weight_bytes(structure.detector),
        )

    def fit(self, splits: Splits, stages: Stages, device: torch.device, progress: Progress) -> FittedGate:
        return fit_gated(self.inspected, splits, self.plan, stages=stages, device=device, progress=progress)

    def draft(self, fitted: FittedGate, *, fit: str, command: str) -> Draft:
        subject = self.subject
        return gated_draft(
            subject.fetched, subject.dataset, self.plan, fitted, self.reference, fit=fit, command=command
        )

    def complete(self, fitted: FittedGate, draft: Draft, job: FitJob, folder: Path) -> Draft:
        """Write the graph that corrects, and the calibration scores."""
        corrector = fitted.protected.corrector
        assert isinstance(corrector, InverseCorrection)
        save_graph(self.exported(corrector), folder / CORRECTION)
        write_scores(fitted.calibration_scores.numpy(), folder / CALIBRATION)
        return draft

    def exported(self, corrector: InverseCorrection) -> onnx.ModelProto:
        """Return the graph that corrects, which says of eight images what torch does; raises ``ExportBroken``."""
        classifier = self.inspected.classifier.cpu()
        graph = export_correction(corrector, classifier)
        images = torch.from_numpy(self.subject.dataset.test.images[:8]).float() / 255
        with torch.no_grad():
            check_correction(graph, corrector, images, classifier(images))
        return graph
