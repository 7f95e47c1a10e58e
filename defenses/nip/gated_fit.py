"""Fitting a correction behind an Inspector's alert: CoopHANCE and NIP in cooperation."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from defenses.attacks import AdversarialExamples, attack, craft_once
from defenses.calibration import calibrate, check_budget
from defenses.classifier import Classifier, Layer
from defenses.coophance.fusion import clues, fit_fusion
from defenses.coophance.inspector import Inspector
from defenses.evaluation import Progress, run_batched
from defenses.judge import AlertedAnswer
from defenses.nip.correction import CorrectionConfig, InverseCorrection
from defenses.nip.gated_plan import GatedPlan
from defenses.nip.head import head_behind
from defenses.nip.influence import check_layer
from defenses.nip.measured import Measured, measure
from defenses.nip.response_fit import affordable
from defenses.pixels import to_float
from defenses.precision import full_precision
from defenses.protected import ProtectedClassifier
from defenses.splits import Splits
from defenses.stages import Stages

ONE_SIDED_95 = 1.645
"""Standard errors between a loss that was counted and the bound that it stays below 95 times in 100."""


@dataclass(frozen=True)
class GateReport:
    """Tell where the alert was set: ``threshold``, and what it does to ``images`` benign ones that it was set on.

    ``alerted`` are answered anew, ``budgeted`` would be if the false-positive budget alone counted.
    ``undefended_right`` and ``right`` count what the bare classifier and what the whole gets right.
    """

    threshold: float
    images: int
    alerted: int
    budgeted: int
    undefended_right: int
    right: int

    def as_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Return the report that ``as_json`` described."""
        return cls(**values)


@dataclass(frozen=True)
class FittedGate:
    """A fitted defense on the CPU, in evaluation mode, with what it was fitted on and measured to do.

    ``examples`` are those that the alert was fitted to, ``calibration_scores`` (n,) the scores of the calibration
    images, ascending. ``seconds`` is what each stage took, however often the fit was taken up again.
    """

    protected: ProtectedClassifier
    layer: Layer
    gate: GateReport
    examples: tuple[AdversarialExamples, ...]
    calibration_scores: Tensor
    measured: Measured
    seconds: Mapping[str, float]

    @property
    def metrics(self) -> dict[str, float]:
        """The rates on the test split, by name."""
        return self.measured.metrics


class InspectorMissing(ValueError):
    """A defense that a correction is to stand behind has no Inspector."""

    def __init__(self, found: str) -> None:
        self.found = found
        super().__init__(f"Expected a defense with an Inspector to take the alerts from, got {found}.")


def fit_gated(
    inspected: ProtectedClassifier,
    splits: Splits,
    plan: GatedPlan,
    *,
    stages: Stages,
    device: torch.device,
    progress: Progress,
) -> FittedGate:
    """Attach a correction to a defense with an Inspector, settle when it is called, and measure the whole.

    Purifier and Inspector are used as they are; how the Inspector's decision is weighed with the rest of the evidence
    is fitted anew on the validation split, since the question is another: not whether the purified answer is wrong but
    whether the bare one is. What is done is kept in ``stages``: a fit that was killed goes on there, to the same
    result. The same plan on the same machine gives the same result; the global random state is left as it was. Before
    anything is computed raises ``InspectorMissing``, ``LayerNotFound``, ``LayerUnsuitable``, ``AttackUnknown`` and
    ``CalibrationTooSmall``; then ``ValueError`` for a classifier that gets nothing right or that no attack fools.
    """
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda), full_precision():
        torch.manual_seed(plan.seed)
        return _Fit(inspected.classifier.eval().to(device), splits, plan, stages, device, progress).run(inspected)


def gated_parts(inspected: ProtectedClassifier, plan: GatedPlan) -> tuple[Inspector, InverseCorrection]:
    """Return the Inspector that asks about the bare answer, its fusion not fitted, and the correction.

    Raises ``InspectorMissing``, ``LayerNotFound`` and ``LayerUnsuitable``.
    """
    given, classifier = inspected.detector, inspected.classifier
    if not isinstance(given, Inspector):
        raise InspectorMissing(f"one with a {type(given).__name__}")
    layer = classifier.resolve_layer(plan.layer) if plan.layer else classifier.head_layer
    check_layer(layer, plan.k1, plan.k2)
    inspector = Inspector(replace(given.config, fusion=True, asks="raw"))
    inspector.weight.data.copy_(given.weight)
    inspector.bias.data.copy_(given.bias)
    config = CorrectionConfig(
        layer.name, layer.shape, classifier.classes, k1=plan.k1, k2=plan.k2, size=plan.size, noise=plan.noise
    )
    corrector = InverseCorrection(config, classifier, head_behind(classifier, layer))
    return inspector.eval(), corrector.eval()


@dataclass(frozen=True)
class _Fit:
    classifier: Classifier
    splits: Splits
    plan: GatedPlan
    stages: Stages
    device: torch.device
    progress: Progress

    def run(self, inspected: ProtectedClassifier) -> FittedGate:
        plan, splits = self.plan, self.splits
        inspector, corrector = gated_parts(inspected, plan)
        layer = self.classifier.resolve_layer(corrector.config.layer)
        check_budget(len(splits.calibration.images), plan.budget)
        attacks = [attack(text) for text in plan.attacks]
        examples = tuple(
            craft_once(
                each,
                self.classifier,
                splits.validation,
                "validation",
                limit=plan.validation_examples,
                stages=self.stages,
                device=self.device,
                seed=plan.seed,
                batch_size=plan.batch_size,
                progress=self.progress,
            )
            for each in attacks
        )
        if not any(each.fooled.any() for each in examples):
            raise ValueError("None of the attacked validation images fools the classifier, so no alert can be fitted.")
        protected = ProtectedClassifier(
            self.classifier, inspected.purifier, inspector, float("inf"), judge=AlertedAnswer(), corrector=corrector
        )
        protected = protected.eval().to(self.device)
        self.weigh(protected, inspector, examples)
        gate, scores = self.gate(protected)
        measured = measure(protected, splits.test, plan, stages=self.stages, device=self.device, progress=self.progress)
        return FittedGate(protected.cpu(), layer, gate, examples, scores, measured, self.stages.timed())

    def weigh(
        self, protected: ProtectedClassifier, inspector: Inspector, examples: tuple[AdversarialExamples, ...]
    ) -> None:
        """Fit the fusion to clean images that the bare classifier gets right, and attacked ones that it does not.

        A clean image that is answered wrongly as it is costs nothing when it is answered anew.
        """
        fusion = inspector.fusion
        assert fusion is not None
        if (kept := self.stages.load("fusion")) is not None:
            fusion.load_state_dict(kept.tensors)
            return
        start = time.perf_counter()

        def observed(x: Tensor) -> Tensor:
            evidence = protected.evidence(x)
            decisions = inspector.decisions(evidence.activations, evidence.undefended_logits)
            return torch.cat([decisions[:, None], clues(evidence), evidence.undefended_logits], 1)

        images, targets = self.splits.validation
        seen = self.gathered(observed, images, "evidence, clean")
        width = seen.shape[1] - self.classifier.classes
        right = seen[:, width:].argmax(1) == targets
        attacked = [
            self.gathered(observed, each.x_adv[each.fooled], f"evidence, {each.attack.name}")[:, :width]
            for each in examples
            if each.fooled.any()
        ]
        fit_fusion(fusion, seen[right, :width], [(each, torch.zeros(len(each), dtype=torch.bool)) for each in attacked])
        self.stages.save("fusion", dict(fusion.state_dict()), {"seconds": time.perf_counter() - start})

    def gate(self, protected: ProtectedClassifier) -> tuple[GateReport, Tensor]:
        """Set the threshold; return what it does to the calibration images, and their scores, ascending."""
        torch.manual_seed(self.plan.seed)
        images, targets = self.splits.calibration
        if (kept := self.stages.load("gate")) is not None:
            gate = GateReport.from_json(kept.values["gate"])
            protected.threshold.fill_(gate.threshold)
            return gate, kept.tensors["scores"]
        plan, start = self.plan, time.perf_counter()
        protected.threshold.fill_(float("-inf"))  # so that each image is scored and corrected, in one run
        answers = run_batched(protected, images, self.device, plan.batch_size)
        protected.threshold.fill_(calibrate(answers.scores, plan.budget))
        budgeted = int((answers.scores > protected.threshold.cpu()).sum())
        order = answers.scores.argsort(descending=True)[:budgeted]
        right = answers.undefended_logits.argmax(1) == targets
        otherwise = answers.logits.argmax(1) == targets
        allowed = plan.accuracy_loss * len(targets)
        count = affordable(right[order], otherwise[order], allowed, errors=ONE_SIDED_95)
        if count < len(order):
            protected.threshold.fill_(float(answers.scores[order[count]]))
        alerted = answers.scores > protected.threshold.cpu()
        gate = GateReport(
            threshold=float(protected.threshold),
            images=len(targets),
            alerted=int(alerted.sum()),
            budgeted=len(order),
            undefended_right=int(right.sum()),
            right=int(torch.where(alerted, otherwise, right).sum()),
        )
        scores = answers.scores.sort().values
        self.stages.save("gate", {"scores": scores}, {"gate": gate.as_json(), "seconds": time.perf_counter() - start})
        return gate, scores

    @torch.no_grad()
    def gathered(self, function: Callable[[Tensor], Tensor], images: Tensor, stage: str) -> Tensor:
        """Apply a function to images in batches, the noise drawn from the seed; gather the results on the CPU."""
        torch.manual_seed(self.plan.seed)
        parts = []
        for place, batch in enumerate(images.split(self.plan.batch_size), 1):
            parts.append(function(to_float(batch.to(self.device))).cpu())
            self.progress(stage, min(place * self.plan.batch_size, len(images)), len(images))
        return torch.cat(parts)
