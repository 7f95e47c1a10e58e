"""What is recorded about a fitted defense, and about its Regulator."""

import json
from dataclasses import asdict
from typing import Any

from defenses.coophance import FitPlan, Fitted, Regulator
from model_store import AttackRecord, DataRecord, Draft, FalsePositiveRate, Fetched, Parent
from service.datasets import Dataset
from service.libraries import library_versions

FIT = "fit"
"""The option that names the fit which published a version: a fit that was killed finds by it what it published."""


def defense_draft(
    classifier: Fetched, dataset: Dataset, plan: FitPlan, fitted: Fitted, *, fit: str, command: str
) -> Draft:
    """Return what is recorded about a defense; ``fit`` is the id of the fit that made it."""
    splits = {
        "fit": dataset.fit,
        "validation": dataset.validation,
        "calibration": dataset.calibration,
        "test": dataset.test,
    }
    counts = {name: len(split.targets) for name, split in splits.items()}
    manifest, threshold = classifier.manifest, fitted.protected.threshold.tolist()
    return Draft(
        kind="coophance",
        input=manifest.input,
        labels=manifest.labels,
        layers={**manifest.layers, "tap": fitted.layer.name},
        parent=Parent(name=manifest.name, version=manifest.version, digest=classifier.digest),
        threshold=threshold if isinstance(threshold, float) else tuple(threshold),
        false_positive_rate=FalsePositiveRate(
            budget=plan.budget,
            calibrated_on=counts["calibration"],
            realised=fitted.metrics["false_positive_rate"],
            evaluated_on=counts["test"],
        ),
        data=DataRecord(name=dataset.name, digest=dataset.digest, split_seed=dataset.split_seed, counts=counts),
        attacks=tuple(
            AttackRecord(
                name=each.attack.name,
                parameters=dict(each.attack.parameters),
                examples=int(each.fooled.sum()),
                success_rate=each.success_rate,
            )
            for each in fitted.examples
        ),
        metrics=fitted.metrics,
        options={**_options(plan, fitted), FIT: fit},
        libraries=library_versions(),
        seed=plan.seed,
        command=command,
    )


def regulator_draft(draft: Draft) -> Draft:
    """Return the part of a defense's draft that holds for its Regulator alone."""
    return Draft(
        kind="regulator",
        input=draft.input,
        labels=draft.labels,
        data=draft.data,
        attacks=draft.attacks,
        options={name: draft.options[name] for name in ("plan", "regulator", "training", FIT)},
        libraries=draft.libraries,
        seed=draft.seed,
        command=draft.command,
    )


def _options(plan: FitPlan, fitted: Fitted) -> dict[str, Any]:
    regulator = fitted.protected.purifier
    assert isinstance(regulator, Regulator)
    options: dict[str, Any] = {
        "plan": asdict(plan),
        "regulator": regulator.config.as_json(),
        "selection": fitted.selection.as_json(),
        "inspector": asdict(fitted.inspector),
        "seconds": dict(fitted.seconds),
    }
    if fitted.training is not None and fitted.trained is not None:
        options["training"] = {**asdict(fitted.training), "curves": fitted.trained.curves}
    plain: dict[str, Any] = json.loads(json.dumps(options))
    return plain
