"""The figures of a fit report, drawn from its JSON values."""

import itertools
import math
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from service.report_parts.axes import MARKERS, line_colour, percent_ticks, rate_axes, rate_points, told
from service.report_parts.svg import colour, draw

CURVE_SIZE = (5.4, 3.9)
WIDE_SIZE = (5.4, 3.2)


def resistance_plot(report: dict[str, Any]) -> Markup:
    """Return resistance over false positives, one curve an attack, with the point that the threshold chose."""
    clean, guarantee = report["clean"], report["guarantee"]

    def paint(figure: Figure) -> None:
        axes = rate_axes(figure, clean["images"], "false-positive rate (logarithmic)", "resistance rate")
        lowest = 1.0
        for index, attack in enumerate(report["attacks"]):
            for row in attack["rows"]:
                crafted = row["form"] == "as crafted"
                xs, ys = rate_points(row["curve"], axes.get_xlim()[0])
                if not xs:
                    continue
                lowest = min(lowest, *ys)
                label = f"{row['attack']}  (AUC {row['auc']:.3f})" if crafted else None
                axes.plot(xs, ys, color=line_colour(index), linestyle="-" if crafted else ":", label=label)
                if crafted:
                    _mark(axes, index, clean["false_positive_rate"], row["resisted"])
        axes.set_ylim(max(0.0, math.floor(10 * lowest - 0.5) / 10), 1.02)
        _budget_line(axes, guarantee["budget"])
        figure.legend(loc="outside lower left")

    described = "; ".join(
        f"{row['attack']} {row['form']}: {told(row['resisted'])} resisted, area {row['auc']:.3f}"
        for attack in report["attacks"]
        for row in attack["rows"]
        if row["auc"] is not None
    )
    return draw("resistance", "Resistance rate over false-positive rate", described, CURVE_SIZE, paint)


def detector_plot(report: dict[str, Any]) -> Markup:
    """Return the detector's own ROC curves, one an attack as crafted."""
    clean = report["clean"]

    def paint(figure: Figure) -> None:
        axes = rate_axes(figure, clean["images"], "false-positive rate (logarithmic)", "true-positive rate")
        for index, attack in enumerate(report["attacks"]):
            row = _crafted(attack)
            xs, ys = rate_points(attack["detector_curve"], axes.get_xlim()[0])
            if xs:
                label = f"{row['attack']}  (AUC {row['detector_auc']:.3f})"
                axes.plot(xs, ys, color=line_colour(index), label=label)
                _mark(axes, index, clean["false_positive_rate"], row["alerted"])
        axes.set_ylim(0, 1.02)
        _budget_line(axes, report["guarantee"]["budget"])
        figure.legend(loc="outside lower left")

    described = "; ".join(
        f"{row['attack']}: {told(row['alerted'])} alerted, area {row['detector_auc']:.3f}"
        for row in map(_crafted, report["attacks"])
        if row["detector_auc"] is not None
    )
    return draw("detector", "ROC of the Inspector's score", described, CURVE_SIZE, paint)


def score_plot(report: dict[str, Any], index: int) -> Markup:
    """Return how the detector's scores of clean images and of an attack's examples, one or more, are distributed."""
    attack = report["attacks"][index]
    histogram = attack["histogram"]
    edges = histogram["edges"]
    clean, left, corrected = (histogram[kind] for kind in ("clean", "left", "corrected"))
    clean_share = [count / max(1, sum(clean)) for count in clean]
    attacked = max(1, sum(left) + sum(corrected))
    left_share, corrected_share = ([count / attacked for count in counts] for counts in (left, corrected))

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        middles = [(low + high) / 2 for low, high in itertools.pairwise(edges)]
        width = edges[1] - edges[0]
        axes.bar(middles, left_share, width, color=colour("left"), label="adversarial, answered wrongly")
        axes.bar(
            middles,
            corrected_share,
            width,
            bottom=left_share,
            color=colour("corrected"),
            label="adversarial, answered with the true class",
        )
        axes.stairs(clean_share, edges, color=colour("clean"), linewidth=1.6, label="clean")
        axes.axvline(histogram["threshold"], color=colour("ink"), linestyle="--", linewidth=1.1, label="threshold")
        axes.grid(visible=False, axis="x")
        axes.set_xlabel("score (the outermost bars hold what lies beyond)")
        axes.set_ylabel("share of images")
        percent_ticks(axes.yaxis)
        figure.legend(loc="outside lower left", ncols=2)

    row = _crafted(attack)
    described = (
        f"Of {sum(clean)} clean images {told(report['clean']['false_positive_rate'])} score above the threshold, of "
        f"{sum(left) + sum(corrected)} examples {told(row['alerted'])}; {sum(left)} examples are answered wrongly."
    )
    return draw(f"scores-{index}", f"Scores under {attack['name']}", described, WIDE_SIZE, paint)


def loss_plot(report: dict[str, Any]) -> Markup:
    """Return the training loss over the steps, with the points where the training could stop."""
    regulator, chosen = report["regulator"], report["selection"]["chosen"]["step"]

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        losses = []
        for index, (stage, curve) in enumerate(regulator["curves"].items()):
            finite = [(step, loss) for step, loss in curve if loss is not None]
            losses += [loss for _, loss in finite]
            axes.plot(*zip(*finite, strict=True) if finite else ((), ()), color=line_colour(index), label=stage)
        for step in regulator["stopping_points"]:
            axes.axvline(step, color=colour("muted"), linestyle=":", linewidth=1)
        axes.axvline(chosen, color=colour("ink"), linestyle="--", linewidth=1.1, label=f"stopped at step {chosen}")
        if losses and min(losses) > 0:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.6g}"))
        axes.set_xlabel("step")
        axes.set_ylabel("training loss")
        figure.legend(loc="outside lower left", ncols=3)

    described = "; ".join(
        f"{stage}: from {curve[0][1]} at step {curve[0][0]} to {curve[-1][1]} at step {curve[-1][0]}"
        for stage, curve in regulator["curves"].items()
        if curve
    )
    return draw("loss", "Training loss", described, WIDE_SIZE, paint)


def selection_plot(report: dict[str, Any]) -> Markup:
    """Return what every stopping point and strength costs and corrects on the validation images."""
    selection = report["selection"]
    chosen, undefended = selection["chosen"], selection["undefended_accuracy"]
    limit = undefended - report["plan"]["accuracy_loss"]

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        steps = sorted({each["step"] for each in selection["tried"]})
        for index, step in enumerate(steps):
            tried = sorted(
                (each for each in selection["tried"] if each["step"] == step), key=lambda each: each["strength"]
            )
            xs, ys = ([each[name] for each in tried] for name in ("accuracy", "corrected"))
            axes.plot(
                xs,
                ys,
                color=line_colour(index),
                marker=MARKERS[index % len(MARKERS)],
                markersize=4,
                label=f"step {step}",
            )
        axes.plot(
            [chosen["accuracy"]],
            [chosen["corrected"]],
            linestyle="none",
            marker="o",
            markersize=12,
            markerfacecolor="none",
            markeredgecolor=colour("ink"),
            markeredgewidth=1.4,
            label=f"chosen: step {chosen['step']}, strength {chosen['strength']:g}",
        )
        axes.axvline(limit, color=colour("ink"), linestyle="--", linewidth=1.1, label="least accuracy allowed")
        axes.axvline(undefended, color=colour("muted"), linestyle=":", linewidth=1.1, label="bare classifier")
        axes.set_xlabel("accuracy on clean validation images")
        axes.set_ylabel("attacked images corrected")
        percent_ticks(axes.xaxis)
        percent_ticks(axes.yaxis)
        figure.legend(loc="outside lower left", ncols=2)

    described = (
        f"{len(selection['tried'])} candidates; chosen step {chosen['step']} at strength {chosen['strength']:g}, with "
        f"{told(chosen['accuracy'])} accuracy and {told(chosen['corrected'])} corrected."
    )
    return draw("selection", "Accuracy against what is corrected", described, CURVE_SIZE, paint)


def _crafted(attack: dict[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = next(row for row in attack["rows"] if row["form"] == "as crafted")
    return row


def _mark(axes: Axes, index: int, x: float, y: float) -> None:
    axes.plot(
        [max(x, axes.get_xlim()[0])],
        [y],
        marker=MARKERS[index % len(MARKERS)],
        markersize=6,
        color=line_colour(index),
        clip_on=False,
    )


def _budget_line(axes: Axes, budget: float) -> None:
    axes.axvline(budget, color=colour("ink"), linestyle="--", linewidth=1.1, label=f"budget {told(budget)}")
