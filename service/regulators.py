"""Regulators as versions of their own: found and checked to be used again, or published."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from defenses.checkpoint import load_regulator
from defenses.coophance import Regulator
from model_store import Fetched, InputSpec, Manifest, NameInvalid, Store, parse_reference

REGULATORS = "regulators"
"""The folder of the store that keeps Regulators, beside the models."""


class RegulatorUnfit(ValueError):
    """A Regulator was fitted for images that are not the classifier's; `expected` and `found` say how they differ."""

    def __init__(self, reference: str, what: str, expected: object, found: object) -> None:
        super().__init__(
            f"The Regulator {reference} does not fit the classifier: expected {what} {expected}, got {found}."
        )
        self.reference = reference
        self.expected = expected
        self.found = found


class RegulatorNotFound(KeyError):
    """No such Regulator is in the store."""

    def __init__(self, reference: str, folder: Path, present: Sequence[str]) -> None:
        self.message = f"There is no Regulator {reference} in {folder}; there are: {', '.join(present) or 'none'}."
        super().__init__(self.message)
        self.reference = reference

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True)
class PublishedRegulator:
    """A Regulator from the store, in evaluation mode and at full strength, with its manifest and the digest of that.

    The strength that it was published with was chosen for another classifier.
    """

    regulator: Regulator
    manifest: Manifest
    digest: str

    @property
    def reference(self) -> str:
        """The version, as NAME@VERSION."""
        return f"{self.manifest.name}@{self.manifest.version}"


def regulator_name(dataset: str, shape: Sequence[int]) -> str:
    """Return the name that a Regulator of a data set is published under, such as ``cifar10-3x32x32``."""
    stem = re.sub(r"[^a-z0-9]+", "-", dataset.lower()).strip("-") or "images"
    return f"{stem[:40]}-{'x'.join(str(side) for side in shape)}"


def find_regulator(root: Path, reference: str, classifier: InputSpec) -> PublishedRegulator:
    """Fetch a Regulator, given as NAME@VERSION, and check that it purifies the images of a classifier.

    ``root`` is the store's folder. Shape, mode and range of the images must be the classifier's; how the classifier
    normalises them is its own affair. Raises ``RegulatorNotFound``, ``RegulatorUnfit``, ``NameInvalid`` for a
    reference without a number, ``CheckpointUnreadable``, and the store's errors.
    """
    name, version = parse_reference(reference)
    if not isinstance(version, int):
        raise NameInvalid(reference, "a Regulator is given as NAME@VERSION, such as cifar10-3x32x32@1")
    store = Store.open(root / REGULATORS)
    if version not in store.versions(name):
        present = [f"{each}@{number}" for each in store.models() for number in store.versions(each)]
        raise RegulatorNotFound(reference, root / REGULATORS, present)
    fetched = store.fetch(name, version)
    _check_input(reference, fetched, classifier)
    regulator = load_regulator(fetched.folder)
    if tuple(regulator.config.image_shape) != classifier.shape:
        raise RegulatorUnfit(reference, "images of shape", classifier.shape, tuple(regulator.config.image_shape))
    regulator.set_strength(1.0)
    return PublishedRegulator(regulator, fetched.manifest, fetched.digest)


def _check_input(reference: str, fetched: Fetched, classifier: InputSpec) -> None:
    if fetched.manifest.kind != "regulator":
        raise RegulatorUnfit(reference, "a version of kind", "regulator", fetched.manifest.kind)
    its = fetched.manifest.input
    for what, expected, found in (
        ("images of shape", classifier.shape, its.shape),
        ("images of mode", classifier.mode, its.mode),
        ("values in the range", classifier.range, its.range),
    ):
        if expected != found:
            raise RegulatorUnfit(reference, what, expected, found)


def other_data_told(published: PublishedRegulator, name: str, digest: str) -> str | None:
    """Return a sentence where a Regulator was fitted on another data set than this one, else None."""
    data = published.manifest.data
    if data is not None and data.digest == digest:
        return None
    its = "an unknown data set" if data is None else f"{data.name} ({data.digest[:12]})"
    return (
        f"The Regulator {published.reference} was fitted on {its}, this fit is on {name} ({digest[:12]}): "
        "what it purifies may not be what this classifier sees."
    )
