"""What a defense does to clean images and to adversarial examples."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from defenses.attacks import AdversarialExamples, Form
from defenses.attacks.examples import mean_distance
from defenses.detector import NoDetector
from defenses.evaluation import Answers, resisted, run_batched
from defenses.evaluation.answer_cache import AnswerCache
from defenses.evaluation.curves import ResistanceCurve
from defenses.evaluation.rates import CleanRow, Interval, exact_interval, rate
from defenses.judge import PurifiedAnswer
from defenses.precision import full_precision
from defenses.protected import ProtectedClassifier


@dataclass(frozen=True)
class ExampleRow:
    """What a defense did to one attack's examples in one form.

    ``fooling`` of the ``attempted`` images fool the model that they were crafted on in that form; everything else is
    over those, and None where there are none. ``distortion_l2`` and ``distortion_linf`` are their mean distances, for
    images in [0, 1], ``missed_l2`` and ``missed_linf`` those of the images that are answered wrongly. ``corrected`` is
    the share that is answered with the true class, which is what the purifier does alone, ``alerted`` the share that is
    alerted, the detector alone, and ``resisted`` the share of which either holds (CoopHANCE, section 4.1.1), with its
    interval at 95 %. ``auc`` is the area under resistance over false positives as
    the threshold sweeps, ``curve`` at most 200 points (false-positive rate, resistance rate) of it;
    ``detector_auc`` is that of the scores alone. Without a detector there is none of them, and no ``auc`` and ``curve``
    where the answer itself depends on the alert.
    """

    attack: str
    form: Form
    attempted: int
    fooling: int
    distortion_l2: float | None
    distortion_linf: float | None
    missed_l2: float | None = None
    missed_linf: float | None = None
    corrected: float | None = None
    alerted: float | None = None
    resisted: float | None = None
    resisted_interval: Interval | None = None
    auc: float | None = None
    detector_auc: float | None = None
    curve: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True)
class Measurement:
    """Measure a protected classifier, in evaluation mode on ``device``.

    ``noise_scale`` multiplies all noise of the defense. The noise is drawn from ``seed`` anew for each measurement, so
    that each gives the same row whatever was measured before it, and the global random state is left as it was. With a
    ``cache``, which is that of this defense, nothing is asked twice.
    """

    protected: ProtectedClassifier
    device: torch.device
    seed: int
    noise_scale: float = 1.0
    batch_size: int = 128
    cache: AnswerCache | None = None

    def answers(self, images: Tensor) -> Answers:
        """Return what the defense answers to images, uint8 or float in [0, 1] (N, C, H, W), one or more."""
        if self.cache is None:
            return self._asked(images)
        how = {"seed": self.seed, "batch_size": self.batch_size}
        return Answers(**self.cache.once(images, how, lambda: self._asked(images)._asdict()))

    def clean(self, images: Tensor, targets: Tensor) -> tuple[CleanRow, Tensor]:
        """Return what happens to clean images, uint8 (N, C, H, W) with their classes (N,), and their scores (N,).

        Where each class has a threshold of its own the scores are those above it, so that one sweep moves them all.
        Raises ``ValueError`` when there are none.
        """
        if not len(images):
            raise ValueError("There are no clean images to measure the defense on.")
        answers = self.answers(images)
        row = CleanRow.count(
            undefended_right=answers.undefended_logits.argmax(1) == targets,
            right=answers.logits.argmax(1) == targets,
            alerted=answers.alerts,
        )
        return row, self._comparable_scores(answers)

    def attacked(self, examples: AdversarialExamples, clean_scores: Tensor) -> tuple[ExampleRow, ExampleRow]:
        """Return what happens to adversarial examples as crafted, and to the same rounded to 8 bits.

        ``clean_scores`` (N,) are those that ``clean`` returns, of images that the defense was neither fitted nor
        calibrated on.
        """
        return self._row(examples, "as crafted", clean_scores), self._row(examples, "rounded", clean_scores)

    def _row(self, examples: AdversarialExamples, form: Form, clean_scores: Tensor) -> ExampleRow:
        fooled, images = examples.fooling(form)
        row = ExampleRow(
            examples.attack.name,
            form,
            attempted=len(fooled),
            fooling=len(images),
            distortion_l2=mean_distance(examples.x[fooled], images),
            distortion_linf=mean_distance(examples.x[fooled], images, torch.inf),
        )
        if not len(images):
            return row
        answers, y = self.answers(images), examples.y[fooled]
        corrected, either = answers.logits.argmax(1) == y, resisted(answers, y)
        scores = self._comparable_scores(answers)
        x, missed = examples.x[fooled], ~corrected
        row = replace(
            row,
            missed_l2=mean_distance(x[missed], images[missed]),
            missed_linf=mean_distance(x[missed], images[missed], torch.inf),
            corrected=rate(corrected),
            alerted=rate(answers.alerts),
            resisted=rate(either),
            resisted_interval=exact_interval(either),
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

    def _asked(self, images: Tensor) -> Answers:
        cuda = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda), full_precision():
            torch.manual_seed(self.seed)
            return run_batched(self.protected, images, self.device, self.batch_size, noise_scale=self.noise_scale)
