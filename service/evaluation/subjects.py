"""The versions that are evaluated together."""

from collections.abc import Sequence
from dataclasses import dataclass

from defenses.baselines.additive_noise import AdditiveNoise
from defenses.baselines.identity import Identity
from defenses.classifier import Classifier
from defenses.coophance import Regulator
from defenses.detector import NoDetector
from defenses.protected import ProtectedClassifier
from model_store import DataRecord, Fetched, Manifest, Store, parse_reference
from service.defended import load_defended
from service.fit import find_classifier
from service.served import GRAPH


class SubjectsUnlike(ValueError):
    """Versions that are to be evaluated together have other classifiers, or were fitted on other images."""

    def __init__(self, first: str, other: str, what: str) -> None:
        super().__init__(
            f"Expected versions with one and the same {what}, got {first} and {other}, which differ in it."
        )


@dataclass(frozen=True)
class Subject:
    """A published version: what is on record of it, and its classifier behind its defense, on the CPU.

    A version without a defense is the classifier behind none, a control.
    """

    name: str
    fetched: Fetched
    classifier: Fetched
    protected: ProtectedClassifier

    @property
    def manifest(self) -> Manifest:
        """The manifest of the version."""
        return self.fetched.manifest

    @property
    def noisy_by_design(self) -> bool:
        """Whether there is noise in the defense that can be switched off."""
        return isinstance(self.protected.purifier, Regulator | AdditiveNoise)

    @property
    def method(self) -> str:
        """How the defense was made: coophance, nip, the method of a baseline, adversarial-training, or none."""
        manifest = self.manifest
        plan = manifest.options.get("plan")
        if manifest.kind == "baseline" and isinstance(plan, dict):
            return str(plan["method"])
        if manifest.parent is not None:
            return manifest.kind
        # A classifier that is on record with the data it was trained on was trained here, adversarially.
        return "none" if manifest.data is None else "adversarial-training"


def load_subjects(store: Store, names: Sequence[str]) -> tuple[Subject, ...]:
    """Fetch versions of one classifier, fitted on one set of images as far as they were fitted.

    Raises the store's errors, ``SubjectsUnlike``, ``ParentChanged``, ``CheckpointUnreadable`` and
    ``ClassifierMismatch``.
    """
    subjects = tuple(_load(store, name) for name in dict.fromkeys(names))
    first = subjects[0]
    for other in subjects[1:]:
        if other.classifier.digest != first.classifier.digest:
            raise SubjectsUnlike(first.name, other.name, "classifier")
    fitted = [each for each in subjects if each.manifest.data is not None]
    for other in fitted[1:]:
        if _images(other.manifest.data) != _images(fitted[0].manifest.data):
            raise SubjectsUnlike(fitted[0].name, other.name, "images and splits that they were fitted on")
    return subjects


def undefended(classifier: Classifier) -> ProtectedClassifier:
    """Return a classifier behind no defense."""
    return ProtectedClassifier(classifier, Identity(), NoDetector()).eval()


def _load(store: Store, text: str) -> Subject:
    name, reference = parse_reference(text)
    fetched = store.fetch(name, reference)
    manifest = fetched.manifest
    found = find_classifier(store, name, manifest.version)
    if manifest.parent is None:
        protected = undefended(Classifier.load(found.folder / GRAPH).eval())
    else:
        _, protected = load_defended(store, name, manifest.version)
    return Subject(f"{manifest.name}@{manifest.version}", fetched, found, protected)


def _images(record: DataRecord | None) -> tuple[str, int] | None:
    return None if record is None else (record.digest, record.split_seed)
