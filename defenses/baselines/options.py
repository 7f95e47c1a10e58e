"""What a baseline may be told: numbers within a range, and words."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


class OptionForeign(ValueError):
    """Options are given that a method has not; ``names`` are theirs."""

    def __init__(self, method: str, names: list[str], own: list[str]) -> None:
        self.names = names
        wanted = f"of the method {method} no other options than {', '.join(own)}" if own else f"no options of {method}"
        super().__init__(f"Expected {wanted}, got {', '.join(names)}.")


class OptionOutOfRange(ValueError):
    """An option has a value that it cannot have."""

    def __init__(self, name: str, wanted: str, found: object) -> None:
        self.name = name
        self.found = found
        super().__init__(f"Expected {name} to be {wanted}, got {found!r}.")


@dataclass(frozen=True)
class Whole:
    """A whole number from ``least`` to ``most``, an odd one where that is said."""

    default: int
    least: int
    most: int
    odd: bool = False

    def check(self, name: str, value: object) -> None:
        """Raise ``OptionOutOfRange`` for a value that is none."""
        whole = isinstance(value, int) and not isinstance(value, bool) and self.least <= value <= self.most
        if not whole or (self.odd and value % 2 == 0):  # type: ignore[operator]
            kind = "an odd number" if self.odd else "a whole number"
            raise OptionOutOfRange(name, f"{kind} from {self.least} to {self.most}", value)


@dataclass(frozen=True)
class Share:
    """A real number above ``above`` and at most ``most``."""

    default: float
    above: float
    most: float

    def check(self, name: str, value: object) -> None:
        """Raise ``OptionOutOfRange`` for a value that is none."""
        if not isinstance(value, int | float) or math.isnan(value) or not self.above < value <= self.most:
            raise OptionOutOfRange(name, f"a number above {self.above:g} and at most {self.most:g}", value)


@dataclass(frozen=True)
class Choice:
    """One of some words, the first unless told."""

    words: tuple[str, ...]

    @property
    def default(self) -> str:
        """The first of the words."""
        return self.words[0]

    def check(self, name: str, value: object) -> None:
        """Raise ``OptionOutOfRange`` for a value that is none."""
        if value not in self.words:
            raise OptionOutOfRange(name, " or ".join(self.words), value)


Option = Whole | Share | Choice


def completed(method: str, options: Mapping[str, Option], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the value of each option of a method, its default where none is given.

    Raises ``OptionForeign`` and ``OptionOutOfRange``.
    """
    if foreign := sorted(given.keys() - options.keys()):
        raise OptionForeign(method, foreign, list(options))
    for name, value in given.items():
        options[name].check(name, value)
    return {name: given.get(name, option.default) for name, option in options.items()}
