"""The attacks that examples can be made with, by name and parameters."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from types import MappingProxyType

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

    Values are numbers or fractions such as 8/255. Raises ``AttackUnknown``.
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
            parameters[parameter] = float(Fraction(value))
        except (ValueError, ZeroDivisionError):
            raise AttackUnknown(text) from None
    return Attack(text, MappingProxyType(parameters), run(parameters))


def _fgsm(parameters: Mapping[str, float]) -> Run:
    return lambda model, x, y: _foolbox(model, x, y, "FGSM", parameters["epsilon"])


def _pgd(parameters: Mapping[str, float]) -> Run:
    options = {"abs_stepsize": parameters["step_size"], "steps": int(parameters["steps"])}
    return lambda model, x, y: _foolbox(model, x, y, "LinfPGD", parameters["epsilon"], **options)


def _stopped_pgd(parameters: Mapping[str, float]) -> Run:
    step_size, steps = parameters["step_size"], int(parameters["steps"])
    return lambda model, x, y: stopped_pgd(model, x, y, step_size=step_size, steps=steps)


def _foolbox(model: nn.Module, x: Tensor, y: Tensor, name: str, epsilon: float, **options: float) -> Tensor:
    from foolbox import attacks
    from foolbox.models.pytorch import PyTorchModel

    wrapped = PyTorchModel(model, bounds=(0, 1), device=x.device)
    _, x_adv, _ = getattr(attacks, name)(**options)(wrapped, x, y, epsilons=epsilon)
    clipped: Tensor = x_adv
    return clipped


ATTACKS: Mapping[str, tuple[Mapping[str, float], Callable[[Mapping[str, float]], Run]]] = MappingProxyType(
    {
        "fgsm": ({"epsilon": 5 / 255}, _fgsm),
        "pgd-stop": ({"step_size": 1 / 255, "steps": 50}, _stopped_pgd),
        "pgd": ({"epsilon": 8 / 255, "step_size": 2 / 255, "steps": 10}, _pgd),
    }
)
"""Every attack by name, with its parameters' defaults: FGSM, PGD stopped at success, and PGD in an L-infinity ball."""
