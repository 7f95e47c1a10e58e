"""The plan of a fit, from a preset and what was asked for otherwise."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from defenses.coophance import FitPlan
from defenses.nip import NipPlan

Preset = Literal["default", "paper"]


class OptionsOfNoUse(ValueError):
    """Options say how a Regulator is trained, but one is used as it is."""

    def __init__(self, reference: str, names: list[str]) -> None:
        super().__init__(
            f"The Regulator {reference} is used as it is, so expected nothing about how one is trained, "
            f"got {_options(names)}."
        )
        self.names = names


class OptionIdle(ValueError):
    """An option is given that another one makes idle; ``option`` is its name."""

    def __init__(self, option: str, wanted: str, found: str) -> None:
        self.option = option
        super().__init__(f"Expected {wanted} where {option} is given, got {found}.")


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


def chosen_nip_plan(preset: Preset, given: Mapping[str, Any]) -> NipPlan:
    """Return the plan of a preset with the values that are given, by field, in place of its own; None is not given.

    An amplitude that is given is taken as it is, so that no accuracy loss goes with it. Raises ``OptionIdle`` for a
    value that another one makes idle, and ``ValueError`` for one that no plan can have.
    """
    fields = _given(given)
    if "amplitude" in fields:
        if idle := [name for name in ("accuracy_loss", "amplitudes") if name in fields]:
            raise OptionIdle("--amplitude", "no other option that says how strong it is", _options(idle))
        fields["accuracy_loss"] = None
    plan = replace(NipPlan.paper() if preset == "paper" else NipPlan(), **fields)
    if "template_share" in fields and plan.template != "frequency":
        raise OptionIdle("--template-share", "--template frequency", f"--template {plan.template}")
    if "amplitudes" in fields and plan.accuracy_loss is None:
        raise OptionIdle("--amplitudes", "--accuracy-loss", "a preset that tries none")
    return plan


def read_amplitudes(text: str | None) -> tuple[float, ...] | None:
    """Read amplitudes such as ``0.05,0.1,0.2``; None stays None. Raises ``ValueError``."""
    if text is None:
        return None
    try:
        return tuple(float(amplitude) for amplitude in text.split(","))
    except ValueError:
        raise ValueError(f"Expected amplitudes such as 0.05,0.1,0.2, got {text!r}.") from None


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


def _options(names: Sequence[str]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)
