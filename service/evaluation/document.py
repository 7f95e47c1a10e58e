"""The report of an evaluation, as JSON has it."""

from dataclasses import asdict, dataclass
from typing import Any

from defenses.evaluation.lottery import Lottery
from defenses.evaluation.plan import EvaluationPlan
from defenses.evaluation.rows import AttackResult, Check, CleanResult, SweepResult
from service.evaluation.published import PublishedRow

SCHEMA = 2
"""Counts up when a field changes its meaning or goes."""


@dataclass(frozen=True)
class DefenseReport:
    """A version that was evaluated: what it is, and what is said of it whatever the attack.

    ``threshold`` is one for all, one for each class, or None without a detector; ``fitted_on`` names the attacks that
    it was fitted on. The milliseconds are per image, at a batch of 32, in torch.
    """

    name: str
    kind: str
    method: str
    digest: str
    threshold: float | list[float] | None
    fitted_on: tuple[str, ...]
    noisy: bool
    clean: CleanResult
    lottery: Lottery | None
    milliseconds: float
    bare_milliseconds: float


@dataclass(frozen=True)
class EvaluationReport:
    """An evaluation with all that is needed to repeat it.

    ``attempted`` images at most are attempted per attack, the first that the classifier gets right. ``complete`` is
    false where time ran out: the same command goes on from there. ``rows`` has two entries for each attack on each
    defense, its examples as crafted and rounded to 8 bits. ``published`` sets rows beside the paper's, where that has
    the data set and the classifier. ``code`` names the code that crafted the examples.
    """

    schema: int
    classifier: dict[str, str | int]
    labels: tuple[str, ...]
    dataset: dict[str, str | int]
    plan: EvaluationPlan
    attempted: int
    complete: bool
    defenses: tuple[DefenseReport, ...]
    rows: tuple[AttackResult, ...]
    sweeps: tuple[SweepResult, ...]
    checks: tuple[Check, ...]
    published: tuple[PublishedRow, ...]
    code: str
    libraries: dict[str, str]
    hardware: dict[str, str | int]
    command: str

    def as_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return asdict(self)
