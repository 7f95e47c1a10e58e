"""Fitting a response: what benign images show under a push, and what may be concluded from more."""

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from defenses.nip.response import ResponseJudge, rises_of

PRIOR = 20
"""How many images of a prediction weigh as much as what all predictions show together."""

VOTES = tuple(step / 20 for step in range(1, 41))
"""The weights of the pushed image's logits that are tried."""


class Pushed(NamedTuple):
    """What the classifier says of N benign images, (N, K), what of the same as pushed (N, K), and their classes."""

    undefended_logits: Tensor
    logits: Tensor
    targets: Tensor


@dataclass(frozen=True)
class ResponseReport:
    """Tell what was settled, and what each part changes of the ``images`` that it was settled on.

    ``gated``, ``near`` and ``voted`` count the images that each of the three parts alone answers otherwise than the
    bare classifier. ``undefended_right`` and ``right`` count what the bare classifier gets right, and all together.
    """

    gate: float
    margin: float
    vote: float
    images: int
    gated: int
    near: int
    voted: int
    undefended_right: int
    right: int

    def as_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Return the report that ``as_json`` described."""
        return cls(**values)


def fit_response(judge: ResponseJudge, validation: Pushed, calibration: Pushed, accuracy_loss: float) -> ResponseReport:
    """Settle a judge: what is usual by ``validation``, gate, margin and vote by ``calibration``, all benign.

    Each of the three may cost a third of the share ``accuracy_loss`` of the calibration images, with one standard error
    to spare: as many images are answered otherwise as keeps the loss within that. The vote is lowered further where all
    three together cost more than ``accuracy_loss``. Raises ``ValueError`` without images.
    """
    for name, images in (("validation", validation), ("calibration", calibration)):
        if not len(images.targets):
            raise ValueError(f"Expected benign {name} images to settle a response by, got none.")
    judge.mean, judge.scale = _usual(validation)
    bare, pushed, targets = calibration
    right = bare.argmax(1) == targets
    allowed = accuracy_loss * len(targets) / 3
    response = judge.response(bare, pushed)
    judge.gate.fill_(_within(response.rise, right, response.risen == targets, allowed))
    highest = bare.topk(2, dim=1)
    margins = highest.values[:, 0] - highest.values[:, 1]
    judge.margin.fill_(-_within(-margins, right, highest.indices[:, 1] == targets, allowed))
    vote = _vote(calibration, right, allowed)
    for tried in (*(each for each in reversed(VOTES) if each <= vote), 0.0):
        judge.vote.fill_(tried)
        answered = judge(bare, pushed, torch.zeros(len(targets), dtype=torch.bool)).argmax(1)
        if int(right.sum()) - int((answered == targets).sum()) <= 3 * allowed:
            break
    return ResponseReport(
        gate=float(judge.gate),
        margin=float(judge.margin),
        vote=float(judge.vote),
        images=len(targets),
        gated=int((response.rise > judge.gate).sum()),
        near=int((margins < judge.margin).sum()),
        voted=int(((bare + judge.vote * pushed).argmax(1) != bare.argmax(1)).sum()),
        undefended_right=int(right.sum()),
        right=int((answered == targets).sum()),
    )


def _usual(benign: Pushed) -> tuple[Tensor, Tensor]:
    """Return the mean and the standard deviation (K, K) of each class' rise, by the predicted class.

    What all pairs of classes show together counts as ``PRIOR`` images of each prediction.
    """
    rises, predicted = rises_of(benign.undefended_logits, benign.logits), benign.undefended_logits.argmax(1)
    classes = rises.shape[1]
    others = torch.arange(classes) != predicted.unsqueeze(1)
    overall_mean, overall_variance = rises[others].mean(), rises[others].var(correction=0)
    count = predicted.bincount(minlength=classes).unsqueeze(1) + PRIOR
    mean = (torch.zeros(classes, classes).index_add(0, predicted, rises) + PRIOR * overall_mean) / count
    squares = (rises - mean[predicted]).square()
    variance = (torch.zeros(classes, classes).index_add(0, predicted, squares) + PRIOR * overall_variance) / count
    return mean, variance.sqrt().clamp_min(1e-6)


def _within(scores: Tensor, right: Tensor, otherwise: Tensor, allowed: float) -> float:
    """Return the least score above which images may be answered otherwise (see ``affordable``)."""
    order = scores.argsort(descending=True)
    count = affordable(right[order], otherwise[order], allowed)
    return float(scores[order[min(count, len(order) - 1)]])


def affordable(right: Tensor, otherwise: Tensor, allowed: float, *, errors: float = 1.0) -> int:
    """Return how many images, the first ones, may be answered otherwise at a loss of at most ``allowed`` images.

    ``right`` (N,) and ``otherwise`` (N,) say where the bare answer is right, and where the other one is. The loss is
    that of right answers in all, plus so many standard ``errors`` of it, and is kept at every count up to the one
    returned.
    """
    lost = (right.int() - otherwise.int()).cumsum(0)
    spread = (right != otherwise).cumsum(0).sqrt()
    beyond = (lost + errors * spread > allowed).nonzero()
    return int(beyond[0]) if len(beyond) else len(right)


def _vote(benign: Pushed, right: Tensor, allowed: float) -> float:
    vote = 0.0
    for tried in VOTES:
        other = (benign.undefended_logits + tried * benign.logits).argmax(1) == benign.targets
        lost = int(right.sum() - other.sum())
        if lost + float((right != other).sum()) ** 0.5 > allowed:
            break
        vote = tried
    return vote
