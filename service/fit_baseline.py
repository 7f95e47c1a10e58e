"""Fitting a baseline for a registered classifier and publishing it."""

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from defenses.baselines import METHODS, BaselinePlan, FittedBaseline, check_feasible, fit_baseline
from defenses.evaluation import Progress
from defenses.footprint import saved_bytes, weight_bytes
from defenses.protected import ProtectedClassifier
from defenses.splits import Splits
from defenses.stages import Stages
from model_store import Draft, Fetched, Manifest
from service.datasets import Dataset
from service.fit import Subject, fit_and_publish
from service.fit_draft import baseline_draft
from service.fit_job import FitJob
from service.fit_size import MeasuredSize
from service.hardware import DeviceName, find_device
from service.p_values import CALIBRATION, write_scores

logger = logging.getLogger("portcullis")


def publish_baseline(
    root: Path,
    classifier: Fetched,
    dataset: Dataset,
    plan: BaselinePlan,
    *,
    device: DeviceName = "auto",
    fresh: bool = False,
    progress: Progress,
    notice: Callable[[str], None] = logger.warning,
    command: str = "",
) -> Manifest:
    """Fit a baseline for a classifier and publish it as the next version of its name (see ``fit_and_publish``).

    Raises what ``fit_and_publish`` and ``defenses.baselines.fit_baseline`` raise, and ``DeviceMissing``.
    """
    subject = Subject.open(classifier, dataset)
    place = find_device(device)
    check_feasible(
        plan,
        fit=len(dataset.fit.targets),
        validation=len(dataset.validation.targets),
        calibration=len(dataset.calibration.targets),
    )
    return fit_and_publish(
        root,
        subject,
        _Baseline(subject, plan),
        device=place,
        fresh=fresh,
        progress=progress,
        notice=notice,
        command=command,
    )


@dataclass(frozen=True)
class _Baseline:
    """A baseline as a ``service.fit.Method``."""

    subject: Subject
    plan: BaselinePlan

    def identity(self) -> dict[str, Any]:
        return {"baseline": asdict(self.plan)}

    def structure(self) -> ProtectedClassifier:
        """Return the protected classifier before anything is fitted."""
        classifier = self.subject.classifier
        purifier, detector = self.plan.config(classifier).parts()
        if METHODS[self.plan.method].detects:
            return ProtectedClassifier(classifier, purifier, detector, 0.0).eval()
        return ProtectedClassifier(classifier, purifier, detector).eval()

    def size(self, structure: ProtectedClassifier) -> MeasuredSize:
        classifier, plan = structure.classifier, self.plan
        learns = METHODS[plan.method].learns_attacks
        fitted_on = min(plan.examples, len(self.subject.dataset.fit.targets))
        return MeasuredSize(
            image_shape=classifier.image_shape,
            examples=len(plan.attacks) * fitted_on if learns else 0,
            batch_size=plan.batch_size,
            classifier_pass=saved_bytes(lambda x: structure(x).logits, torch.full((1, *classifier.image_shape), 0.5)),
            weights=weight_bytes(classifier) + weight_bytes(structure.purifier) + weight_bytes(structure.detector),
        )

    def fit(self, splits: Splits, stages: Stages, device: torch.device, progress: Progress) -> FittedBaseline:
        return fit_baseline(self.subject.classifier, splits, self.plan, stages=stages, device=device, progress=progress)

    def draft(self, fitted: FittedBaseline, *, fit: str, command: str) -> Draft:
        subject = self.subject
        return baseline_draft(subject.fetched, subject.dataset, self.plan, fitted, fit=fit, command=command)

    def complete(self, fitted: FittedBaseline, draft: Draft, job: FitJob, folder: Path) -> Draft:
        """Write the calibration scores of one that detects."""
        if fitted.calibration_scores is not None:
            write_scores(fitted.calibration_scores.numpy(), folder / CALIBRATION)
        return draft
