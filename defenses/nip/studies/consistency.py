"""Top-k neuron consistency: whether defended images have the important neurons of the clean ones (NIP, 7.3.1)."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from defenses.attacks import AdversarialExamples
from defenses.evaluation.rates import Interval
from defenses.nip.influence import log_odds_influence
from defenses.nip.inverse_perturbation import Control
from defenses.nip.neurons import select_neurons
from defenses.nip.oracle import oracle_answers
from defenses.nip.studies.outcomes import Share
from defenses.nip.studies.subject import StudySubject
from defenses.nip.success import Direction
from defenses.pixels import to_float

K = 5
"""How many neurons are compared, as in the paper; all of a layer that has fewer."""

DIRECTIONS: tuple[Direction, ...] = ("nearest", "random", "gaussian", "oracle")


@dataclass(frozen=True)
class ConsistencyRow:
    """How consistent the top neurons of images are with those of the clean images that they were made of.

    ``attack`` is None for clean images that are moved; ``direction`` is None for adversarial examples that are not.
    ``consistency`` is the mean over images of equation 13, with its interval at 95 % by the normal approximation, which
    is None of one image; ``right`` is the share answered with the true class, of adversarial examples the defense
    success rate. ``correlation`` is Spearman's between the two over the images, None where one of them is constant.
    """

    attack: str | None
    direction: Direction | None
    consistency: float
    consistency_interval: Interval | None
    right: Share
    correlation: float | None


@dataclass(frozen=True)
class Correlation:
    """Spearman's rank correlation of consistency and defense success rate over ``points`` rows.

    ``attack`` is None for the rows of all attacks. The coefficient is None where there are fewer than three points, or
    one of the two is constant.
    """

    attack: str | None
    points: int
    coefficient: float | None


@dataclass(frozen=True)
class ConsistencyStudy:
    """The consistency of the ``k`` top neurons of a layer."""

    layer: str
    k: int
    rows: tuple[ConsistencyRow, ...]
    correlations: tuple[Correlation, ...]


class Seen(NamedTuple):
    """The top neurons (N, k) of N images, the classes (N,) that they are given, and the images as moved; on the CPU."""

    top: Tensor
    predicted: Tensor
    images: Tensor


def study_consistency(subject: StudySubject) -> ConsistencyStudy:
    """Measure the consistency of clean images with adversarial examples, and with both as they are moved (eq. 13).

    Images are moved as is served, by the controls, and adversarial examples by the oracle too, each at the subject's
    own amplitude.
    """
    config = subject.purifier.config
    k = min(K, config.shape[0])
    total = 1 + len(subject.attacked)
    subject.progress("consistency", 0, total)
    images, targets = subject.clean
    clean = _seen(subject, images, k)
    rows = [
        _row(None, direction, clean.top, _moved(subject, images, direction, k), targets)
        for direction in ("nearest", "random", "gaussian")
    ]
    for done, examples in enumerate(subject.attacked, 1):
        subject.progress("consistency", done, total)
        if examples.fooled.any():
            rows += _attacked_rows(subject, examples, k)
    subject.progress("consistency", total, total)
    measured = [row for row in rows if row.attack is not None]
    names = list(dict.fromkeys(row.attack for row in measured))
    correlations = [_correlation(name, (row for row in measured if row.attack == name)) for name in names]
    return ConsistencyStudy(config.layer, k, tuple(rows), (*correlations, _correlation(None, measured)))


def top_consistency(top: Tensor, other: Tensor) -> Tensor:
    """Return (N,) how many of two sets of k neurons (N, k) are common, over how many are in either (equation 13)."""
    common = (top.unsqueeze(2) == other.unsqueeze(1)).sum((1, 2)).double()
    return common / (top.shape[1] + other.shape[1] - common)


def _attacked_rows(subject: StudySubject, examples: AdversarialExamples, k: int) -> list[ConsistencyRow]:
    fooled = examples.fooled
    x, x_adv, y = examples.x[fooled], examples.x_adv[fooled], examples.y[fooled]
    clean = _seen(subject, x, k).top
    name = examples.attack.name
    rows = [_row(name, None, clean, _seen(subject, x_adv, k), y)]
    for direction in DIRECTIONS:
        seen = _by_oracle(subject, x, x_adv, k) if direction == "oracle" else _moved(subject, x_adv, direction, k)
        rows.append(_row(name, direction, clean, seen, y))
    return rows


def _row(attack: str | None, direction: Direction | None, clean: Tensor, seen: Seen, targets: Tensor) -> ConsistencyRow:
    consistency, right = top_consistency(clean, seen.top), seen.predicted == targets
    return ConsistencyRow(
        attack,
        direction,
        float(consistency.mean()),
        _normal_interval(consistency),
        Share.of(right),
        _spearman(consistency.tolist(), right.tolist()),
    )


def _normal_interval(values: Tensor) -> Interval | None:
    if len(values) < 2:
        return None
    mean, reach = float(values.mean()), 1.96 * float(values.std()) / math.sqrt(len(values))
    return max(0.0, mean - reach), min(1.0, mean + reach)


def _correlation(attack: str | None, rows: Iterable[ConsistencyRow]) -> Correlation:
    points = [(row.consistency, row.right.rate or 0.0) for row in rows]
    coefficient = _spearman([each for each, _ in points], [each for _, each in points]) if len(points) > 2 else None
    return Correlation(attack, len(points), coefficient)


def _spearman(first: list[float], second: list[float]) -> float | None:
    from scipy.stats import spearmanr

    if len(set(first)) < 2 or len(set(second)) < 2:
        return None
    return float(spearmanr(first, second).statistic)


def _moved(subject: StudySubject, images: Tensor, direction: Literal["nearest"] | Control, k: int) -> Seen:
    with subject.drawing(), subject.directed(None if direction == "nearest" else direction):
        return _seen(subject, images, k, moved=True)


def _by_oracle(subject: StudySubject, x: Tensor, x_adv: Tensor, k: int) -> Seen:
    config = subject.purifier.config
    answers = oracle_answers(
        subject.classifier,
        subject.purifier.head,
        config.layer,
        x,
        x_adv,
        k1=config.k1,
        k2=config.k2,
        amplitude=config.amplitude,
        batch_size=subject.batch_size,
        device=subject.device,
    )
    return _seen(subject, answers.x_moved, k)


@torch.no_grad()
def _seen(subject: StudySubject, images: Tensor, k: int, *, moved: bool = False) -> Seen:
    """Look at one or more images, uint8 or float in [0, 1], as they are or as the purifier moves them."""
    classifier, purifier = subject.classifier, subject.purifier
    parts = []
    for batch in images.split(subject.batch_size):
        x = to_float(batch.to(subject.device))
        logits, activations = classifier.logits_and_features(x, purifier.config.layer)
        if moved:
            x = purifier(x, x.new_zeros(()), activations, logits)
            logits, activations = classifier.logits_and_features(x, purifier.config.layer)
        top = select_neurons(log_odds_influence(purifier.head, x, activations, logits), k, 0).front
        parts.append([each.cpu() for each in (top, logits.argmax(1), x)])
    return Seen(*(torch.cat(column) for column in zip(*parts, strict=True)))
