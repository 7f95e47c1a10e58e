"""A look at what a defense makes of adversarial examples, image by image."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from defenses.attacks import AdversarialExamples
from defenses.calibration import p_values
from defenses.pixels import to_float
from defenses.precision import full_precision
from defenses.protected import ProtectedClassifier
from service.report_parts.pictures import difference_picture, picture

SAMPLES = 6
"""How many examples of an attack are shown: the first that fool the classifier."""

BATCH = 128
"""Images answered at once, as in the measurement, so that their noise is the same."""


@dataclass(frozen=True)
class Sample:
    """One adversarial example and what came of it.

    ``row`` is its place in the test split, ``true`` its class, ``undefended`` the bare classifier's answer and
    ``answer`` that to the purified image. ``p_value`` is how likely a clean image is to score as high, at most, and
    ``distortion_l2`` the distance from the clean image, for images in [0, 1]. What the attack added and what the
    Regulator changed are shown multiplied by ``perturbation_times`` and ``purification_times``.
    """

    row: int
    true: str
    undefended: str
    answer: str
    alert: bool
    resisted: bool
    score: float
    p_value: float
    distortion_l2: float
    perturbation_times: int
    purification_times: int


class Strip(NamedTuple):
    """The pictures of one example, each a PNG as a data URI; the last two are differences around middle grey."""

    clean: str
    adversarial: str
    purified: str
    perturbation: str
    purification: str


@dataclass(frozen=True, eq=False)
class Look:
    """What a defense made of the N examples of one attack that fool the bare classifier, as crafted.

    ``scores`` (N,) are the detector's, those above its own threshold where each class has one; ``corrected`` bool (N,)
    says which are answered with the true class. ``strips`` are the pictures of the ``samples``.
    """

    scores: Tensor
    corrected: Tensor
    samples: tuple[Sample, ...] = ()
    strips: tuple[Strip, ...] = ()


class _Answers(NamedTuple):
    """What N images are answered, and the first few of them as they were purified."""

    scores: Tensor
    classes: Tensor
    undefended: Tensor
    alerts: Tensor
    purified: Tensor


def look_at(
    protected: ProtectedClassifier,
    examples: AdversarialExamples,
    labels: Sequence[str],
    calibration_scores: Tensor,
    *,
    device: torch.device,
    seed: int,
) -> Look:
    """Answer the examples that fool the bare classifier, with noise drawn from ``seed``, and show the first of them.

    ``protected`` is in evaluation mode on ``device``, ``labels`` are the names of its classes, and
    ``calibration_scores`` (n,) those it was calibrated by. The global random state is left as it was.
    """
    kept = examples.fooled
    x_adv, y = examples.x_adv[kept], examples.y[kept]
    if not len(y):
        return Look(torch.empty(0), torch.empty(0, dtype=torch.bool))
    answers = _answered(protected, x_adv, device, seed)
    corrected = answers.classes == y
    likely = p_values(answers.scores[:SAMPLES], calibration_scores)
    samples, strips = [], []
    for i, x_purified in enumerate(answers.purified):
        x = to_float(examples.x[kept][i])
        perturbation, perturbation_times = difference_picture(x_adv[i] - x)
        purification, purification_times = difference_picture(x_purified - x_adv[i])
        strips.append(Strip(picture(x), picture(x_adv[i]), picture(x_purified), perturbation, purification))
        samples.append(
            Sample(
                row=int(examples.rows[kept][i]),
                true=labels[int(y[i])],
                undefended=labels[int(answers.undefended[i])],
                answer=labels[int(answers.classes[i])],
                alert=bool(answers.alerts[i]),
                resisted=bool(answers.alerts[i] | corrected[i]),
                score=float(answers.scores[i]),
                p_value=float(likely[i]),
                distortion_l2=float((x_adv[i] - x).norm()),
                perturbation_times=perturbation_times,
                purification_times=purification_times,
            )
        )
    threshold = protected.threshold.cpu()
    scores = answers.scores - threshold[answers.classes] if threshold.ndim else answers.scores
    return Look(scores, corrected, tuple(samples), tuple(strips))


@torch.no_grad()
def _answered(protected: ProtectedClassifier, images: Tensor, device: torch.device, seed: int) -> _Answers:
    columns: list[tuple[Tensor, ...]] = []
    purified = torch.empty(0)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), full_precision():
        torch.manual_seed(seed)
        for batch in images.split(BATCH):
            output = protected(batch.to(device))
            column = (output.scores, output.logits.argmax(1), output.undefended_logits.argmax(1), output.alerts)
            columns.append(tuple(each.cpu() for each in column))
            if not len(purified):
                purified = output.purified[:SAMPLES].cpu()
    scores, classes, undefended, alerts = (torch.cat(column) for column in zip(*columns, strict=True))
    return _Answers(scores, classes, undefended, alerts, purified)
