"""The figures of an evaluation: resistance over false positives, and what a growing parameter leaves."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from defenses.evaluation.rows import AttackResult, Rate, SweepResult
from service.evaluation.document import DefenseReport, EvaluationReport
from service.evaluation_report.tables import AttackGroup, Line, SweepTable, result_tables, sweep_tables
from service.report_parts.axes import MARKERS, line_colour, percent_ticks, rate_axes, rate_points, told
from service.report_parts.svg import draw

DASHES = ("-", "--", ":")
WIDTH, HEIGHT, LEGEND_LINE = 5.4, 3.2, 0.19
"""Inches of a figure: its sides without a legend, and what each line of that adds."""

MOST_BESIDE = 34
"""Letters of a legend's entry that still has room for another beside it."""

WIDE = 100.0
"""How many times the least value the largest is, at least, where an axis is logarithmic."""


@dataclass(frozen=True)
class Plot:
    """Hold a figure as SVG, and what stands below it."""

    figure: Markup
    caption: str


def title_of(defense: DefenseReport) -> str:
    """Return what a defense is called in a figure."""
    return f"{'no defense' if defense.method == 'none' else defense.method} ({defense.name})"


def resistance_plots(report: EvaluationReport) -> tuple[Plot, ...]:
    """Return resistance over false positives for each scenario and attack, as crafted, a line each defense."""
    places = {defense.name: place for place, defense in enumerate(report.defenses)}
    plots: list[Plot] = []
    for table in result_tables(report):
        if table.form != "as crafted" or table.swept:
            continue
        for group in table.groups:
            if any(line.row.curve for line in group.lines):
                name = f"resistance-{table.scenario}-{len(plots)}"
                caption = f"Scenario {table.scenario}: {group.attack}"
                plots.append(Plot(_resistance(group, places, name, caption), caption))
    return tuple(plots)


def _resistance(group: AttackGroup, places: dict[str, int], name: str, caption: str) -> Markup:
    labels = [_area_told(line) for line in group.lines]

    def paint(figure: Figure) -> None:
        images = max(line.defense.clean.images for line in group.lines)
        axes = rate_axes(figure, images, "false-positive rate (logarithmic)", "resistance rate")
        for line, label in zip(group.lines, labels, strict=True):
            if line.row.resisted is None:
                continue
            place = places[line.row.defense]
            xs, ys = rate_points(line.row.curve, axes.get_xlim()[0])
            axes.plot(xs, ys, color=line_colour(place), linestyle=_dash(place))
            _point(axes, place, line.defense.clean.false_positive_rate.mean, line.row.resisted.mean)
            dash = _dash(place) if xs else "none"
            axes.plot([], [], color=line_colour(place), linestyle=dash, marker=_marker(place), label=label)
        axes.set_ylim(-0.02, 1.02)
        _legend(figure, labels)

    described = "; ".join(
        f"{title_of(line.defense)}: {told(line.row.resisted.mean)} resisted at a false-positive rate of "
        f"{told(line.defense.clean.false_positive_rate.mean)}"
        for line in group.lines
        if line.row.resisted
    )
    return draw(name, f"Resistance over false positives, {caption}", described, _size(labels), paint)


def budget_plots(report: EvaluationReport) -> tuple[Plot, ...]:
    """Return the robust accuracy over what is swept, for each sweep and scenario, a line each defense."""
    places = {defense.name: place for place, defense in enumerate(report.defenses)}
    plots: list[Plot] = []
    for number, table in enumerate(sweep_tables(report)):
        caption = f"Scenario {table.scenario}: {table.sweep}"
        plots.append(Plot(_budget(table, places, f"budget-{number}", caption), caption))
    return tuple(plots)


def _budget(table: SweepTable, places: dict[str, int], name: str, caption: str) -> Markup:
    labels = [title_of(defense) for defense, _ in table.lines]

    def paint(figure: Figure) -> None:
        axes = _swept_axes(figure, table, "right or alerted")
        for (defense, sweep), label in zip(table.lines, labels, strict=True):
            _line(axes, places[defense.name], _xs(sweep), sweep.robust_accuracy, label)
        _legend(figure, labels)

    described = "; ".join(
        f"{title_of(defense)}: from {told(sweep.robust_accuracy[0])} to {told(sweep.robust_accuracy[-1])}"
        for defense, sweep in table.lines
    )
    return draw(name, f"Robust accuracy, {caption}", described, _size(labels), paint)


def component_plots(report: EvaluationReport) -> tuple[Plot, ...]:
    """Return what purifier, detector and both do over what is swept, for each defense that has a detector.

    After figures 5 and 6 of CoopHANCE.
    """
    rows = {(row.defense, row.scenario, row.attack): row for row in report.rows if row.form == "as crafted"}
    plots: list[Plot] = []
    for table in sweep_tables(report):
        for defense, sweep in table.lines:
            if defense.threshold is not None:
                found = [rows[defense.name, table.scenario, attack] for attack in sweep.attacks]
                caption = f"{title_of(defense)}, scenario {table.scenario}: {table.sweep}"
                plots.append(Plot(_components(sweep, found, f"components-{len(plots)}", caption), caption))
    return tuple(plots)


def _components(sweep: SweepResult, rows: Sequence[AttackResult], name: str, caption: str) -> Markup:
    """Return the shares of the same examples; where none counts a line has a gap."""
    parts = {
        "both": [_mean(row.resisted) for row in rows],
        "purifier: answered with the true class": [_mean(row.corrected) for row in rows],
        "detector: alerted": [_mean(row.alerted) for row in rows],
    }

    def paint(figure: Figure) -> None:
        axes = _swept_axes(figure, sweep, "share of the examples")
        for place, (label, shares) in enumerate(parts.items()):
            # What both do is often what one does: it lies below, and is seen around the other.
            _line(axes, place, _xs(sweep), shares, label, wide=not place)
        _legend(figure, list(parts))

    described = "; ".join(
        f"{label}: {', '.join('none' if math.isnan(share) else told(share) for share in shares)}"
        for label, shares in parts.items()
    )
    return draw(name, f"Purifier and detector, {caption}", described, _size(list(parts)), paint)


def _swept_axes(figure: Figure, sweep: SweepTable | SweepResult, y: str) -> Axes:
    """Return axes of shares over a sweep's parameter, logarithmic where its values span two decades."""
    axes = figure.add_subplot()
    positive = [value for value in _xs(sweep) if value > 0]
    logarithmic = bool(positive) and max(positive) >= WIDE * min(positive)
    if logarithmic and len(positive) == len(sweep.values):
        axes.set_xscale("log")
    elif logarithmic:
        axes.set_xscale("symlog", linthresh=min(positive))
    unit = ", in 255ths of the range" if _in_255ths(sweep) else ""
    axes.set_xlabel(f"{sweep.parameter}{unit}{' (logarithmic)' if logarithmic else ''}")
    axes.set_ylabel(y)
    axes.set_ylim(-0.02, 1.02)
    percent_ticks(axes.yaxis)
    return axes


def _in_255ths(sweep: SweepTable | SweepResult) -> bool:
    return sweep.parameter == "epsilon" and max(sweep.values) <= 1


def _xs(sweep: SweepTable | SweepResult) -> list[float]:
    return [255 * value for value in sweep.values] if _in_255ths(sweep) else list(sweep.values)


def _mean(rate: Rate | None) -> float:
    return math.nan if rate is None else rate.mean


def _line(axes: Axes, place: int, xs: Sequence[float], ys: Sequence[float], label: str, *, wide: bool = False) -> None:
    axes.plot(
        xs,
        ys,
        color=line_colour(place),
        linestyle=_dash(place),
        marker=_marker(place),
        markersize=9 if wide else 5,
        linewidth=4 if wide else 1.6,
        label=label,
        clip_on=False,
    )


def _point(axes: Axes, place: int, x: float, y: float) -> None:
    """Mark what the threshold chose."""
    ink = line_colour(place)
    axes.plot([max(x, axes.get_xlim()[0])], [y], color=ink, marker=_marker(place), markersize=6, clip_on=False)


def _area_told(line: Line) -> str:
    area = line.row.auc
    return title_of(line.defense) + ("" if area is None else f", AUC {area:.3f}")


def _dash(place: int) -> str:
    return DASHES[place // len(MARKERS) % len(DASHES)]


def _marker(place: int) -> str:
    return MARKERS[place % len(MARKERS)]


def _columns(labels: Sequence[str]) -> int:
    return 2 if len(labels) > 3 and max(map(len, labels)) <= MOST_BESIDE else 1


def _legend(figure: Figure, labels: Sequence[str]) -> None:
    figure.legend(loc="outside lower left", ncols=_columns(labels))


def _size(labels: Sequence[str]) -> tuple[float, float]:
    return WIDTH, HEIGHT + LEGEND_LINE * math.ceil(len(labels) / _columns(labels))
