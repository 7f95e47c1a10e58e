"""Which images fit a defense, calibrate its threshold and test it."""

import math
from collections.abc import Sequence
from itertools import zip_longest

import numpy as np

from service.datasets.errors import ClassTooSmall, SingleClass
from service.datasets.sources import Item

MIN_CALIBRATION = 20


def split_items(
    items: Sequence[Item], labels: Sequence[str], seed: int, limit: int | None
) -> tuple[list[Item], list[Item], list[Item]]:
    """Split images into fit, calibration and test; disjoint, stratified by class, the same for the same seed.

    Where there is a test part it is the test split, and 10 % of the other images calibrate. Otherwise 70 % fit, 15 %
    calibrate and 15 % test. Calibration gets at least 20 images in all, enough for a quantile at 5 %, as long as the
    classes have them: it never takes more than an equal share of a small class. The classes take turns within each
    split, and `limit` keeps the first images of each.

    Raises SingleClass, and ClassTooSmall where a class would be missing from a split.
    """
    if len(labels) < 2:
        raise SingleClass(labels[0])
    by_class: dict[str, list[Item]] = {label: [] for label in sorted(labels)}
    held_out: dict[str, list[Item]] = {label: [] for label in sorted(labels)}
    for item in sorted(items, key=lambda item: item.name):
        (held_out if item.part == "test" else by_class)[item.label].append(item)
    has_test = any(item.part == "test" for item in items)
    draws, share = (2, 0.10) if has_test else (3, 0.15)
    _check_sizes(by_class, draws, "to fit and calibrate on" if has_test else "to be split")
    if has_test:
        _check_sizes(held_out, 1, "to test on")

    fit, calibration, test = [], [], []
    for position, label in enumerate(by_class):
        generator = np.random.default_rng([seed, position])
        members = _shuffled(by_class[label], generator)
        floor = min(math.ceil(MIN_CALIBRATION / len(labels)), len(members) // draws)
        size = max(round(share * len(members)), floor)
        calibration.append(members[:size])
        test.append(_shuffled(held_out[label], generator) if has_test else members[size : 2 * size])
        fit.append(members[size if has_test else 2 * size :])
    return _in_turns(fit)[:limit], _in_turns(calibration)[:limit], _in_turns(test)[:limit]


def _check_sizes(by_class: dict[str, list[Item]], least: int, part: str) -> None:
    small = {label: len(members) for label, members in by_class.items() if len(members) < least}
    if small:
        raise ClassTooSmall(part, least, small)


def _shuffled(members: Sequence[Item], generator: np.random.Generator) -> list[Item]:
    return [members[index] for index in generator.permutation(len(members))]


def _in_turns(classes: Sequence[Sequence[Item]]) -> list[Item]:
    return [item for turn in zip_longest(*classes) for item in turn if item is not None]
