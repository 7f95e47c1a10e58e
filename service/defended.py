"""A published defense, from the store to tensors."""

from defenses.checkpoint import load_protected
from defenses.classifier import Classifier
from defenses.protected import ProtectedClassifier
from model_store import Fetched, Manifest, Store
from service.fit import CHECKPOINT, find_classifier
from service.served import GRAPH

DEFENSES = ("coophance", "nip", "baseline")
"""The kinds of version that hold a defense."""


class DefenseMissing(ValueError):
    """A version that is to be measured has no defense."""

    def __init__(self, manifest: Manifest) -> None:
        self.kind = manifest.kind
        super().__init__(
            f"Expected a version with a defense, got {manifest.name}@{manifest.version}, which is of kind "
            f"{manifest.kind}; a running gateway can be measured in any case, with --url."
        )


def load_defended(store: Store, name: str, ref: int | str | None) -> tuple[Fetched, ProtectedClassifier]:
    """Fetch a version with a defense, and put its classifier behind it, on the CPU and in evaluation mode.

    Raises the store's errors, ``DefenseMissing``, ``ParentChanged``, ``CheckpointUnreadable`` and
    ``ClassifierMismatch``.
    """
    fetched = store.fetch(name, ref)
    if fetched.manifest.kind not in DEFENSES:
        raise DefenseMissing(fetched.manifest)
    classifier = find_classifier(store, name, fetched.manifest.version)
    bare = Classifier.load(classifier.folder / GRAPH).eval()
    return fetched, load_protected(bare, fetched.folder / CHECKPOINT)
