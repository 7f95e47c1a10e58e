"""An evaluation's rows in the order in which they are read, beside what is compared with them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import get_args

from defenses.attacks import Form
from defenses.evaluation.lottery import TRIES
from defenses.evaluation.plan import EvaluationPlan, Scenario
from defenses.evaluation.rows import AttackResult, Check, SubstituteResult, SweepResult
from service.evaluation.document import DefenseReport, EvaluationReport

CRAFTED: Mapping[Scenario, str] = MappingProxyType(
    {
        "A": "crafted on the bare classifier, of the examples that fool it",
        "B": "crafted on each defense, of all attempts",
        "transfer": "crafted on a substitute that learned from each defense's labels, of all attempts",
    }
)
"""Where the examples of a scenario are crafted, and which of them rates are over."""


@dataclass(frozen=True)
class Line:
    """Hold one row with its defense, and the failed checks that are of this defense."""

    defense: DefenseReport
    row: AttackResult
    doubts: tuple[Check, ...]

    @property
    def within(self) -> tuple[float | None, ...]:
        """The share that succeeds within 1, 10 and 100 submissions, each None where it was not counted."""
        counted = self.row.success_within or {}
        return tuple(counted.get(str(number)) for number in TRIES)

    @property
    def spread(self) -> tuple[float, float] | None:
        """The least and the largest rate that is resisted under one noise, None where there is only one."""
        rate = self.row.resisted
        return (min(rate.by_seed), max(rate.by_seed)) if rate and len(rate.by_seed) > 1 else None


@dataclass(frozen=True)
class AttackGroup:
    """Hold one attack's lines, a defense each, and the failed checks that are of the attack whatever the defense."""

    attack: str
    row: AttackResult
    lines: tuple[Line, ...]
    doubts: tuple[Check, ...]


@dataclass(frozen=True)
class ResultTable:
    """Hold the attacks of one scenario in one form; ``swept`` says that they are those of the sweeps alone."""

    scenario: Scenario
    form: Form
    swept: bool
    groups: tuple[AttackGroup, ...]

    @property
    def form_told(self) -> str:
        """What the form is called."""
        return "rounded to 8 bits" if self.form == "rounded" else self.form


@dataclass(frozen=True)
class Matrix:
    """Hold rows of cells side by side, each None where nothing was measured."""

    scenario: Scenario
    attacks: tuple[str, ...]
    rows: tuple[tuple[DefenseReport, tuple[AttackResult | None, ...]], ...]

    @property
    def crafted(self) -> str:
        """Where the examples were crafted, and which of them count."""
        return CRAFTED[self.scenario]


@dataclass(frozen=True)
class SweepTable:
    """Hold what one sweep found in one scenario, a line each defense."""

    scenario: Scenario
    sweep: str
    parameter: str
    values: tuple[float, ...]
    lines: tuple[tuple[DefenseReport, SweepResult], ...]


def by_name(report: EvaluationReport) -> Mapping[str, DefenseReport]:
    """Return the defenses by their names."""
    return {defense.name: defense for defense in report.defenses}


def chosen_attacks(report: EvaluationReport) -> tuple[str, ...]:
    """Return the attacks that have rows, without those that are values of a sweep alone."""
    swept = {attack for sweep in report.sweeps for attack in sweep.attacks} - set(report.plan.attacks)
    return tuple(dict.fromkeys(row.attack for row in report.rows if row.attack not in swept))


def result_tables(report: EvaluationReport) -> tuple[ResultTable, ...]:
    """Return a table for each scenario and form that has rows; those of sweeps alone come in tables of their own."""
    chosen = set(chosen_attacks(report))
    tables = []
    for scenario in report.plan.scenarios:
        for swept in (False, True):
            for form in get_args(Form):
                rows = [
                    row
                    for row in report.rows
                    if (row.scenario, row.form) == (scenario, form) and (row.attack in chosen) is not swept
                ]
                if rows:
                    tables.append(ResultTable(scenario, form, swept, tuple(_groups(report, rows))))
    return tuple(tables)


def _groups(report: EvaluationReport, rows: Sequence[AttackResult]) -> Iterator[AttackGroup]:
    defenses = by_name(report)
    for attack in dict.fromkeys(row.attack for row in rows):
        of_attack = [row for row in rows if row.attack == attack]
        failed = [check for check in report.checks if check.passed is False and attack in check.attacks]
        lines = tuple(
            Line(
                defenses[row.defense],
                row,
                tuple(each for each in failed if (each.defense, each.scenario) == (row.defense, row.scenario)),
            )
            for row in of_attack
        )
        yield AttackGroup(attack, of_attack[0], lines, tuple(each for each in failed if each.defense is None))


def overviews_of(report: EvaluationReport) -> tuple[Matrix, ...]:
    """Return for each scenario what every defense resists of every attack, as crafted."""
    return tuple(
        matrix
        for scenario in report.plan.scenarios
        if (matrix := _matrix(report, scenario, report.defenses, chosen_attacks(report))).attacks
    )


def generalisation_of(report: EvaluationReport) -> Matrix | None:
    """Return what defenses that were fitted on one attack each resist of all attacks in scenario A, as crafted.

    None where fewer than two were (CoopHANCE, table 4).
    """
    fitted = [defense for defense in report.defenses if len(defense.fitted_on) == 1]
    if len(fitted) < 2:
        return None
    matrix = _matrix(report, "A", fitted, chosen_attacks(report))
    return matrix if matrix.attacks else None


def _matrix(
    report: EvaluationReport, scenario: Scenario, defenses: Iterable[DefenseReport], attacks: Sequence[str]
) -> Matrix:
    rows = {
        (row.defense, row.attack): row
        for row in report.rows
        if (row.scenario, row.form) == (scenario, "as crafted") and row.attack in attacks
    }
    measured = {attack for _, attack in rows}
    columns = tuple(attack for attack in attacks if attack in measured)
    return Matrix(
        scenario,
        columns,
        tuple((defense, tuple(rows.get((defense.name, attack)) for attack in columns)) for defense in defenses),
    )


def substitutes_of(report: EvaluationReport) -> tuple[tuple[DefenseReport, SubstituteResult], ...]:
    """Return the substitute of each defense that one was trained for."""
    found = {row.defense: row.substitute for row in report.rows if row.substitute is not None}
    return tuple((each, found[each.name]) for each in report.defenses if each.name in found)


def sweep_tables(report: EvaluationReport) -> tuple[SweepTable, ...]:
    """Return the sweeps, the defenses of each side by side; those with fewer values, cut short, in a table apart."""
    defenses = by_name(report)
    tables: dict[tuple[Scenario, str, tuple[float, ...]], list[SweepResult]] = {}
    for sweep in report.sweeps:
        tables.setdefault((sweep.scenario, sweep.sweep, sweep.values), []).append(sweep)
    return tuple(
        SweepTable(scenario, text, found[0].parameter, values, tuple((defenses[each.defense], each) for each in found))
        for (scenario, text, values), found in tables.items()
    )


def checks_failed_first(checks: Iterable[Check]) -> tuple[Check, ...]:
    """Return the checks: those that failed, those that passed, and those that had nothing to compare with."""
    return tuple(sorted(checks, key=lambda check: (check.passed is None, check.passed)))


def plan_terms(plan: EvaluationPlan) -> Iterator[tuple[str, object]]:
    """Yield the name and the value of each field of a plan."""
    for each in fields(plan):
        yield each.name.replace("_", " "), getattr(plan, each.name)
