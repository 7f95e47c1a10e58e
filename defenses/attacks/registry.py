"""The attacks that examples can be made with, by name and parameters."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from defenses.attacks.stopped_pgd import stopped_pgd

Run = Callable[[nn.Module, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Attack:
    """Describe an attack: its name, its parameters (in units of an image in [0, 1]) and the function that runs it.

    ``run(model, x, y)`` takes images (N, C, H, W) in [0, 1] and their true classes (N,) and returns images of the
    same shape and range.
    """

    name: str
    parameters: Mapping[str, float]
    run: Run


class AttackUnknown(ValueError):
    """No attack has that name, or it has no such parameter."""

    def __init__(self, text: str) -> None:
        self.text = text
        known = "; ".join(f"{name} ({', '.join(defaults)})" for name, (defaults, _) in ATTACKS.items())
        super().__init__(f"Expected an attack such as fgsm or fgsm:epsilon=8/255, got {text!r}. There are: {known}.")


def attack(text: str) -> Attack:
    """Return the attack that ``text`` describes: a name, or ``name:parameter=value,...``.

    Values are numbers of 0 or more, or fractions such as 8/255; counts, such as steps, are whole and at least 1, those
    of neurons at least 0; a switch is 0 or 1. Raises ``AttackUnknown``.
    """
    name, _, given = text.partition(":")
    if name not in ATTACKS:
        raise AttackUnknown(text)
    defaults, run = ATTACKS[name]
    parameters = dict(defaults)
    for assignment in filter(None, given.split(",")):
        parameter, _, value = assignment.partition("=")
        if parameter not in defaults:
            raise AttackUnknown(text)
        try:
            parameters[parameter] = _number(parameter, value, defaults[parameter])
        except (ValueError, ZeroDivisionError):
            raise AttackUnknown(text) from None
    return Attack(text, MappingProxyType(parameters), run(parameters))


def _number(parameter: str, text: str, default: float) -> float:
    """Return a parameter's value as its default is: a float, an int where only whole numbers are, or a switch."""
    value = Fraction(text)
    least = 1 if type(default) is int and parameter not in _NEURONS else 0
    whole, switch = isinstance(default, int), isinstance(default, bool)
    if value < least or (whole and value.denominator > 1) or (switch and value > 1):
        raise ValueError(text)
    return type(default)(value)


def _fgsm(parameters: Mapping[str, float]) -> Run:
    return lambda model, x, y: _foolbox(model, x, y, "FGSM", parameters["epsilon"])[0]


def _pgd(parameters: Mapping[str, float]) -> Run:
    options = {"abs_stepsize": parameters["step_size"], "steps": parameters["steps"]}
    return lambda model, x, y: _foolbox(model, x, y, "LinfPGD", parameters["epsilon"], **options)[0]


def _stopped_pgd(parameters: Mapping[str, float]) -> Run:
    step_size, steps = parameters["step_size"], int(parameters["steps"])
    return lambda model, x, y: stopped_pgd(model, x, y, step_size=step_size, steps=steps)


def _deepfool(parameters: Mapping[str, float]) -> Run:
    return lambda model, x, y: _minimal(model, x, y, "L2DeepFoolAttack", **parameters)


def _cw(parameters: Mapping[str, float]) -> Run:
    options = {_CW_NAMES.get(name, name): value for name, value in parameters.items()}
    return lambda model, x, y: _minimal(model, x, y, "L2CarliniWagnerAttack", **options)


_CW_NAMES = MappingProxyType({"searches": "binary_search_steps", "step_size": "stepsize"})


def _s_ala(parameters: Mapping[str, float]) -> Run:
    # NIP is measured with attacks and imports this module, so that what looks at its neurons is imported only here.
    from defenses.attacks.adaptive import smooth_adaptive

    options = _adaptive(parameters)
    return lambda model, x, y: smooth_adaptive(model, x, y, **options)


def _r_ala(parameters: Mapping[str, float]) -> Run:
    from defenses.attacks.adaptive import remaining_adaptive

    options = _adaptive(parameters)
    return lambda model, x, y: remaining_adaptive(model, x, y, **options)


def _adaptive(parameters: Mapping[str, float]) -> dict[str, Any]:
    return {"weight" if name == "lambda" else name: value for name, value in parameters.items()}


def _minimal(model: nn.Module, x: Tensor, y: Tensor, name: str, **options: float) -> Tensor:
    """Run an attack that looks for the least distance; an image on which it finds nothing comes back unchanged."""
    x_adv, success = _foolbox(model, x, y, name, None, **options)
    # Where it finds nothing C&W gives a black image, which may well be misclassified.
    found = success & x_adv.flatten(1).any(1)
    return torch.where(found.reshape(-1, 1, 1, 1), x_adv, x)


def _foolbox(
    model: nn.Module, x: Tensor, y: Tensor, name: str, epsilon: float | None, **options: float
) -> tuple[Tensor, Tensor]:
    """Return the images of an attack of that library's and (N,) whether each fools the model."""
    from foolbox import attacks
    from foolbox.models.pytorch import PyTorchModel

    wrapped = PyTorchModel(model, bounds=(0, 1), device=x.device)
    _, x_adv, success = getattr(attacks, name)(**options)(wrapped, x, y, epsilons=epsilon)
    return x_adv, success


_NEURONS = ("k1", "k2")

_BALL: Mapping[str, float] = MappingProxyType({"epsilon": 8 / 255, "step_size": 2 / 255, "steps": 10})

_ADAPTIVE: Mapping[str, float] = MappingProxyType({**_BALL, "lambda": 1.0, "log_odds": False})

ATTACKS: Mapping[str, tuple[Mapping[str, float], Callable[[Mapping[str, float]], Run]]] = MappingProxyType(
    {
        "fgsm": ({"epsilon": 5 / 255}, _fgsm),
        "pgd-stop": ({"step_size": 1 / 255, "steps": 50}, _stopped_pgd),
        "pgd": (_BALL, _pgd),
        "deepfool": ({"steps": 50, "overshoot": 0.02}, _deepfool),
        "cw": ({"searches": 5, "steps": 200, "confidence": 0.0, "step_size": 0.01, "initial_const": 1e-3}, _cw),
        "s-ala": (_ADAPTIVE, _s_ala),
        "r-ala": ({**_ADAPTIVE, "k1": 5, "k2": 5}, _r_ala),
    }
)
"""Every attack by name, with its parameters' defaults (CoopHANCE, section 4.1.2; NIP, section 7.1).

FGSM, PGD stopped at success, PGD in an L-infinity ball, DeepFool and C&W, and in PGD's ball S-ALA and R-ALA, which know
of NIP and need a ``Classifier``. DeepFool and C&W look for the least L2 distance and end on the classifier's boundary:
after rounding to 8 bits few of their examples still fool it. C&W ends a search early once a whole batch makes no
progress, so that its examples depend a little on which images share a batch.
"""
