"""Examples of an evaluation's rows as pictures."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from defenses.evaluation.meter import Sample
from service.evaluation.document import DefenseReport, EvaluationReport
from service.evaluation_report.tables import by_name
from service.report_parts.pictures import difference_picture, picture

MOST_STRIPS = 8
"""Rows of pictures that are shown of one attack where each defense has its own: those of the first defenses."""

MOST_ANSWERS = 24
"""Answers that are shown of one attack, over all defenses, where they are given the same examples."""


@dataclass(frozen=True)
class Answered:
    """Hold one defense's answer to an example: the purified image as a picture, the label, and what came of it."""

    defense: DefenseReport
    purified: str
    label: str
    right: bool
    alerted: bool

    @property
    def resisted(self) -> bool:
        """Whether the example is answered with the true class or alerted."""
        return self.right or self.alerted


@dataclass(frozen=True)
class Strip:
    """Hold the pictures of one example: data URIs of PNGs, the difference multiplied by ``times``.

    ``undefended`` is what the bare classifier answers; ``answers`` has one entry for each defense that was given it.
    """

    clean: str
    adversarial: str
    difference: str
    times: int
    true: str
    undefended: str
    answers: tuple[Answered, ...]


@dataclass(frozen=True)
class SampleGroup:
    """Hold the examples of one attack in one scenario; of ``unshown`` defenses, each with its own, there are none."""

    scenario: str
    attack: str
    strips: tuple[Strip, ...]
    unshown: int = 0


def sample_groups(report: EvaluationReport, samples: Sequence[Sample]) -> tuple[SampleGroup, ...]:
    """Return the examples by scenario and attack.

    In scenario A all defenses are given the same example, which makes one strip; in the others each has its own.
    """
    placed = sorted(samples, key=lambda sample: (sample.scenario, _first_place(samples, sample)))
    return tuple(
        _group(report, scenario, attack, list(found))
        for (scenario, attack), found in groupby(placed, key=lambda sample: (sample.scenario, sample.attack))
    )


def _first_place(samples: Sequence[Sample], sample: Sample) -> int:
    return next(place for place, each in enumerate(samples) if each.attack == sample.attack)


def _group(report: EvaluationReport, scenario: str, attack: str, samples: Sequence[Sample]) -> SampleGroup:
    by_defense = [list(found) for _, found in groupby(samples, key=lambda sample: sample.defense)]
    if scenario == "A":
        same = list(zip(*by_defense, strict=True))[: max(1, MOST_ANSWERS // len(by_defense))]
        return SampleGroup(scenario, attack, tuple(_strip(report, each) for each in same))
    most = max(1, MOST_STRIPS // len(by_defense))
    own = [sample for found in by_defense[:MOST_STRIPS] for sample in found[:most]]
    strips = tuple(_strip(report, [sample]) for sample in own)
    return SampleGroup(scenario, attack, strips, max(0, len(by_defense) - MOST_STRIPS))


def _strip(report: EvaluationReport, same: Sequence[Sample]) -> Strip:
    """Return the pictures of one example that was given to one or more defenses."""
    first = same[0]
    difference, times = difference_picture(first.adversarial - first.clean)
    defenses, labels = by_name(report), report.labels
    return Strip(
        clean=picture(first.clean),
        adversarial=picture(first.adversarial),
        difference=difference,
        times=times,
        true=labels[first.true_class],
        undefended=labels[first.undefended_class],
        answers=tuple(
            Answered(
                defenses[each.defense],
                picture(each.purified),
                labels[each.answered_class],
                each.answered_class == each.true_class,
                each.alerted,
            )
            for each in same
        ),
    )
