"""NIP_n: the inverse perturbation added to the activations of a layer in place of the image (NIP, section 7.3.3)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from defenses.nip.head import AutogradHead, Step, read_chain
from defenses.nip.inverse_perturbation import InversePerturbation
from defenses.nip.neurons import Neurons
from defenses.nip.plan import Sign
from defenses.nip.pool import choose_examples, inverse_perturbations
from defenses.nip.studies.outcomes import Answer, Outcome, measure_outcomes
from defenses.nip.studies.subject import StudySubject
from defenses.nip.studies.sweeps import moving_answer
from defenses.pixels import to_float

Place = Literal["image", "activations"]
"""Where the inverse perturbation is added."""


@dataclass(frozen=True)
class PlaceRow:
    """What the inverse perturbation is worth, added in one place at one amplitude."""

    place: Place
    outcome: Outcome


@dataclass(frozen=True)
class PlaceStudy:
    """The same candidates in both places, two rows for each; ``candidates`` is how many there are."""

    layer: str
    candidates: int
    rows: tuple[PlaceRow, ...]


def study_place(subject: StudySubject) -> PlaceStudy:
    """Compare the inverse perturbation of images with that of activations, both from the same benign examples.

    The pool is made anew of the images to fit on, and the candidate is chosen by the same similarity. Raises
    ``HeadUnsuitable`` where no chain of dense maps and ReLUs lies behind the layer.
    """
    head = subject.purifier.head
    if isinstance(head, AutogradHead):
        raise head.reason
    layer = subject.purifier.config.layer
    steps = read_chain(subject.classifier, subject.classifier.resolve_layer(layer))
    with subject.drawing():
        purifier, built = subject.pool_of(subject.plan, layer, "neurons")
        candidates = _candidates(subject, built.config.candidates)
        answers: dict[Place, Answer] = {
            "image": moving_answer(subject.classifier, purifier),
            "activations": shifting_answer(subject, purifier, steps, candidates),
        }
        rows = [
            PlaceRow(place, outcome)
            for place, answer in answers.items()
            for outcome in measure_outcomes(subject, answer, f"neurons, {place}")
        ]
    return PlaceStudy(layer, built.config.candidates, tuple(rows))


def activation_perturbations(neurons: Neurons, width: int, sign: Sign) -> Tensor:
    """Return (N, D) the inverse perturbations of a layer's own activations, scaled as in equation 8.

    By the neurons themselves the gradient of the tail's outputs less the front's is 1 at the tail neurons, -1 at the
    front ones and 0 elsewhere, whatever the image: all that a candidate tells is which neurons these are. Divided by
    its maximum less its minimum that is 1/2 and -1/2, or 1 where there are front or tail neurons only. Of maps it is
    the same over each whole map. Where all neurons are alike it is 0.
    """
    rho = torch.zeros(len(neurons.front), width, device=neurons.front.device)
    rho = rho.scatter(1, neurons.tail, 1.0).scatter(1, neurons.front, -1.0)
    low, high = (each.unsqueeze(1) for each in rho.aminmax(dim=1))
    scaled = torch.where(high > low, rho / torch.where(high > low, high - low, 1), 0)
    return scaled if sign == "tail-front" else -scaled


def shifting_answer(
    subject: StudySubject, purifier: InversePerturbation, steps: Sequence[Step], candidates: Tensor
) -> Answer:
    """Return the answer to activations a that are shifted to a + amplitude * Mean(a) * rho (equation 8 in the layer).

    rho is of the ``candidates`` (M, D) the one that is the purifier's nearest for the image. Activations have no
    bounds, and none are put to them.
    """

    def answer(x: Tensor, amplitudes: tuple[float, ...]) -> list[Tensor]:
        logits, activations = subject.classifier.logits_and_features(x, purifier.config.layer)
        values = activations.reshape(*activations.shape[:2], -1)
        rho = candidates.index_select(0, purifier.nearest(x, activations, logits)).unsqueeze(2)
        shift = values.mean((1, 2), keepdim=True) * rho
        return [_logits(steps, (values + each * shift).flatten(1)) if each else logits for each in amplitudes]

    return answer


def _candidates(subject: StudySubject, expected: int) -> Tensor:
    """Return (M, D) the candidates of the activations, of the examples that the pool has candidates of."""
    plan, config, progress = subject.plan, subject.purifier.config, subject.progress
    images, targets = subject.fit
    rows = choose_examples(
        subject.classifier,
        images,
        targets,
        plan.pool_size,
        seed=plan.seed,
        batch_size=plan.batch_size,
        device=subject.device,
        progress=lambda done, total: progress("neurons: benign examples", done, total),
    )
    parts = []
    for part in rows.split(plan.batch_size):
        x = to_float(images[part].to(subject.device))
        made = inverse_perturbations(
            subject.classifier, config.layer, subject.purifier.head, x, k1=plan.k1, k2=plan.k2, sign=plan.sign
        )
        parts.append(activation_perturbations(made.neurons, config.shape[0], plan.sign)[made.usable])
        progress("neurons: candidates", sum(map(len, parts)), len(rows))
    candidates = torch.cat(parts)
    assert len(candidates) == expected
    return candidates


def _logits(steps: Sequence[Step], values: Tensor) -> Tensor:
    """Return the logits (N, K) of activations (N, D), by the chain behind the layer."""
    for step in steps:
        if step.operator == "relu":
            values = values.relu()
        else:
            assert step.constant is not None
            values = values @ step.constant if step.operator == "product" else values + step.constant
    return values
