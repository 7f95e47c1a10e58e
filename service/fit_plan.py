"""The plan of a fit, from a preset and what was asked for otherwise."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, Literal

from defenses.coophance import FitPlan
from defenses.nip import GatedPlan, NipPlan, ResponsePlan, SubstitutePlan

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


class OptionsOfAnother(ValueError):
    """Options are given that another kind of NIP defense has; ``names`` are theirs."""

    def __init__(self, names: list[str], chosen: str) -> None:
        self.names = names
        super().__init__(f"Expected options of {chosen}, got {_options(names)}, which it has not.")


def chosen_nip_plan(
    preset: Preset, inspector: str | None, given: Mapping[str, Any]
) -> NipPlan | ResponsePlan | GatedPlan:
    """Return the plan of a NIP defense with the values that are given, by field; None is not given.

    It is that of a pool with the preset ``paper``, of a correction behind the alerts of an ``inspector``, else of a
    response. Raises ``OptionsOfAnother``, ``OptionIdle`` for a value that another one makes idle, and ``ValueError``
    for one that no plan can have.
    """
    values = _given(given)
    if preset == "paper":
        if inspector is not None:
            raise OptionIdle("--preset paper", "no --inspector", inspector)
        return _pool_plan(_own(values, NipPlan, "a pool, with --preset paper"))
    if inspector is not None:
        return GatedPlan(**_own(values, GatedPlan, "a correction, with --inspector"))
    return _response_plan(_own(values, ResponsePlan, "a response, without --preset paper or --inspector"))


def _own(values: dict[str, Any], plan: type, chosen: str) -> dict[str, Any]:
    foreign = sorted(values.keys() - {field.name for field in fields(plan)})
    if foreign:
        raise OptionsOfAnother(foreign, chosen)
    return values


def chosen_substitute(wanted: bool, given: Mapping[str, Any]) -> SubstitutePlan | None:
    """Return the plan of a substitute with the values that are given, by field; None where none is wanted.

    Raises ``OptionIdle`` for values without a substitute, and ``ValueError`` for one that no plan can have.
    """
    values = _given(given)
    if wanted:
        return SubstitutePlan(**values)
    if values:
        raise OptionIdle(_options([f"substitute_{name}" for name in values]), "--substitute", "none")
    return None


def _response_plan(values: dict[str, Any]) -> ResponsePlan:
    if "substitute" in values and values.get("push") != "inverse":
        raise OptionIdle("--substitute", "--push inverse", f"--push {values.get('push', ResponsePlan.push)}")
    plan = ResponsePlan(**values)
    idle = ("layer", "k1", "k2", "candidates", "size") if plan.push == "smoothing" else ("weight",)
    if found := [name for name in idle if name in values]:
        other = "inverse" if plan.push == "smoothing" else "smoothing"
        raise OptionIdle(_options(found), f"--push {other}", f"--push {plan.push}")
    return plan


def _pool_plan(values: dict[str, Any]) -> NipPlan:
    """Return the plan of a pool; with an amplitude that is given goes no accuracy loss."""
    values = dict(values)
    if "amplitude" in values:
        if idle := [name for name in ("accuracy_loss", "amplitudes") if name in values]:
            raise OptionIdle("--amplitude", "no other option that says how strong it is", _options(idle))
        values["accuracy_loss"] = None
    plan = replace(NipPlan.paper(), **values)
    if "template_share" in values and plan.template != "frequency":
        raise OptionIdle("--template-share", "--template frequency", f"--template {plan.template}")
    if "amplitudes" in values and plan.accuracy_loss is None:
        raise OptionIdle("--amplitudes", "--accuracy-loss", "none")
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
