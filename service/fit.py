"""Fitting a defense for a registered classifier and publishing it."""

import json
import math
import re
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import onnx
import torch

from defenses.checkpoint import save_protected, save_regulator
from defenses.classifier import Classifier
from defenses.coophance import (
    FitPlan,
    Fitted,
    Inspector,
    InspectorConfig,
    LabelledImages,
    Regulator,
    Splits,
    fit_coophance,
)
from defenses.evaluation import Progress
from defenses.onnx_export import check_export, export_protected, save_graph
from defenses.protected import ProtectedClassifier
from model_store import AttackRecord, DataRecord, Draft, FalsePositiveRate, Fetched, Manifest, Parent, Store
from service.datasets import Dataset
from service.libraries import library_versions
from service.repository import MODELS
from service.served import GRAPH

REGULATORS = "regulators"
"""The folder of the store that keeps Regulators, beside the models."""

CHECKPOINT = "checkpoint"


class DeviceMissing(ValueError):
    """A fit was asked to run on a device that is not here."""

    def __init__(self, device: str) -> None:
        self.device = device
        super().__init__(f"Asked to fit on {device}, but torch finds no such device here.")


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
    device: Literal["auto", "cpu", "cuda"] = "auto",
    progress: Progress,
    command: str = "",
) -> Manifest:
    """Fit CoopHANCE for a classifier and publish it as the next version of its name.

    ``root`` is the store's folder. Nothing is published unless every step succeeds: then the Regulator on its own,
    named after the data set, and after it the defense. Raises what ``defenses.coophance.fit_coophance`` raises,
    ``DeviceMissing``, ``ExportBroken``, and the store's errors.
    """
    module = Classifier.load(classifier.folder / GRAPH)
    plan = replace(plan, layer=plan.layer or classifier.manifest.layers.get("tap"))
    _rehearse_export(module, plan)
    fitted = fit_coophance(module, _splits(dataset), plan, device=_device(device), progress=progress)
    progress("export", 0, 1)
    graph = export_protected(fitted.protected)
    check_export(graph, fitted.protected, torch.from_numpy(dataset.test.images[:8]).float() / 255)
    progress("export", 1, 1)
    return _publish(root, fitted, graph, _draft(classifier, dataset, plan, fitted, command))


def _rehearse_export(classifier: Classifier, plan: FitPlan) -> None:
    """Export an unfitted defense, so that a classifier whose graph does not allow it fails before the training."""
    classifier.eval()
    layer = classifier.resolve_layer(plan.layer) if plan.layer else classifier.tap
    inspector = Inspector(InspectorConfig(layer.name, math.prod(layer.shape), classifier.classes, plan.inspects))
    regulator = Regulator(plan.regulator_config(classifier.image_shape))
    protected = ProtectedClassifier(classifier, regulator, inspector, 0.0).eval()
    check_export(export_protected(protected), protected, torch.full((2, *classifier.image_shape), 0.5))


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


def regulator_name(dataset: str, shape: Sequence[int]) -> str:
    """Return the name that a Regulator of a data set is published under, such as ``cifar10-3x32x32``."""
    stem = re.sub(r"[^a-z0-9]+", "-", dataset.lower()).strip("-") or "images"
    return f"{stem[:40]}-{'x'.join(str(side) for side in shape)}"


def _draft(classifier: Fetched, dataset: Dataset, plan: FitPlan, fitted: Fitted, command: str) -> Draft:
    splits = {"fit": dataset.fit, "calibration": dataset.calibration, "test": dataset.test}
    counts = {name: len(split.targets) for name, split in splits.items()}
    manifest = classifier.manifest
    return Draft(
        kind="coophance",
        input=manifest.input,
        labels=manifest.labels,
        layers={**manifest.layers, "tap": fitted.layer.name},
        parent=Parent(name=manifest.name, version=manifest.version, digest=classifier.digest),
        threshold=float(fitted.protected.threshold),
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
        options=_options(plan, fitted),
        libraries=library_versions(),
        seed=plan.seed,
        command=command,
    )


def _options(plan: FitPlan, fitted: Fitted) -> dict[str, Any]:
    trained = fitted.regulator
    options = {
        "plan": asdict(plan),
        "regulator": trained.regulator.config.as_json(),
        "training": {
            **asdict(fitted.training),
            "sample_loss": trained.sample_loss,
            "final_loss": trained.final_loss,
        },
        "inspector": asdict(fitted.inspector),
    }
    plain: dict[str, Any] = json.loads(json.dumps(options))
    return plain


def _publish(root: Path, fitted: Fitted, graph: onnx.ModelProto, draft: Draft) -> Manifest:
    regulator = fitted.protected.purifier
    assert isinstance(regulator, Regulator)
    assert draft.parent is not None
    assert draft.data is not None
    with tempfile.TemporaryDirectory(prefix="portcullis-fit-") as temporary:
        alone, defense = Path(temporary) / "regulator", Path(temporary) / "defense"
        alone.mkdir()
        save_regulator(regulator, alone)
        save_protected(fitted.protected, defense / CHECKPOINT)
        save_graph(graph, defense / GRAPH)
        name = regulator_name(draft.data.name, draft.input.shape)
        published = Store.open(root / REGULATORS).publish(name, _regulator_draft(draft), alone)
        options = {**draft.options, "regulator_version": f"{name}@{published.version}"}
        complete = draft.model_copy(update={"options": options})
        return Store.open(root / MODELS).publish(draft.parent.name, complete, defense)


def _regulator_draft(draft: Draft) -> Draft:
    """Return the part of a defense's draft that holds for its Regulator alone."""
    return Draft(
        kind="regulator",
        input=draft.input,
        labels=draft.labels,
        data=draft.data,
        attacks=draft.attacks,
        options={name: draft.options[name] for name in ("plan", "regulator", "training")},
        libraries=draft.libraries,
        seed=draft.seed,
        command=draft.command,
    )


def _splits(dataset: Dataset) -> Splits:
    parts = (dataset.fit, dataset.calibration, dataset.test)
    return Splits(*(LabelledImages(torch.from_numpy(part.images), torch.from_numpy(part.targets)) for part in parts))


def _device(name: Literal["auto", "cpu", "cuda"]) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise DeviceMissing(name)
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
