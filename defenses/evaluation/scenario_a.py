"""Scenario A: the attacker knows the classifier and not the defense (CoopHANCE, section 2.3)."""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from defenses.attacks import AdversarialExamples
from defenses.detector import NoDetector
from defenses.evaluation import Answers, resisted, run_batched
from defenses.evaluation.curves import ResistanceCurve
from defenses.evaluation.rates import CleanRow, Interval, rate, wilson_interval
from defenses.judge import PurifiedAnswer
from defenses.precision import full_precision
from defenses.protected import ProtectedClassifier

Form = Literal["as crafted", "rounded"]
"""Adversarial examples as they were crafted, or rounded to 8 bits, as a file or a client would send them."""


@dataclass(frozen=True)
class ScenarioARow:
    """What a defense did to one attack's examples, crafted on the bare classifier, in one form.

    ``fooling`` of the ``attempted`` images fool the bare classifier in that form; everything else is over those, and
    None where there are none. ``distortion_l2`` is their mean L2 distance, for images in [0, 1]. ``regulator`` is the
    share that is answered with the true class, which is what the purifier does alone, ``inspector`` the share that is
    alerted, the detector alone, and ``resisted`` the share of which either holds (section 4.1.1), with its Wilson
    interval at 95 %. ``auc`` is the area under resistance over false positives as the threshold sweeps, ``curve`` at
    most 200 points (false-positive rate, resistance rate) of it; ``detector_auc`` is that of the scores alone. Without
    a detector there is none of them, and no ``auc`` and ``curve`` where the answer itself depends on the alert.
    """

    attack: str
    form: Form
    attempted: int
    fooling: int
    distortion_l2: float | None
    regulator: float | None = None
    inspector: float | None = None
    resisted: float | None = None
    resisted_interval: Interval | None = None
    auc: float | None = None
    detector_auc: float | None = None
    curve: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True)
class ScenarioA:
    """Measure a protected classifier, in evaluation mode on ``device``, in scenario A.

    ``noise_scale`` multiplies all noise of the defense. The noise is drawn from ``seed`` anew for each measurement, so
    that each gives the same row whatever was measured before it, and the global random state is left as it was.
    """

    protected: ProtectedClassifier
    device: torch.device
    seed: int
    noise_scale: float = 1.0
    batch_size: int = 128

    def clean(self, images: Tensor, targets: Tensor) -> tuple[CleanRow, Tensor]:
        """Return what happens to clean images, uint8 (N, C, H, W) with their classes (N,), and their scores (N,).

        Where each class has a threshold of its own the scores are those above it, so that one sweep moves them all.
        Raises ``ValueError`` when there are none.
        """
        if not len(images):
            raise ValueError("There are no clean images to measure the defense on.")
        answers = self._answers(images)
        row = CleanRow.count(
            undefended_right=answers.undefended_logits.argmax(1) == targets,
            right=answers.logits.argmax(1) == targets,
            alerted=answers.alerts,
        )
        return row, self._comparable_scores(answers)

    def attacked(self, examples: AdversarialExamples, clean_scores: Tensor) -> tuple[ScenarioARow, ScenarioARow]:
        """Return what happens to adversarial examples as crafted, and to the same rounded to 8 bits.

        ``clean_scores`` (N,) are those that ``clean`` returns, of images that the defense was neither fitted nor
        calibrated on.
        """
        kept, rounded = examples.fooled, examples.fooled_rounded
        return (
            self._row(examples, "as crafted", examples.x_adv[kept], kept, examples.distortion, clean_scores),
            self._row(
                examples, "rounded", examples.rounded[rounded], rounded, examples.distortion_rounded, clean_scores
            ),
        )

    def _row(
        self,
        examples: AdversarialExamples,
        form: Form,
        images: Tensor,
        fooled: Tensor,
        distortion: float | None,
        clean_scores: Tensor,
    ) -> ScenarioARow:
        counted = (examples.attack.name, form, len(fooled), len(images), distortion)
        if not len(images):
            return ScenarioARow(*counted)
        answers, y = self._answers(images), examples.y[fooled]
        corrected, either = answers.logits.argmax(1) == y, resisted(answers, y)
        scores = self._comparable_scores(answers)
        row = ScenarioARow(
            *counted,
            regulator=rate(corrected),
            inspector=rate(answers.alerts),
            resisted=rate(either),
            resisted_interval=wilson_interval(either),
        )
        if isinstance(self.protected.detector, NoDetector):
            return row
        detector = ResistanceCurve.sweep(clean_scores, scores, torch.zeros_like(corrected))
        row = replace(row, detector_auc=detector.area)
        if not isinstance(self.protected.judge, PurifiedAnswer):
            return row
        curve = ResistanceCurve.sweep(clean_scores, scores, corrected)
        return replace(row, auc=curve.area, curve=curve.thinned())

    def _comparable_scores(self, answers: Answers) -> Tensor:
        threshold = self.protected.threshold.cpu()
        return answers.scores - threshold[answers.logits.argmax(1)] if threshold.ndim else answers.scores

    def _answers(self, images: Tensor) -> Answers:
        cuda = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda), full_precision():
            torch.manual_seed(self.seed)
            return run_batched(self.protected, images, self.device, self.batch_size, noise_scale=self.noise_scale)
