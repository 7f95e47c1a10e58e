"""What an evaluation does: which attacks, in which scenarios, on how many images."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from defenses.attacks import Attack, attack
from defenses.nip.substitute_training import SubstitutePlan

Scenario = Literal["A", "B", "transfer"]
"""What the attacker knows, the noise excepted. A: the classifier alone. B: the defense too (CoopHANCE, section 2.3).

transfer: the labels that the defense answers with, and nothing else; a substitute learns them (Papernot et al. 2017).
"""

DEAR = 300
"""An attack that asks a model about one image more often than this is a dear one."""

SAMPLES = "samples"

EFFORT = ("steps", "searches", SAMPLES, "max_iter")
"""The parameters that say how long an attack follows gradients."""

DRAWS = ("queries", "repeats", "max_iter")
"""The parameters that say how often an attack without gradients guesses.

The steps of one that starts from a misclassified image bring it nearer, and are not among them.
"""

SUBSTITUTE_EPOCHS = 12
"""How often a substitute in training sees every image that was asked about."""


class SweepUnclear(ValueError):
    """A sweep names no attack, no parameter or no values."""

    def __init__(self, text: str, reason: str) -> None:
        self.text = text
        super().__init__(
            f"Expected a sweep such as fgsm@epsilon=1/255,2/255 or cw:steps=100@confidence=0,10, got {text!r}: {reason}"
        )


class ScenarioMissing(ValueError):
    """None of the scenarios asked for is one that an attack is made for: nothing would be measured of it."""

    def __init__(self, each: Attack, asked: Sequence[Scenario]) -> None:
        self.attack, self.asked = each, tuple(asked)
        made_for = [scenario for scenario in get_args(Scenario) if suits(each, scenario)]
        super().__init__(
            f"Expected an attack for one of the scenarios that are asked for, or a scenario that it is made for: "
            f"{each.name} is made for {_listed(made_for)}, and asked for is {_listed(asked)} alone."
        )


@dataclass(frozen=True)
class Sweep:
    """Hold an attack whose one parameter takes several values, in ascending order."""

    text: str
    parameter: str
    attacks: tuple[Attack, ...]

    @classmethod
    def parse(cls, text: str) -> "Sweep":
        """Return the sweep ``NAME[:parameter=value,...]@parameter=value,value,...``; raises ``SweepUnclear``."""
        base, at, varied = text.partition("@")
        parameter, equals, values = varied.partition("=")
        if not (at and equals and values):
            raise SweepUnclear(text, "there is no parameter with values behind an @.")
        try:
            joined = "," if ":" in base else ":"
            attacks = [attack(f"{base}{joined}{parameter}={value}") for value in values.split(",")]
        except ValueError as error:
            raise SweepUnclear(text, str(error)) from error
        return cls(text, parameter, tuple(sorted(attacks, key=lambda each: each.parameters[parameter])))

    @property
    def values(self) -> tuple[float, ...]:
        """The values that the parameter takes."""
        return tuple(each.parameters[self.parameter] for each in self.attacks)


@dataclass(frozen=True)
class EvaluationPlan:
    """Say what is measured.

    The test images are taken in an order drawn from ``seed``; of those that the bare classifier gets right the first
    ``limit`` are attempted by each attack, and the first ``dear_limit`` by one that asks a model more than 300 times
    about an image. ``attacks`` and ``sweeps`` are run in each of ``scenarios`` that they are made for. In scenario B a
    noisy defense is asked ``samples`` times for each gradient; in scenario transfer a substitute is trained on what the
    defense answers to ``queries`` images at most. Every rate is measured under ``noise_seeds`` noises, and
    what is a lottery with ``lottery`` images: each is submitted 16 times clean and 100 times attacked. ``noise`` and
    ``confusion`` switch the defenses' noise and confusion layers, as they were published when None. ``checks`` adds the
    work that the sanity checks of an attack on a defense take.
    """

    attacks: tuple[str, ...]
    scenarios: tuple[Scenario, ...] = ("A",)
    sweeps: tuple[str, ...] = ()
    limit: int = 300
    dear_limit: int = 200
    seed: int = 0
    samples: int = 8
    queries: int = 5000
    noise_seeds: int = 3
    lottery: int = 100
    noise: bool = True
    confusion: bool | None = None
    checks: bool = True

    def images_for(self, each: Attack) -> int:
        """Return how many images an attack attempts."""
        return min(self.limit, self.dear_limit) if each.facts.passes > DEAR else self.limit

    @property
    def substitute(self) -> SubstitutePlan:
        """How a substitute of a defense is trained; raises ``ValueError`` for fewer than 2 queries."""
        return SubstitutePlan(queries=self.queries, epochs=SUBSTITUTE_EPOCHS, seed=self.seed)

    @property
    def switches(self) -> str:
        """What is switched on in the defenses, for the names that examples are kept under."""
        return f"noise {self.noise}, confusion {self.confusion}"

    def parsed(self) -> tuple[tuple[Attack, ...], tuple[Sweep, ...]]:
        """Return the attacks and the sweeps; raises ``AttackUnknown``, ``SweepUnclear`` and ``ScenarioMissing``."""
        attacks, sweeps = tuple(map(attack, self.attacks)), tuple(map(Sweep.parse, self.sweeps))
        for each in (*attacks, *(sweep.attacks[0] for sweep in sweeps)):
            if not any(suits(each, scenario) for scenario in self.scenarios):
                raise ScenarioMissing(each, self.scenarios)
        return attacks, sweeps


def known_scenarios(names: Sequence[str]) -> tuple[Scenario, ...]:
    """Return scenarios by their names, each once; raises ``ValueError`` for one that there is not."""
    known = get_args(Scenario)
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"Expected the scenarios {', '.join(known[:-1])} and {known[-1]}, got {', '.join(unknown)}.")
    return tuple(each for each in known if each in names)


def suits(each: Attack, scenario: Scenario) -> bool:
    """Say whether an attack is made for the model that it is run on in a scenario.

    A substitute is a classifier that is no defense's own, and worth its queries to an attack by its gradients alone.
    """
    if scenario == "transfer":
        return each.facts.on == "any" and each.facts.white_box
    return each.facts.on in ("any", "classifier" if scenario == "A" else "defense")


def efforts_of(each: Attack) -> tuple[str, ...]:
    """Return the parameters of an attack that say how long it tries."""
    return tuple(name for name in (EFFORT if each.facts.white_box else DRAWS) if name in each.parameters)


def distinct(attacks: Sequence[Attack]) -> tuple[Attack, ...]:
    """Return the attacks without those that come a second time."""
    return tuple({each.name: each for each in attacks}.values())


def doubled(each: Attack, parameter: str) -> Attack:
    """Return an attack with one of its parameters twice as large."""
    parameters = {**each.parameters, parameter: 2 * each.parameters[parameter]}
    return attack(f"{each.family}:{','.join(f'{name}={_text(value)}' for name, value in parameters.items())}")


def _listed(scenarios: Sequence[Scenario]) -> str:
    return f"scenario{'s' if len(scenarios) > 1 else ''} {' and '.join(scenarios)}"


def _text(value: float) -> str:
    return repr(int(value) if isinstance(value, int) else value)
