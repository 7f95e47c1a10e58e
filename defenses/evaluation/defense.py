"""What is evaluated."""

from dataclasses import dataclass

from defenses.protected import ProtectedClassifier


@dataclass(frozen=True)
class Defense:
    """Hold what is evaluated: a name, a digest that names it for good, and the protected classifier on its device.

    ``noisy`` says whether one image is answered differently from time to time.
    """

    name: str
    digest: str
    protected: ProtectedClassifier
    noisy: bool
