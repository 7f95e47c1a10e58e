"""S-ALA and R-ALA among the attacks."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from defenses.attacks.attack import Entry, Facts, Run

# NIP is measured with attacks and imports this package, so that what looks at its neurons is imported only when built.


def _s_ala(parameters: Mapping[str, float]) -> Run:
    from defenses.attacks.adaptive import smooth_adaptive

    options = _renamed(parameters)
    return lambda model, x, y: smooth_adaptive(model, x, y, **options)


def _r_ala(parameters: Mapping[str, float]) -> Run:
    from defenses.attacks.adaptive import remaining_adaptive

    options = _renamed(parameters)
    return lambda model, x, y: remaining_adaptive(model, x, y, **options)


def _renamed(parameters: Mapping[str, float]) -> dict[str, Any]:
    return {"weight" if name == "lambda" else name: value for name, value in parameters.items()}


_PARAMETERS: Mapping[str, float] = MappingProxyType(
    {"epsilon": 8 / 255, "step_size": 2 / 255, "steps": 10, "lambda": 1.0, "log_odds": False}
)

_FACTS = Facts("linf", "gradients", 40, "NIP, section 7.1", on="classifier")

AWARE_OF_NIP: Mapping[str, Entry] = MappingProxyType(
    {"s-ala": Entry(_PARAMETERS, _s_ala, _FACTS), "r-ala": Entry({**_PARAMETERS, "k1": 5, "k2": 5}, _r_ala, _FACTS)}
)
"""S-ALA and R-ALA (equations 11 and 12), which know of NIP, need a ``Classifier`` and stay in an L-infinity ball."""
