"""How a baseline is fitted."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from defenses.baselines.lid import watched_layers
from defenses.baselines.methods import BaselineConfig, Value, known
from defenses.baselines.options import Option, OptionForeign, completed
from defenses.classifier import Classifier

ATTACKS = ("fgsm", "pgd-stop")
"""What a baseline that is fitted to attacks is fitted to unless told otherwise."""

BUDGET = 0.05

OF_DETECTORS = ("budget",)
OF_ATTACKS = ("attacks", "examples", "layers")


@dataclass(frozen=True)
class BaselinePlan:
    """Say which baseline is fitted and how; ``options`` are those of its ``method``, completed by their defaults.

    ``budget`` is the false-positive rate that a detector's threshold is calibrated to. A method that is fitted to
    attacks is so to ``attacks``, each on ``examples`` fitting images, and looks at ``layers``, which are found by
    itself where none are named. Raises ``MethodUnknown``, ``OptionForeign``, ``OptionOutOfRange``, and ``ValueError``
    for other values that cannot be.
    """

    method: str
    options: Mapping[str, Value] = field(default_factory=dict)
    layers: tuple[str, ...] = ()
    attacks: tuple[str, ...] = ATTACKS
    examples: int = 1000
    budget: float = BUDGET
    batch_size: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", completed(self.method, _options(self.method), self.options))
        if self.method == "lid" and self.options["neighbors"] > self.options["references"]:  # type: ignore[operator]
            neighbors, references = self.options["neighbors"], self.options["references"]
            raise ValueError(f"Expected no more neighbors than references, got {neighbors} of {references}.")
        if not self.attacks:
            raise ValueError("Expected an attack to fit to, got none.")
        for name in ("examples", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"Expected {name} of 1 or more, got {getattr(self, name)}.")

    @classmethod
    def chosen(cls, method: str, given: Mapping[str, Any], **common: Any) -> Self:
        """Return the plan of a method with the values that are given, by name; None is not given.

        ``common`` are fields that every method has. Raises as the class does, for what another method has too.
        """
        chosen = known(method)
        options = _options(method)
        values = {name: value for name, value in given.items() if value is not None}
        own = (*(OF_DETECTORS if chosen.detects else ()), *(OF_ATTACKS if chosen.learns_attacks else ()))
        if foreign := sorted(values.keys() - options.keys() - set(own)):
            raise OptionForeign(method, foreign, [*options, *own])
        fields = {name: values.pop(name) for name in own if name in values}
        return cls(method, values, **fields, **common)

    def config(self, classifier: Classifier) -> BaselineConfig:
        """Return what the plan makes of a classifier; raises ``LayerNotFound``."""
        watched = watched_layers(classifier, self.layers) if self.method == "lid" else ()
        options = {name: self.options[name] for name in known(self.method).options}
        return BaselineConfig(self.method, options, classifier.image_shape, watched)


def _options(method: str) -> dict[str, Option]:
    """Return all options of a method, those of its training included."""
    return {**known(method).options, **known(method).training}
