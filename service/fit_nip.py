"""Fitting NIP for a registered classifier and publishing it."""

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from defenses.attacks import attack
from defenses.detector import NoDetector
from defenses.evaluation import Progress
from defenses.footprint import saved_bytes, weight_bytes
from defenses.nip import (
    FittedNip,
    InversePerturbation,
    InversePerturbationConfig,
    NipPlan,
    check_layer,
    check_size,
    fit_nip,
    head_behind,
)
from defenses.protected import ProtectedClassifier
from defenses.splits import Splits
from defenses.stages import Stages
from model_store import Draft, Fetched, Manifest
from service.datasets import Dataset
from service.fit import Subject, fit_and_publish
from service.fit_draft import nip_draft
from service.fit_job import FitJob
from service.fit_size import NipSize
from service.hardware import DeviceName, find_device

logger = logging.getLogger("portcullis")


def publish_nip(
    root: Path,
    classifier: Fetched,
    dataset: Dataset,
    plan: NipPlan,
    *,
    device: DeviceName = "auto",
    fresh: bool = False,
    progress: Progress,
    notice: Callable[[str], None] = logger.warning,
    command: str = "",
) -> Manifest:
    """Fit NIP for a classifier and publish it as the next version of its name (see ``fit_and_publish``).

    Where the plan names no layer it is the one that the classifier was registered with. Raises what
    ``fit_and_publish`` and ``defenses.nip.fit_nip`` raise, ``HeadUnsuitable`` before anything is computed, and
    ``DeviceMissing``.
    """
    subject = Subject.open(classifier, dataset)
    plan = replace(plan, layer=plan.layer or classifier.manifest.layers.get("head"))
    place = find_device(device)
    for text in plan.attacks:
        attack(text)
    method = _Nip(subject, plan, _planned(subject, plan))
    return fit_and_publish(
        root, subject, method, device=place, fresh=fresh, progress=progress, notice=notice, command=command
    )


def _planned(subject: Subject, plan: NipPlan) -> InversePerturbationConfig:
    """Return what a plan makes of a classifier's layer.

    Raises ``LayerNotFound``, ``LayerUnsuitable`` and ``PoolTooLarge``.
    """
    classifier = subject.classifier
    layer = classifier.resolve_layer(plan.layer) if plan.layer else classifier.head_layer
    check_layer(layer, plan.k1, plan.k2)
    candidates = min(plan.pool_size, len(subject.dataset.fit.targets))
    config = InversePerturbationConfig.planned(plan, classifier, layer, candidates)
    check_size(config)
    return config


@dataclass(frozen=True)
class _Nip:
    """NIP as a ``service.fit.Method``; ``config`` is what the plan makes of the classifier."""

    subject: Subject
    plan: NipPlan
    config: InversePerturbationConfig

    def identity(self) -> dict[str, Any]:
        return {"nip": asdict(self.plan)}

    def structure(self) -> ProtectedClassifier:
        """Return the protected classifier with a pool of two candidates that move nothing."""
        classifier = self.subject.classifier
        head = head_behind(classifier, classifier.resolve_layer(self.config.layer))
        purifier = InversePerturbation(replace(self.config, candidates=2), head)
        purifier.check_exportable()
        return ProtectedClassifier(classifier, purifier, NoDetector()).eval()

    def size(self, structure: ProtectedClassifier) -> NipSize:
        classifier, plan = structure.classifier, self.plan
        return NipSize(
            image_shape=classifier.image_shape,
            test=len(self.subject.dataset.test.targets),
            attacks=len(plan.attacks),
            test_examples=plan.test_examples,
            batch_size=plan.batch_size,
            candidates=self.config.candidates,
            pool=self.config.pool_bytes,
            classifier_pass=saved_bytes(classifier, torch.full((1, *classifier.image_shape), 0.5)),
            classifier_weights=weight_bytes(classifier),
        )

    def fit(self, splits: Splits, stages: Stages, device: torch.device, progress: Progress) -> FittedNip:
        return fit_nip(self.subject.classifier, splits, self.plan, stages=stages, device=device, progress=progress)

    def draft(self, fitted: FittedNip, *, fit: str, command: str) -> Draft:
        subject = self.subject
        return nip_draft(subject.fetched, subject.dataset, self.plan, fitted, fit=fit, command=command)

    def complete(self, fitted: FittedNip, draft: Draft, job: FitJob, folder: Path) -> Draft:
        """Return the draft as it is: graph and checkpoint are all that is published."""
        return draft
