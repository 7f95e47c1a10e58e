"""Evaluating published versions of one classifier."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from defenses.attacks.shards import ExampleCache, code_version
from defenses.coophance import Regulator
from defenses.detector import NoDetector
from defenses.evaluation import Progress
from defenses.evaluation.meter import DefenseResult, Sample
from defenses.evaluation.plan import EvaluationPlan
from defenses.evaluation.run import Evaluation
from defenses.evaluation.substitutes import QueryImages
from service.datasets import Dataset
from service.evaluate import in_seeded_order
from service.evaluation.document import SCHEMA, DefenseReport, EvaluationReport
from service.evaluation.published import beside_published
from service.evaluation.subjects import Subject, undefended
from service.hardware import hardware
from service.libraries import library_versions


@dataclass(frozen=True)
class Evaluated:
    """A report, and examples of its rows to be looked at."""

    report: EvaluationReport
    samples: tuple[Sample, ...]


def evaluate_defenses(
    subjects: Sequence[Subject],
    dataset: Dataset,
    plan: EvaluationPlan,
    *,
    cache: Path,
    minutes: float | None,
    device: torch.device,
    progress: Progress,
    command: str = "",
) -> Evaluated:
    """Evaluate versions of one classifier on a data set's test split, and keep what is crafted in ``cache``.

    Substitutes learn from what the defenses answer to the fit split, and are measured on the validation split. The
    defenses are moved to the device, and their confusion layers switched as the plan says. What is kept there already
    is not crafted again; after ``minutes`` nothing more is begun, and the report is not complete. The same plan on the
    same machine gives the same report but for its times. Raises ``AttackUnknown``, ``SweepUnclear`` and
    ``ScenarioMissing`` before anything is computed, what the attacks and ``distil`` raise, ``StageNotKept``, and
    ``ValueError`` for a classifier that gets nothing right.
    """
    plan.parsed()
    deadline = float("inf") if minutes is None else time.monotonic() + 60 * minutes
    for subject in subjects:
        protected = subject.protected.to(device)
        if plan.confusion is not None and isinstance(protected.purifier, Regulator):
            protected.purifier.set_confusion(plan.confusion)
    first = subjects[0]
    classifier = first.protected.classifier
    evaluation = Evaluation(
        classifier,
        first.classifier.digest,
        undefended(classifier).to(device),
        [(subject.name, subject.fetched.digest, subject.protected) for subject in subjects],
        plan,
        *in_seeded_order(dataset.test, plan.seed),
        device,
        QueryImages(torch.from_numpy(dataset.fit.images), torch.from_numpy(dataset.validation.images)),
    )
    result = evaluation.run(ExampleCache(cache), deadline=deadline, progress=progress)
    manifest = first.classifier.manifest
    report = EvaluationReport(
        schema=SCHEMA,
        classifier={"name": manifest.name, "version": manifest.version, "digest": first.classifier.digest},
        labels=tuple(manifest.labels),
        dataset={"name": dataset.name, "digest": dataset.digest, "split_seed": dataset.split_seed},
        plan=plan,
        attempted=result.attempted,
        complete=result.complete,
        defenses=tuple(_described(subject, found) for subject, found in zip(subjects, result.defenses, strict=True)),
        rows=result.rows,
        sweeps=result.sweeps,
        checks=result.checks,
        published=beside_published(
            result.rows,
            dataset=dataset.name,
            classifier=manifest.name,
            methods={subject.name: subject.method for subject in subjects},
        ),
        code=code_version(),
        libraries=library_versions(),
        hardware=hardware(device),
        command=command,
    )
    return Evaluated(report, result.samples)


def _described(subject: Subject, found: DefenseResult) -> DefenseReport:
    protected = subject.protected
    return DefenseReport(
        name=subject.name,
        kind=subject.manifest.kind,
        method=subject.method,
        digest=subject.fetched.digest,
        threshold=None if isinstance(protected.detector, NoDetector) else protected.threshold.tolist(),
        fitted_on=tuple(each.name for each in subject.manifest.attacks),
        noisy=found.noisy,
        clean=found.clean,
        lottery=found.lottery,
        milliseconds=found.milliseconds,
        bare_milliseconds=found.bare_milliseconds,
    )
