"""What attacks do to the influence of neurons: which are suppressed, and which are raised (NIP, figure 1)."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from defenses.attacks import AdversarialExamples
from defenses.nip.head import Head
from defenses.nip.influence import neuron_outputs
from defenses.nip.neurons import Neurons, select_neurons
from defenses.nip.studies.outcomes import Share
from defenses.nip.studies.subject import StudySubject
from defenses.pixels import to_float

Towards = Literal["predicted", "true"]
"""The class whose confidence is influenced: the one that is predicted, as in equation 2, or the image's own."""

Moved = Literal["adversarial", "noise"]
"""What became of a clean image: an adversarial example, or the image with Gaussian noise of the same L2 norm."""

Group = Literal["front", "remaining", "tail"]


Measure = Literal["confidence", "log odds", "mapped", "output"]
"""Equation 2 as printed; the same on the log odds of the class; either of them, of each image mapped to [0, 1]; and no
influence at all but the neuron's output (equation 1)."""


@dataclass(frozen=True)
class InfluenceCurve:
    """The mean influence of a layer's neurons over an attack's examples that fool the classifier, in one measure.

    ``neurons`` are their indices, descending by ``clean``; there is no curve of outputs. ``clean``, ``adversarial`` and
    ``noise`` (D,) are in that order the influences on the clean images, on the adversarial examples, and on the clean
    images with Gaussian noise of each example's L2 norm.
    """

    attack: str
    towards: Towards
    measure: Measure
    images: int
    neurons: tuple[int, ...]
    clean: tuple[float, ...]
    adversarial: tuple[float, ...]
    noise: tuple[float, ...]


@dataclass(frozen=True)
class GroupChange:
    """What happens to the front, remaining or tail neurons of each image, chosen by its clean influences.

    ``before`` and ``after`` are means over neurons and images in one measure; ``suppressed`` are the images in which
    the group's mean falls, ``raised`` those in which it rises.
    """

    attack: str
    towards: Towards
    measure: Measure
    moved: Moved
    group: Group
    neurons: int
    before: float
    after: float
    suppressed: Share
    raised: Share


@dataclass(frozen=True)
class InfluenceStudy:
    """The influences at a layer, without attacks of which no example fools; ``groups`` has none of no neuron."""

    layer: str
    curves: tuple[InfluenceCurve, ...]
    groups: tuple[GroupChange, ...]


def study_influence(subject: StudySubject) -> InfluenceStudy:
    """Compare the influence of each neuron on clean images, on adversarial examples, and on noisy images (figure 1).

    The noise is the control: of neurons that were chosen because they are first or last, any change of the image
    makes some less so. On the confidence (equation 2) the influences of images that the classifier is sure of nearly
    vanish, so that all seem raised near a boundary; mapped to [0, 1], as the figure has them, all are raised where the
    least one falls. On the log odds of the true class neither happens.
    """
    curves, groups = [], []
    for done, examples in enumerate(subject.attacked):
        subject.progress("influence", done, len(subject.attacked))
        fooled = examples.fooled
        if not fooled.any():
            continue
        sets = _image_sets(subject, examples)
        for towards in ("true", "predicted"):
            known = examples.y[fooled] if towards == "true" else None
            found = {name: influences(subject, images, known) for name, images in sets.items()}
            chosen = select_neurons(found["clean"]["log odds"], subject.purifier.config.k1, subject.purifier.config.k2)
            for measure in found["clean"]:
                values = {name: each[measure] for name, each in found.items()}
                if measure != "output":
                    curves.append(_curve(examples.attack.name, towards, measure, values))
                groups += _changes(examples.attack.name, towards, measure, values, chosen)
    subject.progress("influence", len(subject.attacked), len(subject.attacked))
    return InfluenceStudy(subject.purifier.config.layer, tuple(curves), tuple(groups))


def influence_towards(
    head: Head, x: Tensor, activations: Tensor, logits: Tensor, classes: Tensor
) -> dict[Measure, Tensor]:
    """Return the influence (N, D) of each neuron on given classes (N,), in every measure.

    ``activations`` (N, D) or (N, D, H, W) and ``logits`` (N, K) are those of the images x. The influence on the
    confidence y_c is that on the log odds times y_c (1 - y_c), one positive factor per image.
    """
    member = torch.arange(logits.shape[1], device=logits.device) == classes.unsqueeze(1)
    rest = logits.masked_fill(member, -torch.inf)
    derivative = head.derivative(x, activations, member.to(logits.dtype) - rest.softmax(1))
    outputs = neuron_outputs(activations)
    log_odds = (derivative.sum((2, 3)) if derivative.ndim == 4 else derivative) * outputs
    total = logits.logsumexp(1)
    slope = (logits.gather(1, classes.unsqueeze(1)).squeeze(1) - total).exp() * (rest.logsumexp(1) - total).exp()
    low, high = (each.unsqueeze(1) for each in log_odds.aminmax(dim=1))
    mapped = (log_odds - low) / torch.where(high > low, high - low, 1)
    return {"confidence": slope.unsqueeze(1) * log_odds, "log odds": log_odds, "mapped": mapped, "output": outputs}


@torch.no_grad()
def influences(subject: StudySubject, images: Tensor, classes: Tensor | None = None) -> dict[Measure, Tensor]:
    """Return the influences (N, D) on the CPU of one or more images, towards the class predicted unless given (N,)."""
    parts = []
    for rows in torch.arange(len(images)).split(subject.batch_size):
        x = to_float(images[rows].to(subject.device))
        logits, activations = subject.classifier.logits_and_features(x, subject.purifier.config.layer)
        towards = logits.argmax(1) if classes is None else classes[rows].to(subject.device)
        parts.append(influence_towards(subject.purifier.head, x, activations, logits, towards))
    return {measure: torch.cat([part[measure] for part in parts]).cpu() for measure in parts[0]}


def _image_sets(subject: StudySubject, examples: AdversarialExamples) -> dict[str, Tensor]:
    """Return the clean images of an attack's examples that fool, the examples, and the images with noise."""
    x, x_adv = to_float(examples.x[examples.fooled]), examples.x_adv[examples.fooled]
    with subject.drawing():
        noise = torch.randn_like(x)
    wanted = (x_adv - x).flatten(1).norm(dim=1) / noise.flatten(1).norm(dim=1)
    return {"clean": x, "adversarial": x_adv, "noise": (x + wanted.reshape(-1, 1, 1, 1) * noise).clamp(0, 1)}


def _curve(attack: str, towards: Towards, measure: Measure, values: dict[str, Tensor]) -> InfluenceCurve:
    means = {name: each.double().mean(0) for name, each in values.items()}
    order = means["clean"].sort(descending=True, stable=True).indices
    sorted_means = [tuple(means[name][order].tolist()) for name in ("clean", "adversarial", "noise")]
    return InfluenceCurve(attack, towards, measure, len(values["clean"]), tuple(order.tolist()), *sorted_means)


def _changes(
    attack: str, towards: Towards, measure: Measure, values: dict[str, Tensor], chosen: Neurons
) -> list[GroupChange]:
    groups: dict[Group, Tensor] = {"front": chosen.front, "remaining": chosen.remaining, "tail": chosen.tail}
    changes = []
    for moved in ("adversarial", "noise"):
        for group, neurons in groups.items():
            if not neurons.shape[1]:
                continue
            before, after = (values[name].gather(1, neurons).mean(1) for name in ("clean", moved))
            means = (float(before.mean()), float(after.mean()))
            counts = (Share.of(after < before), Share.of(after > before))
            changes.append(GroupChange(attack, towards, measure, moved, group, neurons.shape[1], *means, *counts))
    return changes
