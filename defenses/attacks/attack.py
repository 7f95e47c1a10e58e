"""What an attack is: a name, parameters, facts about it, and the function that runs it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

Run = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""Images (N, C, H, W) in [0, 1] and their true classes (N,), attacked on a model that gives logits: (N, C, H, W)."""

Norm = Literal["linf", "l2", "l0", "none"]

Sees = Literal["gradients", "scores", "labels", "nothing"]
"""What an attack needs of the model that it is run on: derivatives, logits, the class alone, or no answer at all."""

On = Literal["any", "classifier", "defense"]
"""What an attack can be run on: any model, a bare ``Classifier`` alone, or a ``Victim`` alone."""


@dataclass(frozen=True)
class Facts:
    """Describe a family of attacks.

    ``norm`` is the one that it bounds (where it has an ``epsilon``) or minimises, ``sees`` what it needs of the model,
    ``targeted`` whether it aims at a class, and ``passes`` how often it asks the model about one image at most, with
    its default parameters and a backward pass counting as one more. ``paper`` names its source, ``on`` what the attack
    can be run on.
    """

    norm: Norm
    sees: Sees
    passes: int
    paper: str
    targeted: bool = False
    on: On = "any"

    @property
    def white_box(self) -> bool:
        """Whether the attack needs derivatives."""
        return self.sees == "gradients"


@dataclass(frozen=True)
class Entry:
    """Hold a family of attacks: the defaults of its parameters, what builds it from them, and facts about it."""

    defaults: Mapping[str, float]
    build: Callable[[Mapping[str, float]], Run]
    facts: Facts


@dataclass(frozen=True)
class Attack:
    """Describe an attack: its name, its parameters (in units of an image in [0, 1]), its facts, and what runs it.

    ``run(model, x, y)`` takes images (N, C, H, W) in [0, 1] and their true classes (N,) and returns images of the
    same shape and range.
    """

    name: str
    parameters: Mapping[str, float]
    run: Run
    facts: Facts

    @property
    def family(self) -> str:
        """The name without its parameters."""
        return self.name.partition(":")[0]

    @property
    def epsilon(self) -> float | None:
        """The budget in the attack's norm, None for one that looks for the least distance or has no bound."""
        return self.parameters.get("epsilon")
