"""Fitting CoopHANCE for a registered classifier and publishing it."""

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from defenses.attacks import attack_to_fit
from defenses.calibration import check_budget
from defenses.checkpoint import save_regulator
from defenses.coophance import FitPlan, Fitted, Inspector, Regulator, fit_coophance
from defenses.evaluation import Progress
from defenses.footprint import saved_bytes, weight_bytes
from defenses.protected import ProtectedClassifier
from defenses.splits import Splits
from defenses.stages import Stages
from model_store import Draft, Fetched, Manifest, Store
from service.datasets import Dataset
from service.fit import Subject, fit_and_publish, published_by
from service.fit_draft import coophance_draft, regulator_draft
from service.fit_job import FitJob
from service.fit_report import write_report
from service.fit_size import CoophanceSize
from service.fit_splits import check_splits
from service.hardware import DeviceName, find_device
from service.p_values import CALIBRATION, write_scores
from service.regulators import REGULATORS, PublishedRegulator, find_regulator, other_data_told, regulator_name

logger = logging.getLogger("portcullis")


def publish_coophance(
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
    """Fit CoopHANCE for a classifier and publish it as the next version of its name (see ``fit_and_publish``).

    First the Regulator is published on its own, named after the data set, and after it the defense. ``regulator``, as
    NAME@VERSION, is one that is used again, fitted on the same splits where on the same images, unless those hold a
    test part out; ``notice`` is also called when it was fitted on other data.

    Raises what ``fit_and_publish``, ``defenses.coophance.fit_coophance`` and ``service.regulators.find_regulator``
    raise, ``OtherSplits``, and ``DeviceMissing``.
    """
    subject = Subject.open(classifier, dataset)
    layer = plan.inspector.layer or classifier.manifest.layers.get("tap")
    plan = replace(plan, inspector=replace(plan.inspector, layer=layer))
    place = find_device(device)
    if regulator is None:
        # A fit that is taken up on another machine is another fit where that trains in another precision.
        plan = replace(plan, regulator=plan.regulator.settled(place))
    _check_plan(subject, plan)
    reused = find_regulator(root, regulator, classifier.manifest.input) if regulator else None
    if reused:
        check_splits(reused.reference, reused.manifest.data, dataset)
        if told := other_data_told(reused, dataset.name, dataset.digest):
            notice(told)
    method = _Coophance(root, subject, plan, reused, place)
    return fit_and_publish(
        root, subject, method, device=place, fresh=fresh, progress=progress, notice=notice, command=command
    )


def _check_plan(subject: Subject, plan: FitPlan) -> None:
    """Refuse what cannot be, before anything is computed.

    Raises ``CalibrationTooSmall``, ``AttackUnknown``, ``AttackUnsuitable``, ``LayerNotFound``, and ``ValueError`` for
    a budget beyond (0, 1).
    """
    check_budget(len(subject.dataset.calibration.targets), plan.budget)
    for text in plan.attacks:
        attack_to_fit(text)
    if plan.inspector.layer:
        subject.classifier.resolve_layer(plan.inspector.layer)


@dataclass(frozen=True)
class _Coophance:
    """CoopHANCE as a ``service.fit.Method``; ``reused`` is a Regulator that is used as it is."""

    root: Path
    subject: Subject
    plan: FitPlan
    reused: PublishedRegulator | None
    device: torch.device

    def identity(self) -> dict[str, Any]:
        reused = self.reused
        return {"plan": asdict(self.plan), "regulator": f"{reused.reference} {reused.digest}" if reused else None}

    def structure(self) -> ProtectedClassifier:
        """Return the protected classifier before anything is fitted; its score is 0 for every image."""
        classifier, plan = self.subject.classifier, self.plan
        layer = classifier.resolve_layer(plan.inspector.layer) if plan.inspector.layer else classifier.tap
        regulator = self.reused.regulator if self.reused else Regulator(plan.regulator.config(classifier.image_shape))
        inspector = Inspector(plan.inspector.config(layer, classifier.classes))
        for parameter in inspector.parameters():
            nn.init.zeros_(parameter)
        return ProtectedClassifier(classifier, regulator, inspector, 0.0).eval()

    def size(self, structure: ProtectedClassifier) -> CoophanceSize:
        classifier, regulator, inspector = structure.classifier, structure.purifier, structure.detector
        plan, dataset, trains = self.plan, self.subject.dataset, self.reused is None
        assert isinstance(regulator, Regulator)
        assert isinstance(inspector, Inspector)
        image, noise_on = torch.full((1, *classifier.image_shape), 0.5), torch.ones(())
        regulator.train(trains)
        trained_pass = saved_bytes(lambda x: regulator.reconstruct(x, noise_on), image) if trains else 0
        regulator.eval()
        return CoophanceSize(
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

    def fit(self, splits: Splits, stages: Stages, device: torch.device, progress: Progress) -> Fitted:
        return fit_coophance(
            self.subject.classifier,
            splits,
            self.plan,
            stages=stages,
            regulator=self.reused.regulator if self.reused else None,
            device=device,
            progress=progress,
        )

    def draft(self, fitted: Fitted, *, fit: str, command: str) -> Draft:
        subject = self.subject
        return coophance_draft(subject.fetched, subject.dataset, self.plan, fitted, fit=fit, command=command)

    def complete(self, fitted: Fitted, draft: Draft, job: FitJob, folder: Path) -> Draft:
        """Publish the Regulator, and write the calibration scores and the report."""
        reference = self.reused.reference if self.reused else self.publish_regulator(fitted, draft, job)
        complete = draft.model_copy(update={"options": {**draft.options, "regulator_version": reference}})
        write_scores(fitted.calibration_scores.numpy(), folder / CALIBRATION)
        write_report(fitted, folder, name=self.subject.name, draft=complete, device=self.device)
        return complete

    def publish_regulator(self, fitted: Fitted, draft: Draft, job: FitJob) -> str:
        """Publish a Regulator on its own, unless this fit did so before it was killed; return NAME@VERSION."""
        regulator = fitted.protected.purifier
        assert isinstance(regulator, Regulator)
        assert draft.data is not None
        name = regulator_name(draft.data.name, draft.input.shape)
        published = published_by(self.root / REGULATORS, name, job)
        if published is None:
            with TemporaryDirectory(dir=job.folder) as folder:
                save_regulator(regulator, Path(folder))
                published = Store.open(self.root / REGULATORS).publish(name, regulator_draft(draft), Path(folder))
        return f"{name}@{published.version}"
