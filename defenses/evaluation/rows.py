"""What an evaluation says of one attack on one defense."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

from defenses.attacks import Attack, Form
from defenses.evaluation.measurement import ExampleRow
from defenses.evaluation.plan import Scenario
from defenses.evaluation.rates import CleanRow, Interval, interval_of


@dataclass(frozen=True)
class Rate:
    """A share as the mean over noises, that under each noise, and the Clopper-Pearson interval at 95 % of the mean.

    The interval is that of the mean's count of the images, rounded to a whole one. It is as wide as under one noise:
    what the mean over several of them averages out is not taken off.
    """

    mean: float
    by_seed: tuple[float, ...]
    interval: Interval

    @classmethod
    def over(cls, shares: Sequence[float | None], of: int) -> Self | None:
        """Return the rate of shares of so many images, one for each noise; None where there is none."""
        known = tuple(share for share in shares if share is not None)
        if not known:
            return None
        mean = sum(known) / len(known)
        return cls(mean, known, interval_of(round(mean * of), of))


@dataclass(frozen=True)
class CleanResult:
    """What a defense does to clean images: each rate over all noises, and the bare classifier's accuracy."""

    images: int
    undefended_accuracy: float
    accuracy: Rate
    accepted_accuracy: Rate
    false_positive_rate: Rate

    @classmethod
    def over(cls, rows: Sequence[CleanRow]) -> Self:
        """Gather what was counted under each noise, of the same images."""
        names = ("accuracy", "accepted_accuracy", "false_positive_rate")
        images = rows[0].images
        rates = [Rate.over([getattr(row, name) for row in rows], images) for name in names]
        accuracy, accepted, false_positives = (rate for rate in rates if rate is not None)
        return cls(images, rows[0].undefended_accuracy, accuracy, accepted, false_positives)


@dataclass(frozen=True)
class SubstituteResult:
    """What a substitute of a defense cost and how well it stands in.

    The defense answered ``queries`` images that it was trained on, and ``held_out`` others to measure it by: of those
    the share ``agreement`` gets the defense's label, and ``commonest_share`` is what one constant answer would have.
    """

    queries: int
    held_out: int
    agreement: float
    commonest_share: float


@dataclass(frozen=True)
class AttackResult:
    """What a defense does to one attack's examples in one form.

    In scenario A all rates are over the ``fooling`` of the ``attempted`` images, those that fool the bare classifier in
    that form; in the others over all attempts, and ``fooling`` is how many are then answered wrongly, rounded from the
    mean over the noises. ``distortion_l2`` and ``distortion_linf`` are mean distances of those that ``fooling`` counts,
    in scenarios other than A under the first noise, for values in [0, 1].
    ``corrected``, ``alerted`` and ``resisted`` are those of an ``ExampleRow``. ``resisted_of_attempts`` counts attempts
    that do not fool as resisted, and ``resisted_of_fooling`` none of them. ``success_within`` is the share of those
    images, up to as many as a lottery takes, that are once answered wrongly and not alerted within so many submissions.
    ``seconds_per_image`` is what crafting took. ``untrusted`` names the sanity checks that the row fails, ``checked``
    those that looked at it, passed or failed: where there is none nothing speaks for the attack. ``substitute`` tells
    of the one that the examples were crafted on, in scenario transfer.
    """

    defense: str
    scenario: Scenario
    attack: str
    family: str
    parameters: dict[str, float]
    norm: str
    sees: str
    form: Form
    attempted: int
    fooling: int
    distortion_l2: float | None
    distortion_linf: float | None
    corrected: Rate | None
    alerted: Rate | None
    resisted: Rate | None
    resisted_of_attempts: float | None
    resisted_of_fooling: float | None
    auc: float | None
    detector_auc: float | None
    curve: tuple[tuple[float, float], ...]
    success_within: dict[str, float] | None
    seconds_per_image: float
    untrusted: tuple[str, ...] = ()
    checked: tuple[str, ...] = ()
    substitute: SubstituteResult | None = None

    @property
    def unchecked(self) -> bool:
        """Whether no sanity check looked at the row."""
        return not self.checked

    @classmethod
    def over(
        cls,
        rows: Sequence[ExampleRow],
        *,
        defense: str,
        scenario: Scenario,
        attack: Attack,
        success_within: dict[int, float] | None,
        seconds_per_image: float,
        substitute: SubstituteResult | None = None,
    ) -> Self:
        """Gather what was measured under each noise, of the same examples."""
        first = rows[0]
        counted = first.fooling
        corrected, alerted, resisted = (
            Rate.over([getattr(row, name) for row in rows], counted) for name in ("corrected", "alerted", "resisted")
        )
        wrong = 0.0 if corrected is None else 1 - corrected.mean
        evading = 0.0 if resisted is None else 1 - resisted.mean
        return cls(
            defense=defense,
            scenario=scenario,
            attack=attack.name,
            family=attack.family,
            parameters=dict(attack.parameters),
            norm=attack.facts.norm,
            sees=attack.facts.sees,
            form=first.form,
            attempted=first.attempted,
            fooling=counted if scenario == "A" else round(wrong * counted),
            distortion_l2=first.distortion_l2 if scenario == "A" else first.missed_l2,
            distortion_linf=first.distortion_linf if scenario == "A" else first.missed_linf,
            corrected=corrected,
            alerted=alerted,
            resisted=resisted,
            resisted_of_attempts=1 - evading * counted / first.attempted if first.attempted else None,
            resisted_of_fooling=_of_fooling(scenario, resisted, evading, wrong),
            auc=first.auc,
            detector_auc=first.detector_auc,
            curve=first.curve,
            success_within=None if success_within is None else {str(n): share for n, share in success_within.items()},
            seconds_per_image=seconds_per_image,
            substitute=substitute,
        )


def _of_fooling(scenario: Scenario, resisted: Rate | None, evading: float, wrong: float) -> float | None:
    if resisted is None or scenario == "A":
        return None if resisted is None else resisted.mean
    return 1 - evading / wrong if wrong else None


@dataclass(frozen=True)
class SweepResult:
    """The robust accuracy as one parameter of an attack takes several values.

    ``robust_accuracy`` is, of the attempted images, the share that is answered rightly or alerted, as crafted, and
    ``distortion_l2`` the mean distance, each as the row of that value has it, which ``attacks`` names. ``untrusted``
    says whether that row fails a sanity check, ``unchecked`` whether none looked at it.
    """

    defense: str
    scenario: Scenario
    sweep: str
    parameter: str
    values: tuple[float, ...]
    attacks: tuple[str, ...]
    robust_accuracy: tuple[float, ...]
    distortion_l2: tuple[float | None, ...]
    untrusted: tuple[bool, ...]
    unchecked: tuple[bool, ...]


@dataclass(frozen=True)
class Check:
    """What a sanity check found: ``told`` in a sentence, and ``attacks`` on a ``defense`` that are not to be trusted.

    ``passed`` is None where there was nothing to compare with, so that nothing was checked, and ``told`` says what was
    missing. ``defense`` is None where the check is of the attack on the bare classifier.
    """

    name: str
    passed: bool | None
    told: str
    defense: str | None
    scenario: Scenario
    attacks: tuple[str, ...] = field(default=())
