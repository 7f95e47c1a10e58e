"""Measuring a running gateway from outside: clean and adversarial images through HTTP."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

import httpx
import numpy as np
import torch

from defenses.attacks import AdversarialExamples, Attack, attack, craft
from defenses.attacks.examples import mean_distance
from defenses.classifier import Classifier
from defenses.evaluation import Progress
from defenses.evaluation.plan import EvaluationPlan
from defenses.evaluation.rates import CleanRow, Interval, exact_interval, rate
from service.client import Client, GatewayRefused, Served, Told
from service.datasets import Split
from service.http_victim import BLIND, AttackSeesTooMuch, HttpExamples, HttpVictim, attack_through
from service.settings import Mode

CraftedOn = Literal["classifier", "gateway"]
"""What attacks are crafted on: the bare classifier, gradients and all, or the gateway, which tells labels alone."""

TOO_MANY = 429
MOST_WAITS = 10
LONGEST_WAIT = 30.0
"""The status of a gateway that has no room, how often one request waits for it, and at most how many seconds each."""


class PatientClient(Client):
    """Ask a gateway, and where it has no room ask again, up to 10 times a request.

    It is asked after as many seconds as its Retry-After says, or 1 where that says none, and 30 at most. ``waits``
    counts how often that was so.
    """

    def __init__(self, url: str, timeout: float = 60.0) -> None:
        super().__init__(url, timeout)
        self.waits = 0
        self._after = ""
        self._http.event_hooks = {"response": [self._note]}

    def _note(self, answer: httpx.Response) -> None:
        self._after = answer.headers.get("Retry-After", "")

    def _ask(self, method: str, path: str, **parts: Any) -> httpx.Response:
        for _ in range(MOST_WAITS):
            try:
                return super()._ask(method, path, **parts)
            except GatewayRefused as refused:
                if refused.status != TOO_MANY:
                    raise
            self.waits += 1
            time.sleep(min(float(self._after) if self._after.isdecimal() else 1.0, LONGEST_WAIT))
        return super()._ask(method, path, **parts)


@dataclass(frozen=True)
class Measured:
    """What came back for one kind of input.

    ``images`` uint8 (N, C, H, W) as sent, their true classes and the bare answers (N,), and what was told. ``examples``
    are all that were crafted, of which those that fool the bare classifier after rounding to 8 bits are sent.
    """

    kind: str
    images: np.ndarray
    targets: np.ndarray
    bare: np.ndarray
    told: Told
    examples: AdversarialExamples | None = None

    @property
    def right(self) -> torch.Tensor:
        """Which images are answered with the true class, bool (N,)."""
        return torch.from_numpy(self.told.class_index == self.targets)

    @property
    def undefended_right(self) -> torch.Tensor:
        """Which images the bare classifier answers with the true class, bool (N,)."""
        return torch.from_numpy(self.bare == self.targets)

    @property
    def alerted(self) -> torch.Tensor:
        """Which images are alerted, bool (N,)."""
        return torch.from_numpy(self.told.alerted)


@dataclass(frozen=True)
class AttackRow:
    """What the gateway did to one attack's examples, crafted on the bare classifier (scenario A).

    ``fooling`` of the ``attempted`` images fool the bare classifier after rounding to 8 bits and are sent
    (``fooling_as_crafted`` before rounding); everything else is over those, and None where there are none.
    ``corrected`` are answered with the true class, and ``resisted`` are that or alerted (section 4.1.1), with the
    Clopper-Pearson interval at 95 %.
    """

    attack: str
    crafted_on: CraftedOn
    attempted: int
    fooling: int
    fooling_as_crafted: int
    distortion_l2: float | None
    undefended_accuracy: float | None = None
    corrected: float | None = None
    alerted: float | None = None
    resisted: float | None = None
    resisted_interval: Interval | None = None

    @classmethod
    def of(cls, measured: Measured, examples: AdversarialExamples) -> Self:
        """Count one attack's examples."""
        counted: tuple[str, CraftedOn, int, int, int, float | None] = (
            *(measured.kind, "classifier", len(examples.y)),
            len(measured.targets),
            int(examples.fooled.sum()),
            examples.distortion_rounded,
        )
        if not len(measured.targets):
            return cls(*counted)
        resisted = measured.right | measured.alerted
        return cls(
            *counted,
            undefended_accuracy=rate(measured.undefended_right),
            corrected=rate(measured.right),
            alerted=rate(measured.alerted),
            resisted=rate(resisted),
            resisted_interval=exact_interval(resisted),
        )


@dataclass(frozen=True)
class GatewayRow:
    """What one attack did to the gateway that was told its answers and nothing else.

    Of the images that the gateway does not misclassify as they are, ``attempted`` were attacked. A success is answered
    wrongly and not alerted when it is sent once more; ``success_rate`` has the Clopper-Pearson interval at 95 %.
    ``queries_mean`` and ``queries_max`` say how many images the attack had answered to get there from one image, and
    ``distortion_l2`` is the mean distance of the successes, for images in [0, 1]; None where there are none.
    """

    attack: str
    crafted_on: CraftedOn
    attempted: int
    successes: int
    success_rate: float
    success_interval: Interval
    queries_mean: float
    queries_max: int
    distortion_l2: float | None

    @classmethod
    def of(cls, examples: HttpExamples) -> Self:
        """Count one attack's examples."""
        fooled = examples.fooled
        return cls(
            examples.attack.name,
            "gateway",
            len(fooled),
            int(fooled.sum()),
            rate(fooled),
            exact_interval(fooled),
            float(examples.queries.double().mean()),
            int(examples.queries.max()),
            mean_distance(examples.x[fooled], examples.x_adv[fooled]),
        )


@dataclass(frozen=True)
class Report:
    """A measurement of one version in service, in its mode.

    Under ``enforce`` an alerted image gets no answer, which ``accuracy`` and ``corrected`` count as wrong. ``attacks``
    were crafted on the bare classifier, ``searches`` on the gateway; ``waits`` counts how often that had no room.
    """

    model: str
    version: str
    mode: Mode
    clean: CleanRow
    attacks: tuple[AttackRow, ...]
    searches: tuple[GatewayRow, ...]
    waits: int

    @classmethod
    def of(
        cls,
        model: str,
        served: Served,
        measured: Sequence[Measured],
        found: Sequence[HttpExamples] = (),
        waits: int = 0,
    ) -> Self:
        """Count what was measured: clean images first, then each attack's; and what was ``found`` by answers."""
        first = measured[0]
        clean = CleanRow.count(undefended_right=first.undefended_right, right=first.right, alerted=first.alerted)
        attacks = tuple(AttackRow.of(each, each.examples) for each in measured if each.examples is not None)
        searches = tuple(GatewayRow.of(each) for each in found)
        return cls(model, served.version, served.mode, clean, attacks, searches, waits)

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
    the attacks are crafted on. Of an attack's images only those that fool it after rounding to 8 bits are sent, which
    may be none. Raises the client's errors, and ``AttackUnknown`` before anything is sent.
    """
    known = [attack(text) for text in attacks]
    images, targets = in_seeded_order(test, seed)
    progress("clean", 0, 1)
    told = client.classify(model, images[:limit].numpy())
    progress("clean", 1, 1)
    measured = [_measured("clean", classifier, images[:limit], targets[:limit], told)]
    for each in known:

        def advance(done: int, total: int, name: str = each.name) -> None:
            progress(name, done, total)

        examples = craft(
            each,
            classifier,
            images,
            targets,
            limit=limit,
            device=torch.device("cpu"),
            seed=seed,
            progress=advance,
        )
        kept = examples.fooled_rounded
        crafted = examples.rounded[kept]
        told = client.classify(model, crafted.numpy())
        measured.append(_measured(each.name, classifier, crafted, examples.y[kept], told, examples))
    return measured


def seeing_labels_alone(attacks: Sequence[str]) -> tuple[Attack, ...]:
    """Return attacks by their names; raises ``AttackUnknown``, and ``AttackSeesTooMuch`` for one that needs more."""
    known = tuple(attack(text) for text in attacks)
    for each in known:
        if each.facts.sees not in BLIND:
            raise AttackSeesTooMuch(each)
    return known


def search(
    client: Client, model: str, classes: int, test: Split, plan: EvaluationPlan, *, progress: Progress
) -> list[HttpExamples]:
    """Attack a gateway by its answers alone, on test images in a seeded random order.

    The attacks of the plan are told one of ``classes`` labels, or of an alert. Raises what ``attack_through`` raises,
    and ``AttackUnknown`` and ``AttackSeesTooMuch`` before anything is sent.
    """
    known = seeing_labels_alone(plan.attacks)
    given = in_seeded_order(test, plan.seed)
    victim = HttpVictim(client, model, classes)
    return [
        attack_through(each, victim, *given, limit=plan.images_for(each), seed=plan.seed, progress=progress)
        for each in known
    ]


def in_seeded_order(test: Split, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a split's images (N, C, H, W) and classes (N,) in the order in which they are measured."""
    order = np.random.default_rng(seed).permutation(len(test.targets))
    return torch.from_numpy(test.images[order]), torch.from_numpy(test.targets[order])


@torch.no_grad()
def _measured(
    kind: str,
    classifier: Classifier,
    images: torch.Tensor,
    targets: torch.Tensor,
    told: Told,
    examples: AdversarialExamples | None = None,
) -> Measured:
    batches = images.split(128) if len(images) else ()
    answers = [classifier(batch.float() / 255).argmax(1) for batch in batches]
    bare = torch.cat([torch.empty(0, dtype=torch.int64), *answers])
    return Measured(kind, images.numpy(), targets.numpy(), bare.numpy(), told, examples)
