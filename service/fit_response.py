"""Fitting a defense by response for a registered classifier and publishing it."""

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
from defenses.nip import FittedResponse, ResponsePlan, fit_response_defense, response_layer, response_parts
from defenses.protected import ProtectedClassifier
from defenses.splits import Splits
from defenses.stages import Stages
from model_store import Draft, Fetched, Manifest
from service.datasets import Dataset
from service.fit import Subject, fit_and_publish
from service.fit_draft import response_draft
from service.fit_job import FitJob
from service.fit_size import MeasuredSize
from service.hardware import DeviceName, find_device

logger = logging.getLogger("portcullis")


def publish_response(
    root: Path,
    classifier: Fetched,
    dataset: Dataset,
    plan: ResponsePlan,
    *,
    device: DeviceName = "auto",
    fresh: bool = False,
    progress: Progress,
    notice: Callable[[str], None] = logger.warning,
    command: str = "",
) -> Manifest:
    """Fit a defense by response for a classifier and publish it as the next version (see ``fit_and_publish``).

    Where the plan names no layer it is the one that the classifier was registered with. Raises what
    ``fit_and_publish`` and ``defenses.nip.fit_response_defense`` raise, and ``DeviceMissing``.
    """
    subject = Subject.open(classifier, dataset)
    if plan.push == "inverse" and plan.substitute is None:
        plan = replace(plan, layer=plan.layer or classifier.manifest.layers.get("head"))
    place = find_device(device)
    for text in plan.attacks:
        attack(text)
    response_layer(subject.classifier, plan)
    return fit_and_publish(
        root,
        subject,
        _Response(subject, plan),
        device=place,
        fresh=fresh,
        progress=progress,
        notice=notice,
        command=command,
    )


@dataclass(frozen=True)
class _Response:
    """A defense by response as a ``service.fit.Method``."""

    subject: Subject
    plan: ResponsePlan

    def identity(self) -> dict[str, Any]:
        return {"response": asdict(self.plan)}

    def structure(self) -> ProtectedClassifier:
        """Return the protected classifier before anything is settled."""
        classifier = self.subject.classifier
        pushing, judge = response_parts(classifier, self.plan)
        return ProtectedClassifier(classifier, pushing, NoDetector(), judge=judge).eval()

    def size(self, structure: ProtectedClassifier) -> MeasuredSize:
        classifier, plan = structure.classifier, self.plan
        return MeasuredSize(
            image_shape=classifier.image_shape,
            examples=len(plan.attacks) * min(plan.test_examples, len(self.subject.dataset.test.targets)),
            batch_size=plan.batch_size,
            classifier_pass=saved_bytes(classifier, torch.full((1, *classifier.image_shape), 0.5)),
            weights=weight_bytes(classifier) + weight_bytes(structure.purifier),
        )

    def fit(self, splits: Splits, stages: Stages, device: torch.device, progress: Progress) -> FittedResponse:
        return fit_response_defense(
            self.subject.classifier, splits, self.plan, stages=stages, device=device, progress=progress
        )

    def draft(self, fitted: FittedResponse, *, fit: str, command: str) -> Draft:
        subject = self.subject
        return response_draft(subject.fetched, subject.dataset, self.plan, fitted, fit=fit, command=command)

    def complete(self, fitted: FittedResponse, draft: Draft, job: FitJob, folder: Path) -> Draft:
        """Return the draft as it is: graph and checkpoint are all that is published."""
        return draft
