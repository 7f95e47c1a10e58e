"""Fitting CoopHANCE for a registered classifier, from images to a published version."""

import json
import re
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from defenses.attacks import AdversarialExamples, attack, craft
from defenses.calibration import calibrate, check_budget
from defenses.checkpoint import save_protected, save_regulator
from defenses.classifier import Classifier
from defenses.coophance import (
    Augmentation,
    Inspector,
    InspectorConfig,
    InspectorReport,
    Regulator,
    RegulatorConfig,
    TrainedRegulator,
    TrainingPlan,
    fit_inspector,
    fit_regulator,
    steps_in,
)
from defenses.evaluation import Progress, resisted, run_batched
from defenses.onnx_export import check_export, export_protected, save_graph
from defenses.protected import ProtectedClassifier
from model_store import AttackRecord, DataRecord, Draft, FalsePositiveRate, Fetched, Manifest, Parent, Store
from service.datasets import Dataset, Split
from service.libraries import library_versions
from service.repository import MODELS
from service.served import GRAPH

REGULATORS = "regulators"
"""The folder of the store that keeps Regulators, beside the models."""

CHECKPOINT = "checkpoint"


@dataclass(frozen=True)
class FitPlan:
    """Say how a CoopHANCE defense is fitted.

    ``epochs`` of the fitting images train the sample model, unless ``minutes`` of training time are given instead.
    ``examples`` is how many adversarial examples each attack contributes, ``negatives`` how many benign images each
    class contributes at most; ``test_examples`` how many test images each attack is measured on. ``budget`` is the
    false-positive rate that the threshold is calibrated to. ``inverse_penalty`` is the C of the regressions.
    """

    attacks: tuple[str, ...] = ("fgsm", "pgd-stop", "pgd")
    examples: int = 2000
    negatives: int = 2000
    test_examples: int = 300
    epochs: float = 20.0
    minutes: float | None = None
    batch_size: int = 128
    budget: float = 0.05
    form: Literal["batch-norm", "plain"] = "batch-norm"
    confusion: bool = True
    alpha: float = 1.0
    flip: bool = True
    inspects: Literal["raw", "purified"] = "raw"
    layer: str | None = None
    inverse_penalty: float = 1e-3
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"


def fit_coophance(
    root: Path, classifier: Fetched, dataset: Dataset, plan: FitPlan, *, progress: Progress, command: str = ""
) -> Manifest:
    """Fit a Regulator and an Inspector for ``classifier`` and publish them under its name.

    ``root`` is the store's folder. Nothing is published unless every step succeeds: the Regulator is then published
    on its own as well, named after the data set. Raises ``CalibrationTooSmall``, ``LayerNotFound``, ``ExportBroken``,
    ``ValueError`` for a classifier that gets nothing right, and the store's errors.
    """
    return _Fit(root, classifier, dataset, plan, progress, command).publish()


class _Fit:
    def __init__(
        self, root: Path, fetched: Fetched, dataset: Dataset, plan: FitPlan, progress: Progress, command: str
    ) -> None:
        self.root, self.fetched, self.dataset, self.plan = root, fetched, dataset, plan
        self.progress, self.command = progress, command
        self.device = _device(plan.device)
        self.classifier = Classifier.load(fetched.folder / GRAPH).eval().to(self.device)
        layer = plan.layer or fetched.manifest.layers.get("tap")
        self.layer = self.classifier.resolve_layer(layer) if layer else self.classifier.tap
        check_budget(len(dataset.calibration.targets), plan.budget)

    def publish(self) -> Manifest:
        examples = [self._craft(name, self.dataset.fit, self.plan.examples, "fit") for name in self.plan.attacks]
        trained, training = self._fit_regulator(examples)
        inspector, report = self._fit_inspector(trained.regulator, examples)
        protected = ProtectedClassifier(self.classifier, trained.regulator, inspector, float("inf")).eval()
        self.progress("calibrate", 0, 1)
        benign_scores = run_batched(protected, _tensor(self.dataset.calibration), self.device).scores
        threshold = calibrate(benign_scores, self.plan.budget)
        protected = ProtectedClassifier(self.classifier, trained.regulator, inspector, threshold).eval()
        self.progress("calibrate", 1, 1)
        metrics = self._measure(protected)
        draft = Draft(
            kind="coophance",
            input=self.fetched.manifest.input,
            labels=self.fetched.manifest.labels,
            layers={**self.fetched.manifest.layers, "tap": self.layer.name},
            parent=Parent(
                name=self.fetched.manifest.name, version=self.fetched.manifest.version, digest=self.fetched.digest
            ),
            threshold=threshold,
            false_positive_rate=FalsePositiveRate(
                budget=self.plan.budget,
                calibrated_on=len(benign_scores),
                realised=metrics["false_positive_rate"],
                evaluated_on=len(self.dataset.test.targets),
            ),
            data=self._data(),
            attacks=_attack_records(examples),
            metrics=metrics,
            options=self._options(trained, training, inspector, report),
            libraries=library_versions(),
            seed=self.plan.seed,
            command=self.command,
        )
        return self._export_and_publish(protected.cpu(), draft)

    def _craft(self, name: str, split: Split, limit: int, purpose: str) -> AdversarialExamples:
        return craft(
            attack(name),
            self.classifier,
            torch.from_numpy(split.images),
            torch.from_numpy(split.targets),
            limit=limit,
            device=self.device,
            seed=self.plan.seed,
            progress=lambda done, total: self.progress(f"{name} ({purpose})", done, total),
        )

    def _fit_regulator(self, examples: Sequence[AdversarialExamples]) -> tuple[TrainedRegulator, TrainingPlan]:
        plan, images = self.plan, torch.from_numpy(self.dataset.fit.images)
        shape = self.classifier.image_shape
        config = RegulatorConfig(shape) if plan.form == "batch-norm" else RegulatorConfig.plain(shape)
        config = replace(config, confusion=plan.confusion, alpha=plan.alpha)
        training = TrainingPlan(
            steps=max(5, round(plan.epochs * len(images) / plan.batch_size)),
            batch_size=min(plan.batch_size, len(images)),
            augmentation=Augmentation(flip=plan.flip),
            seed=plan.seed,
        )
        if plan.minutes is not None:
            training = replace(training, steps=steps_in(config, training, plan.minutes * 60, device=self.device))
        pairs = [(each.x, each.x_adv) for each in examples]
        trained = fit_regulator(config, images, pairs, training, device=self.device, progress=self.progress)
        return trained, training

    def _fit_inspector(
        self, regulator: Regulator, examples: Sequence[AdversarialExamples]
    ) -> tuple[Inspector, InspectorReport]:
        features = int(np.prod(self.layer.shape))
        config = InspectorConfig(self.layer.name, features, self.classifier.classes, self.plan.inspects)
        quiet = torch.ones((), device=self.device)

        @torch.no_grad()
        def activations_of(images: Tensor) -> Tensor:
            parts = []
            for batch in images.split(128):
                x = _unit(batch.to(self.device))
                watched = x if config.inspects == "raw" else regulator(x, quiet)
                parts.append(self.classifier.features(watched, config.layer).flatten(1).cpu())
            return torch.cat(parts)

        @torch.no_grad()
        def predicted(images: Tensor) -> Tensor:
            batches = (batch.to(self.device) for batch in images.split(128))
            return torch.cat([self.classifier(regulator(x, quiet)).argmax(1).cpu() for x in batches])

        fooling = torch.cat([each.x_adv[each.fooled] for each in examples])
        if len(fooling) == 0:
            raise ValueError("No attack fooled the classifier, so the Inspector has nothing to learn from.")
        benign = self._negatives()
        return fit_inspector(
            config,
            activations_of,
            benign,
            (fooling, predicted(fooling)),
            inverse_penalty=self.plan.inverse_penalty,
            progress=lambda done, total: self.progress("inspector", done, total),
        )

    def _negatives(self) -> tuple[Tensor, Tensor]:
        images, targets = self.dataset.fit.images, self.dataset.fit.targets
        chosen = [np.flatnonzero(targets == c)[: self.plan.negatives] for c in range(self.classifier.classes)]
        rows = np.concatenate(chosen)
        return torch.from_numpy(images[rows]), torch.from_numpy(targets[rows])

    def _measure(self, protected: ProtectedClassifier) -> dict[str, float]:
        test = self.dataset.test
        self.progress("measure", 0, 1)
        clean = run_batched(protected, _tensor(test), self.device)
        y = torch.from_numpy(test.targets)
        metrics = {
            "clean_accuracy_undefended": float((clean.undefended_logits.argmax(1) == y).float().mean()),
            "clean_accuracy": float((clean.logits.argmax(1) == y).float().mean()),
            "false_positive_rate": float(clean.alerts.float().mean()),
        }
        self.progress("measure", 1, 1)
        for name in self.plan.attacks:
            examples = self._craft(name, test, self.plan.test_examples, "test")
            if examples.fooled.any():
                output = run_batched(protected, examples.x_adv[examples.fooled], self.device)
                rate = float(resisted(output, examples.y[examples.fooled]).float().mean())
                metrics[f"resistance_rate.{name}"] = rate
            metrics[f"attack_success_rate.{name}"] = examples.success_rate
        return metrics

    def _data(self) -> DataRecord:
        data = self.dataset
        splits = {"fit": data.fit, "calibration": data.calibration, "test": data.test}
        counts = {name: len(split.targets) for name, split in splits.items()}
        return DataRecord(name=data.name, digest=data.digest, split_seed=data.split_seed, counts=counts)

    def _options(
        self, trained: TrainedRegulator, training: TrainingPlan, inspector: Inspector, report: InspectorReport
    ) -> dict[str, Any]:
        options = {
            "plan": asdict(self.plan),
            "regulator": trained.regulator.config.as_json(),
            "training": {**asdict(training), "sample_loss": trained.sample_loss, "final_loss": trained.final_loss},
            "inspector": {**inspector.config.as_json(), **asdict(report)},
        }
        plain: dict[str, Any] = json.loads(json.dumps(options))
        return plain

    def _export_and_publish(self, protected: ProtectedClassifier, draft: Draft) -> Manifest:
        self.progress("export", 0, 1)
        graph = export_protected(protected)
        check_export(graph, protected, _unit(torch.from_numpy(self.dataset.test.images[:8])))
        self.progress("export", 1, 1)
        with tempfile.TemporaryDirectory(prefix="portcullis-fit-") as temporary:
            regulator, defense = Path(temporary) / "regulator", Path(temporary) / "defense"
            regulator.mkdir()
            assert isinstance(protected.purifier, Regulator)
            save_regulator(protected.purifier, regulator)
            save_protected(protected, defense / CHECKPOINT)
            save_graph(graph, defense / GRAPH)
            alone: dict[str, Any] = {
                "kind": "regulator",
                "layers": {},
                "parent": None,
                "threshold": None,
                "false_positive_rate": None,
            }
            store = Store.open(self.root / REGULATORS)
            name = regulator_name(self.dataset.name, self.classifier.image_shape)
            published = store.publish(name, draft.model_copy(update={**alone, "metrics": {}}), regulator)
            options = {**draft.options, "regulator_version": f"{name}@{published.version}"}
            return Store.open(self.root / MODELS).publish(
                self.fetched.manifest.name, draft.model_copy(update={"options": options}), defense
            )


def regulator_name(dataset: str, shape: Sequence[int]) -> str:
    """Return the name that a Regulator of a data set is published under, such as ``cifar10-3x32x32``."""
    stem = re.sub(r"[^a-z0-9]+", "-", dataset.lower()).strip("-") or "images"
    return f"{stem[:40]}-{'x'.join(str(side) for side in shape)}"


def find_classifier(store: Store, name: str, ref: int | str | None) -> Fetched:
    """Fetch the classifier that a reference means: itself, or the one that the defense was fitted for.

    Raises the store's errors, and ``ValueError`` when the version found is not the one the defense names.
    """
    fetched = store.fetch(name, ref)
    parent = fetched.manifest.parent
    if parent is None:
        return fetched
    classifier = store.fetch(parent.name, parent.version)
    if classifier.digest != parent.digest:
        raise ValueError(
            f"{name} was fitted for {parent.name}@{parent.version} with digest {parent.digest}, "
            f"but that version now has digest {classifier.digest}."
        )
    return classifier


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("Asked to fit on cuda, but torch finds no GPU here.")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _tensor(split: Split) -> Tensor:
    return torch.from_numpy(split.images)


def _unit(images: Tensor) -> Tensor:
    return images.float() / 255 if images.dtype == torch.uint8 else images


def _attack_records(examples: Sequence[AdversarialExamples]) -> tuple[AttackRecord, ...]:
    return tuple(
        AttackRecord(
            name=each.attack.name,
            parameters=dict(each.attack.parameters),
            examples=int(each.fooled.sum()),
            success_rate=each.success_rate,
        )
        for each in examples
    )
