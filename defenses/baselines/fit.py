"""Fitting a baseline for a classifier, and calibrating the threshold of one that detects."""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from defenses.attacks import AdversarialExamples, attack, craft_once
from defenses.baselines.lid import LidDetector
from defenses.baselines.lid_fit import fit_lid
from defenses.baselines.magnet import MagNetDetector, Reformer
from defenses.baselines.magnet_training import train_reformer
from defenses.baselines.methods import METHODS, BaselineConfig
from defenses.baselines.plan import BaselinePlan
from defenses.calibration import calibrate, check_budget
from defenses.classifier import Classifier
from defenses.detector import NoDetector
from defenses.evaluation import Progress, run_batched
from defenses.evaluation.measurement import Measurement
from defenses.evaluation.rates import CleanRow
from defenses.pixels import to_float
from defenses.precision import full_precision
from defenses.protected import ProtectedClassifier
from defenses.splits import LabelledImages, Splits
from defenses.stages import Stages


@dataclass(frozen=True)
class FittedBaseline:
    """A fitted baseline on the CPU, in evaluation mode, with what it does to clean test images.

    ``examples`` are those that it was fitted to, ``calibration_scores`` (n,) the scores of the calibration images,
    ascending, None without a detector. ``seconds`` is what each stage took, however often the fit was taken up again.
    """

    protected: ProtectedClassifier
    config: BaselineConfig
    examples: tuple[AdversarialExamples, ...]
    calibration_scores: Tensor | None
    clean: CleanRow
    seconds: Mapping[str, float]

    @property
    def metrics(self) -> dict[str, float]:
        """The rates on the clean images of the test split, by name."""
        metrics = {
            "clean_accuracy_undefended": self.clean.undefended_accuracy,
            "clean_accuracy": self.clean.accuracy,
        }
        if self.calibration_scores is not None:
            metrics["clean_accuracy_accepted"] = self.clean.accepted_accuracy
            metrics["false_positive_rate"] = self.clean.false_positive_rate
        return metrics


def fit_baseline(
    classifier: Classifier,
    splits: Splits,
    plan: BaselinePlan,
    *,
    stages: Stages,
    device: torch.device,
    progress: Progress,
) -> FittedBaseline:
    """Fit what a baseline learns, calibrate its threshold where it detects, and measure it on clean test images.

    What is done is kept in ``stages``: a fit that was killed goes on there, to the same result. The same plan on the
    same machine gives the same result; the global random state is left as it was. Before anything is computed raises
    ``LayerNotFound``, ``AttackUnknown`` and ``CalibrationTooSmall``, and ``ValueError`` without images that it needs;
    then ``ValueError`` for a classifier that too few attacked images fool.
    """
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda), full_precision():
        torch.manual_seed(plan.seed)
        return _Fit(classifier.eval().to(device), splits, plan, stages, device, progress).run()


def check_feasible(plan: BaselinePlan, *, fit: int, validation: int, calibration: int) -> None:
    """Refuse a plan for which there are too few images in a split, or whose attacks are unknown.

    Raises ``CalibrationTooSmall``, ``AttackUnknown`` and ``ValueError``.
    """
    method = METHODS[plan.method]
    if method.detects:
        check_budget(calibration, plan.budget)
    if plan.method == "magnet" and not validation:
        raise ValueError("Expected benign validation images to compare the detectors by, got none.")
    if method.learns_attacks:
        for text in plan.attacks:
            attack(text)
        references = int(plan.options["references"])
        if fit <= references:
            raise ValueError(
                f"Expected more than {references} benign fitting images, {references} of them to compare with, "
                f"got {fit}."
            )


@dataclass(frozen=True)
class _Fit:
    classifier: Classifier
    splits: Splits
    plan: BaselinePlan
    stages: Stages
    device: torch.device
    progress: Progress

    def run(self) -> FittedBaseline:
        plan, splits = self.plan, self.splits
        check_feasible(
            plan,
            fit=len(splits.fit.targets),
            validation=len(splits.validation.targets),
            calibration=len(splits.calibration.targets),
        )
        config = plan.config(self.classifier)
        purifier, detector = config.parts()
        detects = not isinstance(detector, NoDetector)
        protected = ProtectedClassifier(self.classifier, purifier, detector).eval().to(self.device)
        examples: tuple[AdversarialExamples, ...] = ()
        if isinstance(purifier, Reformer) and isinstance(detector, MagNetDetector):
            self.reform(protected, purifier, detector)
        if isinstance(detector, LidDetector):
            examples = self.learn(protected, config, detector)
        scores = self.calibrate(protected) if detects else None
        self.progress("clean", 0, 1)
        measurement = Measurement(protected, self.device, plan.seed, batch_size=plan.batch_size)
        clean, _ = measurement.clean(*splits.test)
        self.progress("clean", 1, 1)
        return FittedBaseline(protected.cpu(), config, examples, scores, clean, self.stages.timed())

    def reform(self, protected: ProtectedClassifier, reformer: Reformer, detector: MagNetDetector) -> None:
        """Train MagNet's autoencoder, and learn what its statistics are on benign validation images."""
        train_reformer(
            reformer,
            self.splits.fit.images,
            epochs=int(self.plan.options["epochs"]),
            sigma=float(self.plan.options["sigma"]),
            batch_size=self.plan.batch_size,
            seed=self.plan.seed,
            stages=self.stages,
            device=self.device,
            progress=lambda done, total: self.progress("autoencoder", done, total),
        )
        batches = self.splits.validation.images.split(self.plan.batch_size)
        with torch.no_grad():
            seen = [detector.statistics(protected.evidence(to_float(batch.to(self.device)))) for batch in batches]
        detector.exceedance.fit(torch.cat(seen))

    def learn(
        self, protected: ProtectedClassifier, config: BaselineConfig, detector: LidDetector
    ) -> tuple[AdversarialExamples, ...]:
        """Fit LID's regression; return the examples that it is fitted to."""
        plan, fit = self.plan, self.splits.fit
        attacks = [attack(text) for text in plan.attacks]
        references = config.whole("references")
        order = torch.randperm(len(fit.targets), generator=torch.Generator().manual_seed(plan.seed))
        others = LabelledImages(fit.images[order[references:]], fit.targets[order[references:]])
        examples = tuple(
            craft_once(
                each,
                self.classifier,
                others,
                "fit",
                limit=plan.examples,
                stages=self.stages,
                device=self.device,
                seed=plan.seed,
                batch_size=plan.batch_size,
                progress=self.progress,
            )
            for each in attacks
        )
        if (kept := self.stages.load("lid")) is not None:
            detector.load_state_dict(kept.tensors)
            return examples
        torch.manual_seed(plan.seed)
        start = time.perf_counter()
        fit_lid(
            detector,
            protected.activations,
            fit.images[order[:references]],
            examples,
            batch_size=plan.batch_size,
            device=self.device,
        )
        self.stages.save("lid", dict(detector.state_dict()), {"seconds": time.perf_counter() - start})
        return examples

    def calibrate(self, protected: ProtectedClassifier) -> Tensor:
        """Set the threshold from the calibration split; return its scores, ascending."""
        torch.manual_seed(self.plan.seed)
        images = self.splits.calibration.images
        scores = run_batched(protected, images, self.device, self.plan.batch_size).scores
        protected.threshold.fill_(calibrate(scores, self.plan.budget))
        return scores.sort().values
