"""What a way of moving images is worth: shares of right answers, at a given amplitude and at one set anew."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from defenses.evaluation.rates import Interval, exact_interval, rate
from defenses.nip.plan import AMPLITUDES
from defenses.nip.studies.subject import StudySubject
from defenses.pixels import to_float

Answer = Callable[[Tensor, tuple[float, ...]], list[Tensor]]
"""Called with images (N, C, H, W) in [0, 1] and amplitudes; returns the logits (N, K) at each. At 0 nothing moves."""


@dataclass(frozen=True)
class Share:
    """How many of so many images, the rate and its exact interval at 95 %; the last two are None of no image."""

    images: int
    counted: int
    rate: float | None = None
    interval: Interval | None = None

    @classmethod
    def of(cls, counted: Tensor) -> Self:
        """Count what is true among bool (N,)."""
        if not len(counted):
            return cls(0, 0)
        return cls(len(counted), int(counted.sum()), rate(counted), exact_interval(counted))


@dataclass(frozen=True)
class Success:
    """The defense success rate: how many of an attack's examples that fool the bare classifier are answered right."""

    attack: str
    right: Share


@dataclass(frozen=True)
class Outcome:
    """What a way of moving images does at one amplitude, to clean test images and to adversarial ones as crafted.

    ``recalibrated`` says whether the amplitude was set anew on clean validation images; ``within`` then whether it
    costs no more accuracy there than allowed, else None. ``undefended`` is the bare classifier on the clean images.
    """

    recalibrated: bool
    amplitude: float
    within: bool | None
    undefended: Share
    clean: Share
    attacks: tuple[Success, ...]


def measure_outcomes(subject: StudySubject, answer: Answer, stage: str) -> tuple[Outcome, Outcome]:
    """Return what an answer is worth at the subject's own amplitude, and at one that is set anew for it.

    ``stage`` is what the progress is called.
    """
    own = subject.purifier.config.amplitude
    anew, within = recalibrate(subject, answer, stage)
    clean = predictions(subject, answer, subject.clean.images, (0.0, own, anew)) == subject.clean.targets
    undefended, *kept = [Share.of(right) for right in clean]
    successes: list[list[Success]] = [[], []]
    for done, examples in enumerate(subject.attacked):
        subject.progress(f"{stage}: attacks", done, len(subject.attacked))
        fooled = examples.fooled
        right = predictions(subject, answer, examples.x_adv[fooled], (own, anew)) == examples.y[fooled]
        for column, each in zip(successes, right, strict=True):
            column.append(Success(examples.attack.name, Share.of(each)))
    subject.progress(f"{stage}: attacks", len(subject.attacked), len(subject.attacked))
    return (
        Outcome(False, own, None, undefended, kept[0], tuple(successes[0])),
        Outcome(True, anew, within, undefended, kept[1], tuple(successes[1])),
    )


def recalibrate(subject: StudySubject, answer: Answer, stage: str) -> tuple[float, bool]:
    """Return the largest amplitude that costs at most the subject's loss on the validation images, and True.

    Where each costs more it is the smallest, and False. Those of the plan are tried, or else ``AMPLITUDES``.
    """
    images, targets = subject.validation
    amplitudes = subject.plan.amplitudes or AMPLITUDES
    right = torch.zeros(1 + len(amplitudes), dtype=torch.int64)
    done = 0
    for batch, y in zip(images.split(subject.batch_size), targets.split(subject.batch_size), strict=True):
        right += (predictions(subject, answer, batch, (0.0, *amplitudes)) == y).sum(1)
        done += len(y)
        subject.progress(f"{stage}: amplitude", done, len(targets))
    undefended, *counts = right.tolist()
    # Counts are compared, since of rates the difference may come out a hair above the loss that it is.
    most_lost = round(subject.accuracy_loss * len(targets), 9)
    allowed = [each for each, count in zip(amplitudes, counts, strict=True) if undefended - count <= most_lost]
    return (max(allowed), True) if allowed else (min(amplitudes), False)


@torch.no_grad()
def predictions(subject: StudySubject, answer: Answer, images: Tensor, amplitudes: tuple[float, ...]) -> Tensor:
    """Return the classes (A, N) that an answer gives N images, uint8 or float in [0, 1], at each of A amplitudes."""
    parts = [torch.empty(len(amplitudes), 0, dtype=torch.int64)]
    for batch in images.split(subject.batch_size) if len(images) else ():
        logits = answer(to_float(batch.to(subject.device)), amplitudes)
        parts.append(torch.stack([each.argmax(1) for each in logits]).cpu())
    return torch.cat(parts, dim=1)
