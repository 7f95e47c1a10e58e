"""Fitting a whole CoopHANCE defense for a classifier, from labelled images to a calibrated threshold."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from defenses.attacks import AdversarialExamples, Attack, attack_to_fit, craft_once
from defenses.calibration import calibrate, calibrate_classes, check_budget, check_class_budgets
from defenses.classifier import Classifier, Layer
from defenses.coophance.inspector import Inspector
from defenses.coophance.inspector_fit import INVERSE_PENALTIES, InspectorExamples, InspectorReport, fit_inspector
from defenses.coophance.plan import FitPlan
from defenses.coophance.regressions import FEWEST_EXAMPLES, Watched
from defenses.coophance.regulator import Regulator
from defenses.coophance.selection import STRENGTHS, NothingToChooseBy, Selection, answers_of, select
from defenses.coophance.trainer import TrainingPlan
from defenses.coophance.training import TrainedRegulator, fit_regulator, steps_in
from defenses.evaluation import Progress, run_batched
from defenses.evaluation.measurement import ExampleRow, Measurement
from defenses.evaluation.rates import CleanRow
from defenses.precision import full_precision
from defenses.protected import ProtectedClassifier
from defenses.splits import LabelledImages, Splits
from defenses.stages import Stages


@dataclass(frozen=True)
class Fitted:
    """A fitted defense on the CPU, in evaluation mode, with what it was fitted on and measured to do.

    ``trained`` and ``training`` are None where a Regulator was used again. ``examples`` are those fitted on,
    ``calibration_scores`` (n,) the scores of the calibration images, ascending. ``clean`` and ``attacks`` were measured
    on the test split, ``clean_scores`` are those of its images; ``test_examples`` are what was measured, for a look.
    ``seconds`` is what each stage took, however often the fit was taken up again.
    """

    protected: ProtectedClassifier
    layer: Layer
    trained: TrainedRegulator | None
    training: TrainingPlan | None
    selection: Selection
    inspector: InspectorReport
    examples: tuple[AdversarialExamples, ...]
    calibration_scores: Tensor
    clean: CleanRow
    clean_scores: Tensor
    attacks: tuple[ExampleRow, ...]
    test_examples: tuple[AdversarialExamples, ...]
    seconds: Mapping[str, float]

    @property
    def metrics(self) -> dict[str, float]:
        """The rates on the test split, by name; those over examples that fool the classifier, as crafted."""
        metrics = {
            "clean_accuracy_undefended": self.clean.undefended_accuracy,
            "clean_accuracy": self.clean.accuracy,
            "clean_accuracy_accepted": self.clean.accepted_accuracy,
            "false_positive_rate": self.clean.false_positive_rate,
        }
        for row in self.attacks:
            if row.form == "as crafted":
                metrics[f"attack_success_rate.{row.attack}"] = row.fooling / row.attempted
                if row.resisted is not None and row.auc is not None:
                    metrics[f"resistance_rate.{row.attack}"] = row.resisted
                    metrics[f"resistance_auc.{row.attack}"] = row.auc
        return metrics


def fit_coophance(
    classifier: Classifier,
    splits: Splits,
    plan: FitPlan,
    *,
    stages: Stages,
    regulator: Regulator | None = None,
    device: torch.device,
    progress: Progress,
) -> Fitted:
    """Fit a Regulator and an Inspector, calibrate the threshold, and measure the whole (sections 3.1 and 3.2).

    A ``regulator`` that is given is used as it is, but for its strength. What is done is kept in ``stages``: a fit that
    was killed goes on there, to the same result. The same plan on the same machine gives the same result; the global
    random state is left as it was. Before anything is computed raises ``AttackUnknown``, ``AttackUnsuitable``,
    ``LayerNotFound`` and ``CalibrationTooSmall``; before the training begins ``NothingToChooseBy``, and ``ValueError``
    for a classifier that gets nothing right or that too few attacked images fool.
    """
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda), full_precision():
        torch.manual_seed(plan.seed)
        return _Fit(classifier.eval().to(device), splits, plan, stages, device, progress).run(regulator)


@dataclass(frozen=True)
class _Fit:
    classifier: Classifier
    splits: Splits
    plan: FitPlan
    stages: Stages
    device: torch.device
    progress: Progress

    def run(self, regulator: Regulator | None) -> Fitted:
        plan, splits = self.plan, self.splits
        attacks = [attack_to_fit(text) for text in plan.attacks]
        layer = self.layer  # a name that is not there is told before anything is computed
        self.check_calibration()
        examples = tuple(self.crafted(each, splits.fit, plan.examples, "fit") for each in attacks)
        fooling = sum(int(each.fooled.sum()) for each in examples)
        if fooling < FEWEST_EXAMPLES:
            raise ValueError(
                f"An Inspector needs at least {FEWEST_EXAMPLES} images that fool the classifier, got {fooling}."
            )
        validation = tuple(
            self.crafted(each, splits.validation, plan.validation_examples, "validation") for each in attacks
        )
        wanted = plan.chosen_by_attacks(reused=regulator is not None)
        if wanted and not any(each.fooled.any() for each in validation):
            raise NothingToChooseBy(wanted)
        trained: TrainedRegulator | None = None
        training: TrainingPlan | None = None
        if regulator is None:
            trained, training = self.trained(examples)
            stopping_points = trained.stopping_points
        else:
            stopping_points = {0: regulator}
        selection = self.selected(stopping_points, validation)
        chosen = stopping_points[selection.chosen.step].to(self.device)
        chosen.set_strength(selection.chosen.strength)
        inspector, report = self.inspector(chosen, examples, validation)
        protected = ProtectedClassifier(self.classifier, chosen, inspector, float("inf")).eval()
        scores = self.calibrate(protected)
        measured = [self.crafted(each, splits.test, plan.test_examples, "test") for each in attacks]
        scenario = Measurement(protected, self.device, plan.seed)
        clean, clean_scores = scenario.clean(*splits.test)
        rows = tuple(row for each in measured for row in scenario.attacked(each, clean_scores))
        return Fitted(
            protected.cpu(),
            layer,
            trained,
            training,
            selection,
            report,
            examples,
            scores,
            clean,
            clean_scores,
            rows,
            tuple(measured),
            self.stages.timed(),
        )

    def check_calibration(self) -> None:
        """Refuse a budget that the calibration split cannot support, before anything long is computed.

        How many images are given each class is counted by the bare classifier's answers, as far as the protected ones
        are like them; ``calibrate`` counts those.
        """
        images, budget = self.splits.calibration.images, self.plan.budget
        check_budget(len(images), budget)
        if self.plan.inspector.thresholds == "class":
            answers = answers_of(self.classifier, images, self.device)
            check_class_budgets(torch.bincount(answers, minlength=self.classifier.classes).tolist(), budget)

    @cached_property
    def layer(self) -> Layer:
        name = self.plan.inspector.layer
        return self.classifier.resolve_layer(name) if name else self.classifier.tap

    def crafted(self, each: Attack, part: LabelledImages, limit: int, purpose: str) -> AdversarialExamples:
        return craft_once(
            each,
            self.classifier,
            part,
            purpose,
            limit=limit,
            stages=self.stages,
            device=self.device,
            seed=self.plan.seed,
            batch_size=self.plan.regulator.batch_size,
            progress=self.progress,
        )

    def trained(self, examples: Sequence[AdversarialExamples]) -> tuple[TrainedRegulator, TrainingPlan]:
        """Train the Regulator; the number of steps that a time budget holds is settled once."""
        plan, images = self.plan.regulator, self.splits.fit.images
        config = plan.config(self.classifier.image_shape)
        training = plan.training(len(images), self.plan.seed, self.device)
        if plan.minutes is not None:
            if (kept := self.stages.load("steps")) is None:
                steps = steps_in(config, training, plan.minutes * 60, device=self.device)
                self.stages.save("steps", {}, {"steps": steps})
            else:
                steps = kept.values["steps"]
            training = replace(training, steps=steps)
        pairs = [(each.x, each.x_adv) for each in examples]
        trained = fit_regulator(
            config, images, pairs, training, stages=self.stages, device=self.device, progress=self.progress
        )
        return trained, training

    def selected(
        self, stopping_points: Mapping[int, Regulator], validation: Sequence[AdversarialExamples]
    ) -> Selection:
        """Choose where the Regulator stops and how strong it is, as far as the plan leaves it open."""
        plan = self.plan
        points = dict(stopping_points)
        if plan.regulator.stop == "last":
            points = {step: points[step] for step in [max(points)]}
        if (kept := self.stages.load("selection")) is not None:
            return Selection.from_json(kept.values["selection"])
        start = time.perf_counter()
        selection = select(
            self.classifier,
            points,
            STRENGTHS if plan.strength is None else (plan.strength,),
            self.splits.validation,
            validation,
            plan.accuracy_loss,
            seed=plan.seed,
            device=self.device,
            progress=self.progress,
        )
        seconds = time.perf_counter() - start
        self.stages.save("selection", {}, {"selection": selection.as_json(), "seconds": seconds})
        return selection

    def inspector(
        self,
        regulator: Regulator,
        examples: Sequence[AdversarialExamples],
        validation: Sequence[AdversarialExamples],
    ) -> tuple[Inspector, InspectorReport]:
        """Fit the Inspector to what the Regulator leaves."""
        torch.manual_seed(self.plan.seed)
        plan, layer, fit = self.plan.inspector, self.layer, self.splits.fit
        config = plan.config(layer, self.classifier.classes)
        blank = Inspector(replace(config, fusion=False)).eval().to(self.device)
        protected = ProtectedClassifier(self.classifier, regulator, blank, float("inf")).eval()

        def watched(images: Tensor, targets: Tensor) -> Watched:
            predicted = run_batched(protected, images, self.device).logits.argmax(1)
            return Watched(images, predicted, predicted == targets)

        def attacked(each: AdversarialExamples) -> Watched:
            return watched(each.x_adv[each.fooled], each.y[each.fooled])

        fooling = [each for each in examples if each.fooled.any()]
        x_adv, y = (torch.cat([getattr(each, name)[each.fooled] for each in fooling]) for name in ("x_adv", "y"))
        rows = torch.cat([(fit.targets == c).nonzero().flatten()[: plan.negatives] for c in range(config.classes)])
        return fit_inspector(
            config,
            protected.activations,
            protected.evidence,
            InspectorExamples(
                benign=Watched(fit.images[rows], fit.targets[rows], torch.ones(len(rows), dtype=torch.bool)),
                adversarial=watched(x_adv, y),
                clean=watched(*self.splits.validation),
                attacks={each.attack.name: attacked(each) for each in validation if each.fooled.any()},
            ),
            INVERSE_PENALTIES if plan.inverse_penalty is None else (plan.inverse_penalty,),
            surviving=plan.surviving,
            device=self.device,
            seed=self.plan.seed,
            stages=self.stages,
            progress=lambda done, total: self.progress("inspector", done, total),
        )

    def calibrate(self, protected: ProtectedClassifier) -> Tensor:
        """Set the threshold from the calibration split; return its scores, ascending."""
        torch.manual_seed(self.plan.seed)
        plan, classes = self.plan, self.classifier.classes
        answers = run_batched(protected, self.splits.calibration.images, self.device)
        if plan.inspector.thresholds == "class":
            thresholds = calibrate_classes(answers.scores, answers.logits.argmax(1), classes, plan.budget)
            protected.threshold = torch.tensor(thresholds, device=self.device)
        else:
            protected.threshold.fill_(calibrate(answers.scores, plan.budget))
        return answers.scores.sort().values
