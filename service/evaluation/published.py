"""What the papers report, beside what was measured."""

import csv
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files

from defenses.evaluation.rates import Interval
from defenses.evaluation.rows import AttackResult

TABLE = "published.csv"
"""CoopHANCE (ISSTA 2023), tables 1 and 3: resistance rates at a false-positive rate of 5 %, and areas."""


@dataclass(frozen=True)
class PublishedRow:
    """A row that was measured, as crafted, beside the paper's for the same kind of defense, attack and scenario.

    The paper fits each defense anew on the very attack that it is tested on. ``measured_interval`` is that of the mean
    over the noises, over ``measured_of`` images, ``untrusted`` says whether the row fails a sanity check, and
    ``unchecked`` whether none looked at it.
    """

    defense: str
    method: str
    scenario: str
    attack: str
    published_resisted: float | None
    measured_resisted: float | None
    measured_interval: Interval | None
    measured_of: int
    published_auc: float | None
    measured_auc: float | None
    untrusted: bool
    unchecked: bool


def beside_published(
    rows: Iterable[AttackResult], *, dataset: str, classifier: str, methods: Mapping[str, str]
) -> tuple[PublishedRow, ...]:
    """Return what the paper says of the attacks, with their default parameters, that were measured.

    ``classifier`` is its name, which the paper's kind of classifier begins, and ``methods`` says by which method each
    defense, by its name, was made. Nothing is returned for a data set or classifier that the paper does not have.
    """
    published = {(each["scenario"], each["attack"], each["defense"]): each for each in _table(dataset, classifier)}
    return tuple(_compared(rows, published, methods))


def _compared(
    rows: Iterable[AttackResult],
    published: Mapping[tuple[str, str, str], Mapping[str, str]],
    methods: Mapping[str, str],
) -> Iterator[PublishedRow]:
    for row in rows:
        method = methods[row.defense]
        found = published.get((row.scenario, row.attack, method))
        if found is not None and row.form == "as crafted":
            yield PublishedRow(
                row.defense,
                method,
                row.scenario,
                row.attack,
                _number(found["resisted"]),
                None if row.resisted is None else row.resisted.mean,
                None if row.resisted is None else row.resisted.interval,
                row.fooling if row.scenario == "A" else row.attempted,
                _number(found["auc"]),
                row.auc,
                bool(row.untrusted),
                row.unchecked,
            )


def _table(dataset: str, classifier: str) -> list[dict[str, str]]:
    text = files("service.evaluation").joinpath(TABLE).read_text(encoding="utf-8")
    return [
        each
        for each in csv.DictReader(text.splitlines())
        if each["dataset"] == dataset.lower() and classifier.lower().startswith(each["classifier"])
    ]


def _number(text: str) -> float | None:
    return float(text) if text else None
