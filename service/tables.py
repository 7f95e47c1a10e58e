"""Tables for people."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import get_args

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table

from defenses.attacks import Form
from defenses.evaluation.plan import Scenario
from defenses.evaluation.rates import Interval
from defenses.evaluation.rows import AttackResult, Check
from defenses.nip import SuccessRow
from service.evaluate import Report
from service.evaluation.document import EvaluationReport
from service.nip_success import SuccessReport

NOTHING = "-"

CRAFTED_ON: Mapping[Scenario, str] = MappingProxyType(
    {"A": "the bare classifier", "B": "the defense", "transfer": "a substitute of the defense"}
)

MOVED = (
    "Moved by the nearest candidate, which is what is served, by a random one, by Gaussian noise of the same L2 norm, "
    "or by the oracle, which knows the clean image."
)


def report_table(report: Report) -> Table:
    """Return a report as a table: the share of right answers, bare and protected, of alerts and of resisted images.

    Where attacks saw the gateway's answers alone it tells of their successes and queries in place of what was resisted.
    """
    if report.searches:
        return _searched_table(report)
    table = Table(
        title=f"{report.model}, version {report.version}, mode {report.mode}, through HTTP",
        caption="\n".join(
            f"{row.attack}: {row.fooling_as_crafted} fool it, {row.fooling} when rounded to 8 bits"
            for row in report.attacks
        ),
    )
    table.add_column("input")
    for heading in ("attacked", "sent", "bare", "gate", "alerted", "resisted", "L2"):
        table.add_column(heading, justify="right")
    clean = report.clean
    table.add_row(
        "clean",
        "",
        str(clean.images),
        _percent(clean.undefended_accuracy),
        _percent(clean.accuracy),
        _percent(clean.false_positive_rate),
    )
    for row in report.attacks:
        table.add_row(
            row.attack.partition(":")[0],
            str(row.attempted),
            str(row.fooling),
            _percent(row.undefended_accuracy),
            _percent(row.corrected),
            _percent(row.alerted),
            _percent(row.resisted),
            _decimal(row.distortion_l2, 2),
        )
    return table


def _searched_table(report: Report) -> Table:
    clean = report.clean
    table = Table(
        title=f"{report.model}, version {report.version}, mode {report.mode}, attacked by its answers alone",
        caption=f"{clean.images} clean images: {_percent(clean.accuracy)} answered rightly, "
        f"{_percent(clean.false_positive_rate)} alerted. A success is answered wrongly and not alerted."
        + (f" The gateway had no room {report.waits} times, and was asked again." if report.waits else ""),
    )
    table.add_column("attack")
    for heading in ("attacked", "successes", "", "95 %", "queries", "at most", "L2"):
        table.add_column(heading, justify="right")
    for row in report.searches:
        table.add_row(
            row.attack,
            str(row.attempted),
            str(row.successes),
            _percent(row.success_rate),
            _range(row.success_interval),
            f"{row.queries_mean:.1f}",
            str(row.queries_max),
            _decimal(row.distortion_l2, 2),
        )
    return table


def evaluation_tables(report: EvaluationReport) -> Group:
    """Return an evaluation as tables: clean images, each scenario's attacks in both forms, and failed checks."""
    tables: list[RenderableType] = [_clean_table(report)]
    for scenario in report.plan.scenarios:
        for form in get_args(Form):
            rows = [row for row in report.rows if (row.scenario, row.form) == (scenario, form)]
            if rows:
                tables.append(_attack_table(scenario, form, rows))
    if report.checks:
        tables.append(_check_table(report.checks))
    if not report.complete:
        tables.append("Time ran out before all was crafted: the same command goes on.")
    return Group(*tables)


def _clean_table(report: EvaluationReport) -> Table:
    classifier = report.classifier
    table = _plain_table(f"{classifier['name']}, version {classifier['version']}, on clean images")
    table.caption = "In brackets the 95 % interval. Time: that of the bare classifier is 1."
    table.add_column("defense", overflow="fold")
    for heading in ("images", "bare accuracy", "accuracy", "alerts as errors", "false positives", "time"):
        table.add_column(heading, justify="right")
    for each in report.defenses:
        clean = each.clean
        found = clean.false_positive_rate
        table.add_row(
            each.name,
            str(clean.images),
            _percent(clean.undefended_accuracy, 2),
            _percent(clean.accuracy.mean, 2),
            _percent(clean.accepted_accuracy.mean, 2),
            f"{_percent(found.mean, 2)} ({_range(found.interval, 2)})",
            f"{each.milliseconds / each.bare_milliseconds:.2f}",
        )
    return table


def _attack_table(scenario: Scenario, form: Form, rows: Sequence[AttackResult]) -> Table:
    table = _plain_table(
        f"crafted on {CRAFTED_ON[scenario]}, {'as crafted' if form == 'as crafted' else 'rounded to 8 bits'}"
    )
    over = "those that fool the bare classifier" if scenario == "A" else "all attempts"
    table.caption = f"Answered: with the true class. Resisted: that, or alerted. Over {over}. !: a check failed."
    if any(row.unchecked for row in rows):
        table.caption += " ?: unchecked, no check looked at it."
    for heading in ("attack", "defense"):
        table.add_column(heading, overflow="fold")
    for heading in ("fooling", "L2", "answered", "alerted", "resisted", "95 %", "AUC"):
        table.add_column(heading, justify="right")
    substitutes = {row.defense: row.substitute for row in rows if row.substitute}
    for defense, found in substitutes.items():
        table.caption += (
            f" {defense} answered {found.queries} images; its label is given to {_percent(found.agreement)}."
        )
    attack = ""
    for row in sorted(rows, key=lambda row: [each.attack for each in rows].index(row.attack)):
        attack, before = row.attack, attack
        table.add_row(
            "" if attack == before else attack,
            f"{row.defense}{' !' if row.untrusted else ' ?' if row.unchecked else ''}",
            f"{row.fooling}/{row.attempted}",
            _decimal(row.distortion_l2, 2),
            *(_percent(rate.mean if rate else None) for rate in (row.corrected, row.alerted, row.resisted)),
            _range(row.resisted.interval if row.resisted else None),
            _decimal(row.auc, 3),
        )
    return table


def _check_table(checks: Sequence[Check]) -> RenderableType:
    failed = [check for check in checks if check.passed is False]
    missing = [check for check in checks if check.passed is None]
    made = len(checks) - len(missing)
    title = f"sanity checks: {made - len(failed)} of {made} passed"
    title += f", {len(missing)} without anything to compare with" if missing else ""
    if not failed:
        return title
    table = _plain_table(title)
    table.add_column("failed", overflow="fold")
    table.add_column("", overflow="fold")
    for check in failed:
        table.add_row(check.name, check.told)
    return table


def success_tables(report: SuccessReport) -> Group:
    """Return a NIP report as tables: clean images, then the attacks as crafted and the attacks rounded to 8 bits."""
    clean = _plain_table(f"{report.model}, version {report.version}, on clean images")
    clean.caption = f"In brackets the 95 % interval. Amplitude {report.amplitude:g}; there is no detector. {MOVED}"
    for heading in ("moved by", "moved, L2", "images", "bare accuracy", "accuracy"):
        clean.add_column(heading, justify="right")
    for row in report.clean:
        clean.add_row(
            row.direction,
            _decimal(row.moved_l2, 3),
            str(row.images),
            _percent(row.undefended_accuracy, 2),
            f"{_percent(row.accuracy, 2)} ({_range(row.accuracy_interval, 2)})",
        )
    crafted, rounded = ([row for row in report.rows if row.form == form] for form in get_args(Form))
    attacked = [_success_table("as crafted", crafted), _success_table("rounded to 8 bits", rounded)]
    return Group(clean, *(attacked if report.rows else ()))


def _success_table(form: str, rows: Sequence[SuccessRow]) -> Table:
    table = _plain_table(f"crafted on the bare classifier, {form}")
    table.caption = "Success: answered with the true class, of those that fool the bare classifier."
    table.add_column("attack", overflow="fold")
    for heading in ("moved by", "moved, L2", "fooling", "L2", "success", "95 %"):
        table.add_column(heading, justify="right")
    attack = ""
    for row in rows:
        attack, before = row.attack, attack
        table.add_row(
            "" if attack == before else attack,
            row.direction,
            _decimal(row.moved_l2, 3),
            f"{row.fooling}/{row.attempted}",
            _decimal(row.distortion_l2, 2),
            _percent(row.success),
            _range(row.success_interval),
        )
    return table


def _plain_table(title: str) -> Table:
    return Table(title=title, box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)


def _percent(rate: float | None, places: int = 1) -> str:
    return NOTHING if rate is None else f"{100 * rate:.{places}f} %"


def _decimal(value: float | None, places: int) -> str:
    return NOTHING if value is None else f"{value:.{places}f}"


def _range(interval: Interval | None, places: int = 1) -> str:
    if interval is None:
        return NOTHING
    low, high = (100 * end for end in interval)
    return f"{low:.{places}f}-{high:.{places}f}"
