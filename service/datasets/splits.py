"""Which images a defense is fitted, chosen, calibrated and tested on."""

import math
from collections.abc import Sequence
from itertools import zip_longest
from typing import NamedTuple

import numpy as np

from service.datasets.errors import ClassTooSmall, SingleClass
from service.datasets.sources import Item

MIN_CALIBRATION = 20


class Items(NamedTuple):
    """The images of each split; none is in two."""

    fit: list[Item]
    validation: list[Item]
    calibration: list[Item]
    test: list[Item]


def split_items(items: Sequence[Item], labels: Sequence[str], seed: int, limit: int | None) -> Items:
    """Split images to fit, validate, calibrate and test on; stratified by class, the same for the same seed.

    Where there is a test part, 20 % of it validate, 20 % calibrate and 60 % test, and all the other images fit: a
    classifier is surer of images that it was trained on, so that a threshold set on those alerts too often on others.
    Otherwise 10 % validate, 15 % calibrate, 15 % test and the rest fit. Calibration gets at least 20 images in all,
    enough for a quantile at 5 %, as long as the classes have them: it never takes more than an equal share of a small
    class. The classes take turns within each split, and `limit` keeps the first images of each.

    Raises SingleClass, and ClassTooSmall where a class would be missing from a split.
    """
    if len(labels) < 2:
        raise SingleClass(labels[0])
    by_class: dict[str, list[Item]] = {label: [] for label in sorted(labels)}
    held_out: dict[str, list[Item]] = {label: [] for label in sorted(labels)}
    for item in sorted(items, key=lambda item: item.name):
        (held_out if item.part == "test" else by_class)[item.label].append(item)
    has_test = any(item.part == "test" for item in items)
    if has_test:
        _check_sizes(by_class, 1, "to fit on")
        _check_sizes(held_out, 3, "to validate, calibrate and test on")
    else:
        _check_sizes(by_class, 4, "to be split")

    turns: list[list[list[Item]]] = [[] for _ in Items._fields]
    for position, label in enumerate(by_class):
        generator = np.random.default_rng([seed, position])
        members, others = _shuffled(by_class[label], generator), _shuffled(held_out[label], generator)
        if has_test:
            parts = [members, *_cut(others, (0.2, 0.2), len(labels))]
        else:
            validation, calibration, test, fit = _cut(members, (0.1, 0.15, 0.15), len(labels))
            parts = [fit, validation, calibration, test]
        for turn, part in zip(turns, parts, strict=True):
            turn.append(part)
    return Items(*(_in_turns(turn)[:limit] for turn in turns))


def _cut(members: list[Item], shares: Sequence[float], classes: int) -> list[list[Item]]:
    """Cut off a share of a class for each of ``shares``, the second being calibration's, and return the rest last."""
    least = [1] * len(shares)
    least[1] = max(1, min(math.ceil(MIN_CALIBRATION / classes), len(members) // (len(shares) + 1)))
    parts, start = [], 0
    for share, floor in zip(shares, least, strict=True):
        size = max(round(share * len(members)), floor)
        parts.append(members[start : start + size])
        start += size
    return [*parts, members[start:]]


def _check_sizes(by_class: dict[str, list[Item]], least: int, part: str) -> None:
    small = {label: len(members) for label, members in by_class.items() if len(members) < least}
    if small:
        raise ClassTooSmall(part, least, small)


def _shuffled(members: Sequence[Item], generator: np.random.Generator) -> list[Item]:
    return [members[index] for index in generator.permutation(len(members))]


def _in_turns(classes: Sequence[Sequence[Item]]) -> list[Item]:
    return [item for turn in zip_longest(*classes) for item in turn if item is not None]
