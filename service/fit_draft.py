"""What is recorded about a fitted defense, and about its Regulator."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from math import ceil
from typing import Any

from defenses.attacks import AdversarialExamples
from defenses.baselines import BaselinePlan, FittedBaseline
from defenses.coophance import FitPlan, Fitted, Regulator
from defenses.nip import (
    FittedGate,
    FittedNip,
    FittedResponse,
    GatedPlan,
    InverseCorrection,
    InversePerturbation,
    NipPlan,
    Pushing,
    ResponsePlan,
)
from model_store import AttackRecord, DataRecord, Draft, FalsePositiveRate, Fetched, Manifest, Parent
from service.datasets import Dataset
from service.libraries import library_versions

FIT = "fit"
"""The option that names the fit which published a version: a fit that was killed finds by it what it published."""


def coophance_draft(
    classifier: Fetched, dataset: Dataset, plan: FitPlan, fitted: Fitted, *, fit: str, command: str
) -> Draft:
    """Return what is recorded about a CoopHANCE defense; ``fit`` is the id of the fit that made it."""
    threshold = fitted.protected.threshold.tolist()
    return Draft(
        **_common(classifier, dataset, {"tap": fitted.layer.name}),
        kind="coophance",
        threshold=threshold if isinstance(threshold, float) else tuple(threshold),
        false_positive_rate=FalsePositiveRate(
            budget=plan.budget,
            calibrated_on=len(dataset.calibration.targets),
            realised=fitted.metrics["false_positive_rate"],
            evaluated_on=len(dataset.test.targets),
        ),
        attacks=_attacks(fitted.examples),
        metrics=fitted.metrics,
        options={**_coophance_options(plan, fitted), FIT: fit},
        seed=plan.seed,
        command=command,
    )


def nip_draft(
    classifier: Fetched, dataset: Dataset, plan: NipPlan, fitted: FittedNip, *, fit: str, command: str
) -> Draft:
    """Return what is recorded about a NIP defense, which was fitted on no attack and has no threshold."""
    return Draft(
        **_common(classifier, dataset, {"head": fitted.layer.name}),
        kind="nip",
        metrics=fitted.metrics,
        options={**_nip_options(plan, fitted), FIT: fit},
        seed=plan.seed,
        command=command,
    )


def response_draft(
    classifier: Fetched, dataset: Dataset, plan: ResponsePlan, fitted: FittedResponse, *, fit: str, command: str
) -> Draft:
    """Return what is recorded about a defense by response, which was fitted on no attack and has no threshold."""
    pushing = fitted.protected.purifier
    assert isinstance(pushing, Pushing)
    options = {
        "plan": asdict(plan),
        "configuration": pushing.config.as_json(),
        "response": fitted.response.as_json(),
        "substitute": fitted.substitute,
        "findings": loss_findings(fitted.response.images, plan.accuracy_loss),
        "seconds": dict(fitted.seconds),
    }
    return Draft(
        **_common(classifier, dataset, {"head": fitted.layer.name} if fitted.layer else {}),
        kind="nip",
        metrics=fitted.metrics,
        options={**_plain(options), FIT: fit},
        seed=plan.seed,
        command=command,
    )


def gated_draft(
    classifier: Fetched,
    dataset: Dataset,
    plan: GatedPlan,
    fitted: FittedGate,
    inspector: str,
    *,
    fit: str,
    command: str,
) -> Draft:
    """Return what is recorded about a correction behind the alerts of ``inspector``, as NAME@VERSION."""
    corrector, detector = fitted.protected.corrector, fitted.protected.detector
    assert isinstance(corrector, InverseCorrection)
    assert detector.layer is not None
    options = {
        "plan": asdict(plan),
        "configuration": corrector.config.as_json(),
        "gate": fitted.gate.as_json(),
        "inspector": inspector,
        "findings": loss_findings(fitted.gate.images, plan.accuracy_loss),
        "seconds": dict(fitted.seconds),
    }
    return Draft(
        **_common(classifier, dataset, {"head": fitted.layer.name, "tap": detector.layer}),
        kind="nip",
        threshold=fitted.gate.threshold,
        false_positive_rate=FalsePositiveRate(
            budget=plan.budget,
            calibrated_on=fitted.gate.images,
            realised=fitted.metrics["false_positive_rate"],
            evaluated_on=len(dataset.test.targets),
        ),
        attacks=_attacks(fitted.examples),
        metrics=fitted.metrics,
        options={**_plain(options), FIT: fit},
        seed=plan.seed,
        command=command,
    )


def baseline_draft(
    classifier: Fetched, dataset: Dataset, plan: BaselinePlan, fitted: FittedBaseline, *, fit: str, command: str
) -> Draft:
    """Return what is recorded about a baseline, which has a threshold where it detects."""
    scores = fitted.calibration_scores
    options = {"plan": asdict(plan), "configuration": fitted.config.as_json(), "seconds": dict(fitted.seconds)}
    rate = None
    if scores is not None:
        rate = FalsePositiveRate(
            budget=plan.budget,
            calibrated_on=len(scores),
            realised=fitted.metrics["false_positive_rate"],
            evaluated_on=len(dataset.test.targets),
        )
    return Draft(
        **_common(classifier, dataset, {}),
        kind="baseline",
        threshold=None if scores is None else float(fitted.protected.threshold),
        false_positive_rate=rate,
        attacks=_attacks(fitted.examples),
        metrics=fitted.metrics,
        options={**_plain(options), FIT: fit},
        seed=plan.seed,
        command=command,
    )


def nip_findings(fitted: FittedNip) -> list[str]:
    """Return a sentence for each thing in a fit that whoever fitted it should know; often none."""
    told, sizes, strength = [], fitted.template_sizes, fitted.strength
    purifier = fitted.protected.purifier
    assert isinstance(purifier, InversePerturbation)
    if fitted.empty_template and purifier.config.similarity == "index":
        one = len(sizes) == 1
        empty = "template is" if one else f"templates of {sizes.count(0)} of {len(sizes)} classes are"
        told.append(
            f"The {empty} empty, so that every image{'' if one else ' that is given such a class'} is moved by the "
            "same candidate, the first: --template frequency with a smaller --template-share, or "
            "--similarity influence, tells images apart."
        )
    if strength.within is False:
        kept = next(each.accuracy for each in strength.tried if each.amplitude == strength.amplitude)
        told.append(
            f"The smallest amplitude that was tried, {strength.amplitude:g}, costs "
            f"{100 * (strength.undefended_accuracy - kept):.1f} points of accuracy on the validation images, more than "
            "allowed: smaller --amplitudes cost less."
        )
    return told


def loss_findings(images: int, accuracy_loss: float) -> list[str]:
    """Return a sentence where so many calibration images are too few to keep a share of clean accuracy by; else none.

    Of an event that is never seen in n images the 95 % bound is 3 / n (the rule of three).
    """
    if not accuracy_loss or images * accuracy_loss >= 3:
        return []
    return [
        f"A loss of at most {100 * accuracy_loss:g} points was kept on {images} calibration images, too few to promise "
        f"it for new ones: expected {ceil(round(3 / accuracy_loss, 6))} or more, or a larger --accuracy-loss."
    ]


def findings_of(manifest: Manifest) -> list[str]:
    """Return the findings that are on record of a version; none where it says nothing of any."""
    found = manifest.options.get("findings")
    return [str(each) for each in found] if isinstance(found, list) else []


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


def _coophance_options(plan: FitPlan, fitted: Fitted) -> dict[str, Any]:
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
    return _plain(options)


def _nip_options(plan: NipPlan, fitted: FittedNip) -> dict[str, Any]:
    purifier = fitted.protected.purifier
    assert isinstance(purifier, InversePerturbation)
    options = {
        "plan": asdict(plan),
        "configuration": purifier.config.as_json(),
        "strength": fitted.strength.as_json(),
        "template_sizes": fitted.template_sizes,
        "left_out": fitted.left_out,
        "findings": nip_findings(fitted),
        "seconds": dict(fitted.seconds),
    }
    return _plain(options)


def _attacks(examples: Sequence[AdversarialExamples]) -> tuple[AttackRecord, ...]:
    return tuple(
        AttackRecord(
            name=each.attack.name,
            parameters=dict(each.attack.parameters),
            examples=int(each.fooled.sum()),
            success_rate=each.success_rate,
        )
        for each in examples
    )


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    """Return options as they are read back from JSON."""
    plain: dict[str, Any] = json.loads(json.dumps(options))
    return plain


def _common(classifier: Fetched, dataset: Dataset, layers: dict[str, str]) -> dict[str, Any]:
    """Return the fields that say for what and on what a defense was fitted; ``layers`` are those that it looks at."""
    splits = {
        "fit": dataset.fit,
        "validation": dataset.validation,
        "calibration": dataset.calibration,
        "test": dataset.test,
    }
    counts = {name: len(split.targets) for name, split in splits.items()}
    manifest = classifier.manifest
    return {
        "input": manifest.input,
        "labels": manifest.labels,
        "layers": {**manifest.layers, **layers},
        "parent": Parent(name=manifest.name, version=manifest.version, digest=classifier.digest),
        "data": DataRecord(name=dataset.name, digest=dataset.digest, split_seed=dataset.split_seed, counts=counts),
        "libraries": library_versions(),
    }
