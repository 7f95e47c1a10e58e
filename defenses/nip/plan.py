"""How a NIP defense is fitted, each choice of the paper under a name."""

import math
from dataclasses import dataclass
from typing import Literal, Self

from defenses.nip.neurons import TemplateKind

Sign = Literal["tail-front", "front-tail"]
Precision = Literal["float16", "float32"]

AMPLITUDES = (0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1.0)
"""The amplitudes that are tried."""


@dataclass(frozen=True)
class NipPlan:
    """Say how the pool of inverse perturbations is made and used.

    ``layer`` is found by itself when None (``Classifier.head_layer``); ``k1`` front and ``k2`` tail neurons of it are
    taken, of which one may be 0. ``sign`` is the loss whose gradient a candidate is: the tail's outputs less the
    front's, as printed, or the reverse, as in the authors' program. ``template`` is the intersection over all benign
    examples (``global``), over those of each ``class``, or what remains in a share ``template_share`` of them
    (``frequency``). ``similarity`` compares the ``index`` sequence of the remaining neurons with the template, as
    printed, or the ``influence`` vectors of image and candidate themselves. ``search`` is among all candidates, or
    among those of the predicted ``class``.

    ``candidates`` is how many unknown inputs the pool is made for, ``eta`` how many candidates there are for each
    (section 7.2.3). ``precision`` is what they are kept in. ``amplitude`` multiplies the perturbation of equation 8;
    unless ``accuracy_loss`` is None the largest of ``amplitudes`` is taken instead that costs at most that share of the
    clean validation images. ``attacks`` are what the defense is measured against, on ``test_examples`` images each;
    nothing is fitted on them. Raises ``ValueError`` for what cannot be.
    """

    layer: str | None = None
    k1: int = 5
    k2: int = 5
    sign: Sign = "tail-front"
    template: TemplateKind = "global"
    template_share: float = 0.9
    similarity: Literal["index", "influence"] = "index"
    search: Literal["all", "class"] = "all"
    candidates: int = 5000
    eta: float = 1.0
    precision: Precision = "float16"
    amplitude: float = 1.0
    accuracy_loss: float | None = 0.01
    amplitudes: tuple[float, ...] = AMPLITUDES
    attacks: tuple[str, ...] = ("fgsm", "pgd-stop", "pgd:steps=20", "deepfool")
    test_examples: int = 300
    batch_size: int = 128
    seed: int = 0

    @classmethod
    def paper(cls) -> Self:
        """Return the plan of the printed method: equation 8 as it stands, its strength not calibrated."""
        return cls(precision="float32", accuracy_loss=None)

    @property
    def pool_size(self) -> int:
        """How many candidates are wanted: eta for each unknown input."""
        return math.ceil(round(self.eta * self.candidates, 9))

    def __post_init__(self) -> None:
        if min(self.k1, self.k2) < 0 or not self.k1 + self.k2:
            raise ValueError(f"Expected k1 and k2 of 0 or more, and not both 0, got {self.k1} and {self.k2}.")
        for name in ("template_share", "eta"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"Expected {name} above 0 and at most 1, got {getattr(self, name)}.")
        for name in ("candidates", "amplitude", "test_examples", "batch_size"):
            if not getattr(self, name) > 0:
                raise ValueError(f"Expected {name} above 0, got {getattr(self, name)}.")
        if self.accuracy_loss is not None and not (self.accuracy_loss >= 0 and self.amplitudes):
            raise ValueError(
                f"Expected an accuracy_loss of 0 or more, and amplitudes to try, got {self.accuracy_loss} and "
                f"{self.amplitudes}."
            )
        if any(not amplitude > 0 for amplitude in self.amplitudes):
            raise ValueError(f"Expected amplitudes above 0, got {self.amplitudes}.")
