"""A classifier that can only be asked, and what it answered, kept as it comes (NIP, sections 3.1 and 6.4.2)."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from defenses.evaluation import Progress
from defenses.pixels import to_float
from defenses.stages import Stages

KEEP_EVERY = 10.0
"""Seconds of asking after which the answers so far are kept."""

DISTRIBUTION_TOLERANCE = 1e-2
"""By how much probabilities may miss 1 in sum, having been rounded."""

Answer = Callable[[Tensor], Tensor]
"""Answers images float32 (N, C, H, W) in [0, 1], on the CPU, with logits (N, K) or labels (N,)."""

AnswerKind = Literal["label", "probabilities"]


class AnswerUnsuitable(ValueError):
    """A classifier gave an answer that nothing can be learnt from; ``stage`` is what it was asked for."""

    def __init__(self, stage: str, expected: str, found: str) -> None:
        self.stage, self.expected, self.found = stage, expected, found
        super().__init__(f"Expected the classifier to answer with {expected}, got {found} ({stage}).")


class ClassesNeverAnswered(ValueError):
    """A classifier never answered with some of its classes; ``missing`` are their indices, ``asked`` how often."""

    def __init__(self, missing: list[int], classes: int, asked: int) -> None:
        self.missing, self.classes, self.asked = missing, classes, asked
        named = f"{', '.join(map(str, missing[:8]))}{f' and {len(missing) - 8} more' if len(missing) > 8 else ''}"
        super().__init__(
            f"Expected {asked} answers to name each of {classes} classes, but none named {named}: ask about more "
            "images, or about images of those classes."
        )


class Asked(NamedTuple):
    """What was answered: labels int64 (N,) or, as they came, probabilities or logits float32 (N, K); seconds taken."""

    answers: Tensor
    seconds: float

    @property
    def labels(self) -> Tensor:
        """The labels answered, int64 (N,)."""
        return self.answers if self.answers.ndim == 1 else self.answers.argmax(1)

    @property
    def probabilities(self) -> Tensor:
        """The probabilities answered, float32 (N, K); answers that are not all distributions are logits."""
        sums = self.answers.sum(1, keepdim=True)
        if (self.answers >= 0).all() and ((sums - 1).abs() <= DISTRIBUTION_TOLERANCE).all():
            return self.answers / sums
        return self.answers.softmax(1)


@dataclass(frozen=True)
class BlackBox:
    """A classifier of ``classes`` classes that is only called, on at most ``batch_size`` images at once."""

    answer: Answer
    classes: int
    batch_size: int
    stages: Stages
    progress: Progress

    def ask(self, images: Tensor, rows: Tensor, kind: AnswerKind, stage: str) -> Asked:
        """Ask about the images of some rows, each once and in their order, without gradients.

        ``images`` is uint8 or float (N, C, H, W), ``rows`` int64 (M,). What is answered is kept every few seconds, and
        also when the classifier or the caller fails, so that what was answered is not asked again. Of ``label`` nothing
        but the place of the largest logit is kept. Raises ``AnswerUnsuitable``, and whatever ``answer`` raises.
        """
        partial = f"{stage}, partial"
        if (kept := self.stages.load(stage)) is not None:
            return Asked(kept.tensors["answers"], kept.values["seconds"])
        kept = self.stages.load(partial)
        parts = [kept.tensors["answers"]] if kept else []
        before = kept.values["seconds"] if kept else 0.0
        done = first = len(parts[0]) if parts else 0
        began = saved = time.perf_counter()

        def keep(name: str) -> Asked:
            asked = Asked(torch.cat(parts), before + time.perf_counter() - began)
            self.stages.save(name, {"answers": asked.answers}, {"seconds": asked.seconds})
            return asked

        try:
            while done < len(rows):
                batch = to_float(images[rows[done : done + self.batch_size]])
                parts.append(self._answers(batch, kind, stage))
                done += len(batch)
                self.progress(stage, done, len(rows))
                if time.perf_counter() - saved > KEEP_EVERY and done < len(rows):
                    keep(partial)
                    saved = time.perf_counter()
        except BaseException:
            if done > first:
                keep(partial)
            raise
        asked = keep(stage)
        self.stages.drop(partial)
        return asked

    def _answers(self, x: Tensor, kind: AnswerKind, stage: str) -> Tensor:
        with torch.no_grad():
            found = self.answer(x)
        if not isinstance(found, Tensor):
            raise AnswerUnsuitable(stage, "a tensor", type(found).__name__)
        found = found.detach().cpu()
        if kind == "label" and found.ndim == 1:
            return _labels(found, len(x), self.classes, stage)
        if tuple(found.shape) != (len(x), self.classes) or not found.is_floating_point():
            labels = f", or labels of shape ({len(x)},)" if kind == "label" else ""
            expected = f"floating-point logits of shape {(len(x), self.classes)}{labels}"
            raise AnswerUnsuitable(stage, expected, f"{found.dtype} of shape {tuple(found.shape)}")
        if not found.isfinite().all():
            count = int((~found.isfinite()).any(1).sum())
            raise AnswerUnsuitable(stage, "finite values", f"others for {count} of {len(x)} images")
        return found.argmax(1) if kind == "label" else found.float()


def check_every_class(asked: Asked, classes: int) -> None:
    """Raise ``ClassesNeverAnswered`` where a class is named by no answer."""
    counts = torch.bincount(asked.labels, minlength=classes)
    if missing := (counts == 0).nonzero().flatten().tolist():
        raise ClassesNeverAnswered(missing, classes, len(asked.labels))


def _labels(found: Tensor, count: int, classes: int, stage: str) -> Tensor:
    if len(found) != count or found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
        expected = f"integer labels of shape ({count},)"
        raise AnswerUnsuitable(stage, expected, f"{found.dtype} of shape {tuple(found.shape)}")
    labels = found.long()
    if not ((labels >= 0) & (labels < classes)).all():
        low, high = (int(end) for end in labels.aminmax())
        raise AnswerUnsuitable(stage, f"labels from 0 to {classes - 1}", f"labels from {low} to {high}")
    return labels
