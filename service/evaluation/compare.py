"""Two evaluations beside each other: what is better in the second, what worse, and what may be chance."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import NormalDist
from typing import Any, Literal, NamedTuple

from pydantic import TypeAdapter, ValidationError

from defenses.evaluation.rates import Interval
from service.evaluation.document import SCHEMA, DefenseReport, EvaluationReport

Measure = Literal["accuracy", "false positives", "resisted"]
"""What is compared: clean accuracy, the false-positive rate, and what is resisted of an attack."""

Z = NormalDist().inv_cdf(0.975)


class ReportUnreadable(ValueError):
    """A file is no evaluation."""

    def __init__(self, path: Path, reason: str) -> None:
        self.path = path
        super().__init__(f"Expected an evaluation, as portcullis evaluate --output writes it, got {path}: {reason}")


class SchemaUnknown(ValueError):
    """An evaluation is of another schema than this version reads."""

    def __init__(self, path: Path, found: object) -> None:
        self.path, self.found = path, found
        super().__init__(f"Expected an evaluation of schema {SCHEMA}, got {path}, which is of schema {found}.")


class ReportsUnlike(ValueError):
    """Two evaluations are of different things, so that their differences are not the defenses' alone."""

    def __init__(self, unlike: Sequence[str]) -> None:
        self.unlike = tuple(unlike)
        super().__init__(f"Expected two evaluations of the same, got {'; '.join(unlike)}. Compare them --anyway.")


@dataclass(frozen=True)
class Place:
    """Say what a rate is of; clean images have no ``scenario``, ``attack``, ``parameters`` and ``form``."""

    measure: Measure
    defense: str
    method: str
    scenario: str | None = None
    attack: str | None = None
    parameters: tuple[tuple[str, float], ...] = ()
    form: str | None = None


@dataclass(frozen=True)
class Share:
    """Hold a rate, the images that it is over, and whether a check of its attack failed, or none was made."""

    rate: float
    images: int
    untrusted: bool = False
    unchecked: bool = False


@dataclass(frozen=True)
class Difference:
    """Hold a rate of either evaluation and the second less the first.

    ``place`` is as the first has it, ``second_defense`` the second's name of the defense. ``interval`` is Newcombe's at
    95 %; ``worse`` and ``better`` say that it excludes 0 on either side.
    """

    place: Place
    second_defense: str
    first: Share
    second: Share
    difference: float
    interval: Interval
    worse: bool
    better: bool

    @classmethod
    def of(cls, place: Place, second_defense: str, first: Share, second: Share) -> "Difference":
        """Return the difference of two rates of the same."""
        interval = newcombe_interval(first, second)
        rises, falls = interval[0] > 0, interval[1] < 0
        worse, better = (rises, falls) if place.measure == "false positives" else (falls, rises)
        return cls(place, second_defense, first, second, second.rate - first.rate, interval, worse, better)


@dataclass(frozen=True)
class Comparison:
    """Hold the differences, what only one evaluation has, and where the two are ``unlike`` or otherwise made.

    ``unlike`` is what forbids a comparison unless it is wanted anyway, ``notes`` what does not.
    """

    differences: tuple[Difference, ...]
    only_first: tuple[Place, ...]
    only_second: tuple[Place, ...]
    unlike: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def worse(self) -> bool:
        """Whether any rate of the second is worse beyond chance."""
        return any(each.worse for each in self.differences)

    def as_json(self) -> dict[str, Any]:
        """Return the comparison as JSON values."""
        return {**asdict(self), "worse": self.worse}


def load_report(path: Path) -> EvaluationReport:
    """Return the evaluation in a file.

    Raises ``FileNotFoundError``, ``ReportUnreadable`` and ``SchemaUnknown``, and ``OSError`` for a file that cannot be
    read.
    """
    if not path.exists():
        raise FileNotFoundError(f"There is no file {path} to compare.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ReportUnreadable(path, f"it is no JSON ({error}).") from error
    if not isinstance(values, dict) or "schema" not in values:
        raise ReportUnreadable(path, "it names no schema.")
    if values["schema"] != SCHEMA:
        raise SchemaUnknown(path, values["schema"])
    try:
        return TypeAdapter(EvaluationReport).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ReportUnreadable(path, f"{where}: {first['msg']}.") from error


def newcombe_interval(first: Share, second: Share) -> Interval:
    """Return an interval at 95 % of the second rate less the first, over one or more images each.

    Newcombe 1998, Interval estimation for the difference between independent proportions, method 10. Where both are
    over the same images, or are means over several noises, it is too wide rather than too narrow.
    """
    (low_1, high_1), (low_2, high_2) = wilson_interval(first), wilson_interval(second)
    difference = second.rate - first.rate
    return (
        difference - math.hypot(second.rate - low_2, high_1 - first.rate),
        difference + math.hypot(high_2 - second.rate, first.rate - low_1),
    )


def wilson_interval(share: Share) -> Interval:
    """Return Wilson's score interval at 95 % of a rate over one or more images (Wilson 1927)."""
    n, p = share.images, share.rate
    middle = (p + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    return middle - half, middle + half


def compare(first: EvaluationReport, second: EvaluationReport, *, anyway: bool = False) -> Comparison:
    """Compare two evaluations, rate by rate.

    A defense is matched by its digest, else by its name and method, else by its method where either has only one of it
    left; an attack by its parameters, those left to their defaults included. Raises ``ReportsUnlike``, unless the
    comparison is wanted ``anyway``, where classifier, data or attempted images are not the same.
    """
    names = _matched(first.defenses, second.defenses)
    firsts, seconds = dict(_shares(first)), dict(_shares(second))
    pairs = {place: other for place in firsts if (other := _in_second(place, names, seconds)) is not None}
    unlike = tuple(_unlike(first, second))
    if unlike and not anyway:
        raise ReportsUnlike(unlike)
    matched = set(pairs.values())
    return Comparison(
        tuple(Difference.of(place, other.defense, firsts[place], seconds[other]) for place, other in pairs.items()),
        tuple(place for place in firsts if place not in pairs),
        tuple(place for place in seconds if place not in matched),
        unlike,
        tuple(_notes(first, second)),
    )


def _matched(firsts: Sequence[DefenseReport], seconds: Sequence[DefenseReport]) -> dict[str, DefenseReport]:
    """Return the second evaluation's defense for the names of the first's."""
    found: dict[str, DefenseReport] = {}
    for by in ("digest", "name", "method"):
        left = [each for each in firsts if each.name not in found]
        taken = {each.name for each in found.values()}
        free = [each for each in seconds if each.name not in taken]
        for each in left:
            alike = [other for other in free if _same(each, other, by)]
            if len(alike) == 1 and sum(_same(rival, alike[0], by) for rival in left) == 1:
                found[each.name] = alike[0]
    return found


def _same(first: DefenseReport, second: DefenseReport, by: str) -> bool:
    return first.method == second.method and bool(getattr(first, by) == getattr(second, by))


def _in_second(place: Place, names: Mapping[str, DefenseReport], seconds: Mapping[Place, Share]) -> Place | None:
    """Return the second evaluation's place that a place of the first is compared with."""
    if place.defense not in names:
        return None
    key = _key(place, names[place.defense].name)
    return next((other for other in seconds if _key(other, other.defense) == key), None)


class _Key(NamedTuple):
    measure: Measure
    defense: str
    scenario: str | None
    family: str | None
    parameters: tuple[tuple[str, float], ...]
    form: str | None


def _key(place: Place, defense: str) -> _Key:
    family = None if place.attack is None else place.attack.partition(":")[0]
    return _Key(place.measure, defense, place.scenario, family, place.parameters, place.form)


def _shares(report: EvaluationReport) -> Iterator[tuple[Place, Share]]:
    """Yield what an evaluation says that can be compared; a row without examples that count says nothing."""
    for each in report.defenses:
        clean = each.clean
        yield Place("accuracy", each.name, each.method), Share(clean.accuracy.mean, clean.images)
        yield Place("false positives", each.name, each.method), Share(clean.false_positive_rate.mean, clean.images)
        for row in report.rows:
            if row.defense == each.name and row.resisted is not None:
                parameters = tuple(sorted(row.parameters.items()))
                images = row.fooling if row.scenario == "A" else row.attempted
                place = Place("resisted", each.name, each.method, row.scenario, row.attack, parameters, row.form)
                yield place, Share(row.resisted.mean, images, bool(row.untrusted), row.unchecked)


def _unlike(first: EvaluationReport, second: EvaluationReport) -> Iterator[str]:
    """Yield what must be the same and is not."""
    ours, theirs = first.dataset, second.dataset
    if any(ours[name] != theirs[name] for name in ("digest", "split_seed")):
        told = [f"{each['name']} ({each['digest']!s:.12}, split seed {each['split_seed']})" for each in (ours, theirs)]
        yield f"the data {told[0]} and {told[1]}"
    ours, theirs = first.classifier, second.classifier
    if ours["digest"] != theirs["digest"]:
        told = [f"{each['name']}@{each['version']} ({each['digest']!s:.12})" for each in (ours, theirs)]
        yield f"the classifiers {told[0]} and {told[1]}"
    if (first.attempted, first.plan.seed) != (second.attempted, second.plan.seed):
        yield (
            f"{first.attempted} attempted images in the order of seed {first.plan.seed} and {second.attempted} in that "
            f"of {second.plan.seed}"
        )


def _notes(first: EvaluationReport, second: EvaluationReport) -> Iterator[str]:
    """Yield what else is not the same, and may be why rates differ."""
    for each in fields(first.plan):
        ours, theirs = getattr(first.plan, each.name), getattr(second.plan, each.name)
        if ours != theirs and each.name not in ("attacks", "sweeps", "scenarios", "limit", "seed"):
            yield f"{each.name}: {ours} in the first, {theirs} in the second"
    if first.code != second.code:
        yield f"the code that crafted is another: {first.code[:12]} in the first, {second.code[:12]} in the second"
    for which, report in (("first", first), ("second", second)):
        if not report.complete:
            yield f"the {which} is not complete: time ran out"
