"""Measuring a running gateway from outside: clean and adversarial images through HTTP."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
import torch

from defenses.attacks import AdversarialExamples, attack, craft
from defenses.classifier import Classifier
from defenses.evaluation import Progress
from service.client import Client, Served, Told
from service.datasets import Split
from service.settings import Mode


@dataclass(frozen=True)
class Measured:
    """What came back for one kind of input.

    ``images`` uint8 (N, C, H, W) as sent, their true classes and the bare answers (N,), and what was told.
    """

    kind: str
    images: np.ndarray
    targets: np.ndarray
    bare: np.ndarray
    told: Told
    examples: AdversarialExamples | None = None


@dataclass(frozen=True)
class CleanRow:
    """What the gateway did to clean images.

    ``accuracy`` counts an answer as right whether or not it is alerted; ``accepted_accuracy`` counts an alert as an
    error. ``undefended_accuracy`` is the bare classifier's.
    """

    images: int
    undefended_accuracy: float
    accuracy: float
    accepted_accuracy: float
    false_positive_rate: float

    @classmethod
    def of(cls, measured: Measured) -> Self:
        """Count clean images."""
        right = measured.told.class_index == measured.targets
        return cls(
            images=len(right),
            undefended_accuracy=float((measured.bare == measured.targets).mean()),
            accuracy=float(right.mean()),
            accepted_accuracy=float((right & ~measured.told.alerted).mean()),
            false_positive_rate=float(measured.told.alerted.mean()),
        )


@dataclass(frozen=True)
class AttackRow:
    """What the gateway did to one attack's examples, crafted on the bare classifier (scenario A).

    ``fooling`` of the ``attempted`` images fool the bare classifier after rounding to 8 bits (``fooling_unrounded``
    before); the rates are over those. ``corrected`` are answered with the true class, and ``resisted`` are that or
    alerted (section 4.1.1).
    """

    attack: str
    attempted: int
    fooling: int
    fooling_unrounded: int
    distortion_l2: float
    undefended_accuracy: float
    corrected: float
    alerted: float
    resisted: float

    @classmethod
    def of(cls, measured: Measured, examples: AdversarialExamples) -> Self:
        """Count one attack's examples."""
        corrected = measured.told.class_index == measured.targets
        return cls(
            attack=measured.kind,
            attempted=len(examples.y),
            fooling=int(examples.fooled.sum()),
            fooling_unrounded=int(examples.fooled_unrounded.sum()),
            distortion_l2=examples.distortion,
            undefended_accuracy=float((measured.bare == measured.targets).mean()),
            corrected=float(corrected.mean()),
            alerted=float(measured.told.alerted.mean()),
            resisted=float((corrected | measured.told.alerted).mean()),
        )


@dataclass(frozen=True)
class Report:
    """A measurement of one version in service, in its mode.

    Under ``enforce`` an alerted image gets no answer, which ``accuracy`` and ``corrected`` count as wrong.
    """

    model: str
    version: str
    mode: Mode
    clean: CleanRow
    attacks: tuple[AttackRow, ...]

    @classmethod
    def of(cls, model: str, served: Served, measured: Sequence[Measured]) -> Self:
        """Count what was measured: clean images first, then each attack's."""
        attacks = tuple(AttackRow.of(each, each.examples) for each in measured if each.examples)
        return cls(model, served.version, served.mode, CleanRow.of(measured[0]), attacks)

    def as_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return asdict(self)


def measure(
    client: Client,
    model: str,
    classifier: Classifier,
    test: Split,
    *,
    attacks: Sequence[str],
    limit: int,
    seed: int,
    progress: Progress,
) -> list[Measured]:
    """Send clean and adversarial test images to a gateway and gather what comes back, the clean ones first.

    ``limit`` images of each kind, taken from ``test`` in a seeded random order; ``classifier`` is the bare one that
    the attacks are crafted on. Of an attack's images only those that fool it are sent. Raises the client's errors and
    ``ValueError`` when an attack fools nothing.
    """
    order = np.random.default_rng(seed).permutation(len(test.targets))
    images, targets = test.images[order], test.targets[order]
    progress("clean", 0, 1)
    told = client.classify(model, images[:limit])
    progress("clean", 1, 1)
    measured = [Measured("clean", images[:limit], targets[:limit], _answers(classifier, images[:limit]), told)]
    for name in attacks:

        def advance(done: int, total: int, name: str = name) -> None:
            progress(name, done, total)

        examples = craft(
            attack(name),
            classifier,
            torch.from_numpy(images),
            torch.from_numpy(targets),
            limit=limit,
            device=torch.device("cpu"),
            seed=seed,
            progress=advance,
        )
        if not examples.fooled.any():
            raise ValueError(f"Attack {name} fools the bare classifier on none of {len(examples.y)} images.")
        crafted = (examples.x_adv[examples.fooled] * 255).round().to(torch.uint8).numpy()
        told = client.classify(model, crafted)
        true = examples.y[examples.fooled].numpy()
        measured.append(Measured(name, crafted, true, _answers(classifier, crafted), told, examples))
    return measured


@torch.no_grad()
def _answers(classifier: Classifier, images: np.ndarray) -> np.ndarray:
    batches = torch.from_numpy(images).split(128)
    return torch.cat([classifier(batch.float() / 255).argmax(1) for batch in batches]).numpy()
