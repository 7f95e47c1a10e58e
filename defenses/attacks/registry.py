"""The attacks that examples can be made with, by name and parameters."""

from collections.abc import Mapping
from fractions import Fraction
from types import MappingProxyType

from defenses.attacks.attack import Attack, Entry
from defenses.attacks.aware_of_inspector import AWARE_OF_INSPECTOR
from defenses.attacks.aware_of_nip import AWARE_OF_NIP
from defenses.attacks.eot import EOT
from defenses.attacks.from_art import FROM_ART
from defenses.attacks.from_autoattack import FROM_AUTOATTACK
from defenses.attacks.from_foolbox import FROM_FOOLBOX
from defenses.attacks.joint import JOINT
from defenses.attacks.orthogonal import ORTHOGONAL
from defenses.attacks.other_image import OTHER_IMAGE
from defenses.attacks.planted import PLANTED
from defenses.attacks.stopped_pgd import STOPPED_PGD

ATTACKS: Mapping[str, Entry] = MappingProxyType(
    {
        **FROM_FOOLBOX,
        **FROM_ART,
        **FROM_AUTOATTACK,
        **STOPPED_PGD,
        **AWARE_OF_NIP,
        **EOT,
        **AWARE_OF_INSPECTOR,
        **JOINT,
        **ORTHOGONAL,
        **OTHER_IMAGE,
        **PLANTED,
    }
)
"""Every attack by name."""


class AttackUnknown(ValueError):
    """No attack has that name, or it has no such parameter."""

    def __init__(self, text: str) -> None:
        self.text = text
        known = "; ".join(f"{name} ({', '.join(entry.defaults)})" for name, entry in ATTACKS.items())
        super().__init__(f"Expected an attack such as fgsm or fgsm:epsilon=8/255, got {text!r}. There are: {known}.")


def attack(text: str) -> Attack:
    """Return the attack that ``text`` describes: a name, or ``name:parameter=value,...``.

    Values are numbers of 0 or more, or fractions such as 8/255; counts, such as steps, are whole and at least 1, those
    of neurons at least 0; a switch is 0 or 1. Raises ``AttackUnknown``.
    """
    name, _, given = text.partition(":")
    if name not in ATTACKS:
        raise AttackUnknown(text)
    entry = ATTACKS[name]
    parameters = dict(entry.defaults)
    for assignment in filter(None, given.split(",")):
        parameter, _, value = assignment.partition("=")
        if parameter not in entry.defaults:
            raise AttackUnknown(text)
        try:
            parameters[parameter] = _number(parameter, value, entry.defaults[parameter])
        except (ValueError, ZeroDivisionError):
            raise AttackUnknown(text) from None
    return Attack(text, MappingProxyType(parameters), entry.build(parameters), entry.facts)


_NEURONS = ("k1", "k2")


def _number(parameter: str, text: str, default: float) -> float:
    """Return a parameter's value as its default is: a float, an int where only whole numbers are, or a switch."""
    value = Fraction(text)
    least = 1 if type(default) is int and parameter not in _NEURONS else 0
    whole, switch = isinstance(default, int), isinstance(default, bool)
    if value < least or (whole and value.denominator > 1) or (switch and value > 1):
        raise ValueError(text)
    return type(default)(value)
