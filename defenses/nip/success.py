"""The defense success rate, for the nearest candidate and for what replaces it, over the same examples (section 5)."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple, Self

import torch
from torch import Tensor

from defenses.attacks import AdversarialExamples, Form
from defenses.attacks.examples import mean_distance
from defenses.evaluation.rates import Interval, exact_interval, rate
from defenses.nip.inverse_perturbation import Control, InversePerturbation
from defenses.nip.oracle import oracle_answers
from defenses.pixels import to_float
from defenses.precision import full_precision
from defenses.protected import ProtectedClassifier

Direction = Literal["nearest", "random", "gaussian", "oracle"]
"""Where an image is moved: by its nearest candidate, which is what is served, by a ``Control``, or by the oracle."""


@dataclass(frozen=True)
class CleanSuccess:
    """What moving clean images in one direction does: accuracy without it and with it, with its interval at 95 %.

    ``moved_l2`` is the mean L2 distance that an image is moved, for images in [0, 1].
    """

    direction: Direction
    images: int
    undefended_accuracy: float
    accuracy: float
    accuracy_interval: Interval
    moved_l2: float


@dataclass(frozen=True)
class SuccessRow:
    """What moving one attack's examples in one direction does to them, in one form.

    ``fooling`` of the ``attempted`` images fool the bare classifier in that form, with the mean L2 distance
    ``distortion_l2`` from the clean ones. ``success`` is the share of those that is then answered with the true class,
    whether alerted or not, with its interval at 95 %; ``moved_l2`` is how far they are moved. All but the
    counts are None where none fools.
    """

    direction: Direction
    attack: str
    form: Form
    attempted: int
    fooling: int
    distortion_l2: float | None
    success: float | None = None
    success_interval: Interval | None = None
    moved_l2: float | None = None


class _Moved(NamedTuple):
    """What is answered of N images, which the bare classifier answers otherwise, and the images as moved."""

    predicted: Tensor
    undefended: Tensor
    moved_l2: float


@dataclass(frozen=True)
class DefenseSuccess:
    """Measure a NIP defense, in evaluation mode on ``device``, and what replaces its direction.

    What is drawn at random is drawn from ``seed`` anew for each measurement, so that each gives the same row whatever
    was measured before it; the global random state is left as it was.
    """

    protected: ProtectedClassifier
    purifier: InversePerturbation
    device: torch.device
    seed: int
    batch_size: int = 128

    @classmethod
    def of(cls, protected: ProtectedClassifier, device: torch.device, seed: int) -> Self:
        """Measure a protected classifier; raises ``TypeError`` for one whose purifier is no inverse perturbation."""
        purifier = protected.purifier
        if not isinstance(purifier, InversePerturbation):
            raise TypeError(f"Expected an InversePerturbation, got a {type(purifier).__name__}.")
        return cls(protected.to(device), purifier, device, seed)

    def clean(self, images: Tensor, targets: Tensor, direction: Literal["nearest"] | Control) -> CleanSuccess:
        """Return what happens to clean images, uint8 (N, C, H, W), N at least 1, with their classes (N,)."""
        moved = self._moved(images, direction)
        right = moved.predicted == targets
        return CleanSuccess(
            direction,
            len(images),
            rate(moved.undefended == targets),
            rate(right),
            exact_interval(right),
            moved.moved_l2,
        )

    def attacked(self, examples: AdversarialExamples, direction: Direction) -> tuple[SuccessRow, SuccessRow]:
        """Return what happens to adversarial examples as crafted, and to the same rounded to 8 bits."""
        crafted, rounded = examples.fooled, examples.fooled_rounded
        return (
            self._row(examples, "as crafted", examples.x_adv[crafted], crafted, examples.distortion, direction),
            self._row(examples, "rounded", examples.rounded[rounded], rounded, examples.distortion_rounded, direction),
        )

    def _row(
        self,
        examples: AdversarialExamples,
        form: Form,
        images: Tensor,
        fooled: Tensor,
        distortion: float | None,
        direction: Direction,
    ) -> SuccessRow:
        counted = (direction, examples.attack.name, form, len(fooled), len(images), distortion)
        if not len(images):
            return SuccessRow(*counted)
        if direction == "oracle":
            predicted, moved_l2 = self._oracle(examples.x[fooled], images)
        else:
            predicted, _, moved_l2 = self._moved(images, direction)
        right = predicted == examples.y[fooled]
        return SuccessRow(*counted, rate(right), exact_interval(right), moved_l2)

    @torch.no_grad()
    def _moved(self, images: Tensor, direction: Literal["nearest"] | Control) -> _Moved:
        predicted, undefended, distances = [], [], 0.0
        with self._drawing(), self._directed(None if direction == "nearest" else direction):
            for batch in images.split(self.batch_size):
                x = to_float(batch.to(self.device))
                output = self.protected(x)
                predicted.append(output.logits.argmax(1).cpu())
                undefended.append(output.undefended_logits.argmax(1).cpu())
                distances += float((output.purified - x).flatten(1).norm(dim=1).sum())
        return _Moved(torch.cat(predicted), torch.cat(undefended), distances / len(images))

    def _oracle(self, clean: Tensor, x_adv: Tensor) -> tuple[Tensor, float | None]:
        config = self.purifier.config
        with self._drawing():
            answers = oracle_answers(
                self.protected.classifier,
                self.purifier.head,
                config.layer,
                clean,
                x_adv,
                k1=config.k1,
                k2=config.k2,
                amplitude=config.amplitude,
                batch_size=self.batch_size,
                device=self.device,
            )
        return answers.logits.argmax(1), mean_distance(x_adv, answers.x_moved)

    @contextmanager
    def _drawing(self) -> Iterator[None]:
        cuda = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda), full_precision():
            torch.manual_seed(self.seed)
            yield

    @contextmanager
    def _directed(self, control: Control | None) -> Iterator[None]:
        before, self.purifier.control = self.purifier.control, control
        try:
            yield
        finally:
            self.purifier.control = before
