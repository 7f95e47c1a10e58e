"""The plan of a fit, from a preset and what was asked for otherwise."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from defenses.coophance import FitPlan

Preset = Literal["default", "paper"]


class OptionsOfNoUse(ValueError):
    """Options say how a Regulator is trained, but one is used as it is."""

    def __init__(self, reference: str, names: list[str]) -> None:
        super().__init__(
            f"The Regulator {reference} is used as it is, so expected nothing about how one is trained, "
            f"got {', '.join('--' + name.replace('_', '-') for name in names)}."
        )
        self.names = names


def chosen_plan(
    preset: Preset,
    *,
    fit: Mapping[str, Any],
    regulator: Mapping[str, Any],
    inspector: Mapping[str, Any],
    reused: str | None,
) -> FitPlan:
    """Return the plan of a preset with the values that are given, by field, in place of its own; None is not given.

    ``fit``, ``regulator`` and ``inspector`` are fields of ``FitPlan``, ``RegulatorPlan`` and ``InspectorPlan``.
    ``reused`` names a Regulator that is used as it is: of ``regulator`` only ``batch_size`` may be given then, and
    anything else raises ``OptionsOfNoUse``. Raises ``ValueError`` for a value that no plan can have.
    """
    plan = FitPlan.paper() if preset == "paper" else FitPlan()
    trained = _given(regulator)
    if reused and (idle := sorted(trained.keys() - {"batch_size"})):
        raise OptionsOfNoUse(reused, idle)
    return replace(
        plan,
        **_given(fit),
        regulator=replace(plan.regulator, **trained),
        inspector=replace(plan.inspector, **_given(inspector)),
    )


def read_widths(text: str | None) -> tuple[int, ...] | None:
    """Read widths such as ``16,32,64,128``; None stays None. Raises ``ValueError``."""
    if text is None:
        return None
    try:
        return tuple(int(width) for width in text.split(","))
    except ValueError:
        raise ValueError(f"Expected widths such as 16,32,64,128, got {text!r}.") from None


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
