"""One plot for each study of a report, drawn from its JSON values, as SVG files."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

from service.nip_studies.figure_file import write_figure
from service.report_parts.axes import MARKERS, line_colour, percent_ticks, told
from service.report_parts.svg import colour, draw

WIDTH = 7.6
NONE_FOOLS = "No attack has an example that fools the classifier."


def check_folder(folder: Path) -> None:
    """Raise ``NotADirectoryError`` or ``FileNotFoundError`` where plots cannot be put."""
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"Expected a folder to put plots into, got the file {folder.absolute()}.")
    if not folder.absolute().parent.is_dir():
        raise FileNotFoundError(f"There is no folder {folder.absolute().parent} to make {folder.name} in.")


def write_plots(report: dict[str, Any], folder: Path) -> list[Path]:
    """Write one SVG file for each study of a report, as ``as_json`` gives it, and return their paths.

    A folder that is not there is made. Raises what ``check_folder`` raises, and ``OSError``.
    """
    check_folder(folder)
    folder.mkdir(exist_ok=True)
    paths = []
    for name, study in report["studies"].items():
        path = folder / f"{name}.svg"
        write_figure(PLOTS[name](study), path)
        paths.append(path)
    return paths


def influence_plot(study: dict[str, Any]) -> Markup:
    """Return the influences, neurons descending by that on clean images: a row of two panels for each attack."""
    curves = {(curve["attack"], curve["measure"], curve["towards"]): curve for curve in study["curves"]}
    attacks = list(dict.fromkeys(curve["attack"] for curve in study["curves"]))
    labels = {"mapped": "mean, mapped to [0, 1]", "log odds": "mean, on the log odds"}

    def paint(figure: Figure) -> None:
        for row, attack in enumerate(attacks):
            for column, (measure, label) in enumerate(labels.items()):
                axes = figure.add_subplot(len(attacks), 2, 2 * row + column + 1)
                _influence_lines(axes, *(curves[attack, measure, towards] for towards in ("true", "predicted")))
                axes.set_title(f"{attack}, {curves[attack, measure, 'true']['images']} images")
                axes.set_xlabel("neurons, by influence on clean images")
                axes.set_ylabel(label)
        _legend(figure, 2)

    described = "; ".join(
        f"{row['attack']}: of {row['neurons']} {row['group']} neurons {told(row['suppressed']['rate'])} of the images "
        f"have less influence, {told(row['raised']['rate'])} more"
        for row in study["groups"]
        if (row["towards"], row["measure"], row["moved"]) == ("true", "log odds", "adversarial")
    )
    size = (WIDTH, 0.8 + 2.6 * max(1, len(attacks)))
    return draw("influence", "Influence of neurons under attack", described or NONE_FOOLS, size, paint)


def _influence_lines(axes: Axes, true: dict[str, Any], predicted: dict[str, Any]) -> None:
    ranks = range(1, 1 + len(true["clean"]))
    axes.plot(ranks, true["adversarial"], color=colour("line-2"), linewidth=1.2, label="adversarial, on the true class")
    towards = dict(zip(predicted["neurons"], predicted["adversarial"], strict=True))
    axes.plot(
        ranks,
        [towards[neuron] for neuron in true["neurons"]],
        color=colour("line-4"),
        linestyle=":",
        linewidth=1.2,
        label="adversarial, on the class predicted",
    )
    axes.plot(ranks, true["noise"], color=colour("line-3"), linewidth=1.2, label="Gaussian noise of the same L2")
    axes.plot(ranks, true["clean"], color=colour("ink"), label="clean")


def consistency_plot(study: dict[str, Any]) -> Markup:
    """Return the defense success rate over the consistency: a colour for each attack, a marker for each direction."""
    rows = [row for row in study["rows"] if row["attack"] is not None]
    attacks = list(dict.fromkeys(row["attack"] for row in rows))
    directions = list(dict.fromkeys(row["direction"] for row in rows))

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        for row in rows:
            ink, marker = line_colour(attacks.index(row["attack"])), MARKERS[directions.index(row["direction"])]
            right = row["right"]
            reach = [[right["rate"] - right["interval"][0]], [right["interval"][1] - right["rate"]]]
            axes.errorbar([row["consistency"]], [right["rate"]], yerr=reach, color=ink, marker=marker, linewidth=1)
        for place, attack in enumerate(attacks):
            axes.plot([], [], color=line_colour(place), label=attack)
        for marker, direction in zip(MARKERS, directions, strict=False):
            axes.plot([], [], color=colour("ink"), linestyle="none", marker=marker, label=direction or "not moved")
        axes.set_xlabel(f"consistency of the top {study['k']} neurons with those of the clean image")
        axes.set_ylabel("answered with the true class")
        percent_ticks(axes.yaxis)
        _legend(figure, 3)

    described = "; ".join(
        f"{row['attack']}, {row['direction'] or 'not moved'}: consistency {row['consistency']:.3f}, "
        f"{told(row['right']['rate'])} right"
        for row in rows
    )
    return draw("tknc", "Neuron consistency and success", described or NONE_FOOLS, (WIDTH, 4.6), paint)


def k_plot(study: dict[str, Any]) -> Markup:
    """Return what each number of front neurons, and of tail neurons, is worth."""
    return _sweep_plot(study, "k", "Front and tail neurons", ("k1", "k2"), ("front neurons k1", "tail neurons k2"))


def layer_plot(study: dict[str, Any]) -> Markup:
    """Return what each layer is worth."""
    return _sweep_plot(study, "layer", "Layers", ("layer",), ("layer, in the order of computation",))


def eta_plot(study: dict[str, Any]) -> Markup:
    """Return what each number of candidates is worth."""
    return _sweep_plot(study, "eta", "Candidates", ("eta",), ("candidates for each unknown input, eta",))


def place_plot(study: dict[str, Any]) -> Markup:
    """Return what the inverse perturbation is worth in both places, as bars."""
    rows = study["rows"]
    groups = ["clean", *(each["attack"] for each in rows[0]["outcome"]["attacks"])]

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        width = 0.8 / len(rows)
        for index, row in enumerate(rows):
            outcome = row["outcome"]
            shares = [outcome["clean"], *(each["right"] for each in outcome["attacks"])]
            shown = [(place, share) for place, share in enumerate(shares) if share["rate"] is not None]
            rates = [share["rate"] for _, share in shown]
            low, high = ([abs(share["rate"] - share["interval"][end]) for _, share in shown] for end in (0, 1))
            label = f"{row['place']}, amplitude {outcome['amplitude']:g}{_how(outcome['recalibrated'])}"
            places = [place + (index - (len(rows) - 1) / 2) * width for place, _ in shown]
            axes.bar(
                places, rates, width, yerr=[low, high], color=line_colour(index), ecolor=colour("muted"), label=label
            )
        axes.xaxis.set_major_locator(FixedLocator(range(len(groups))))
        axes.xaxis.set_major_formatter(FixedFormatter(groups))
        axes.tick_params(axis="x", labelrotation=20)
        axes.grid(visible=False, axis="x")
        axes.set_ylabel("answered with the true class")
        percent_ticks(axes.yaxis)
        _legend(figure, 2)

    described = "; ".join(f"{row['place']}{_described(row['outcome'])}" for row in rows)
    return draw("neurons", "Added to the image, or to the activations", described, (WIDTH, 4.4), paint)


PLOTS: dict[str, Callable[[dict[str, Any]], Markup]] = {
    "influence": influence_plot,
    "tknc": consistency_plot,
    "k": k_plot,
    "layer": layer_plot,
    "eta": eta_plot,
    "neurons": place_plot,
}


def _sweep_plot(study: dict[str, Any], name: str, title: str, varied: Sequence[str], labels: Sequence[str]) -> Markup:
    """Return one panel for each value that is varied: lines at the own amplitude, dotted where it was set anew."""

    def paint(figure: Figure) -> None:
        for panel, (each, label) in enumerate(zip(varied, labels, strict=True)):
            axes = figure.add_subplot(1, len(varied), panel + 1)
            rows = [row for row in study["rows"] if row["varied"] == each]
            settings = list(dict.fromkeys(_setting(row) for row in rows))
            for recalibrated in (False, True):
                outcomes = [row["outcome"] for row in rows if row["outcome"]["recalibrated"] == recalibrated]
                _lines(axes, outcomes, recalibrated=recalibrated, labelled=not panel and not recalibrated)
            axes.xaxis.set_major_locator(FixedLocator(range(len(settings))))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter(FixedFormatter(settings))
            if each == "layer":
                axes.tick_params(axis="x", labelrotation=20)
            axes.set_xlabel(label)
            axes.set_ylim(-0.02, 1.02)
            percent_ticks(axes.yaxis)
            if not panel:
                axes.set_ylabel("answered with the true class")
        figure.axes[0].plot([], [], color=colour("muted"), linestyle=":", label="the same, amplitude set anew")
        _legend(figure, 3)

    described = "; ".join(f"{row['varied']} {_setting(row)}{_described(row['outcome'])}" for row in study["rows"])
    return draw(name, title, described or "No setting gave a pool.", (WIDTH, 4.4), paint)


def _lines(axes: Axes, outcomes: Sequence[dict[str, Any]], *, recalibrated: bool, labelled: bool) -> None:
    """Draw the clean accuracy and each attack's success; at the own amplitude with their intervals at 95 %."""
    shares = {"clean": (colour("ink"), "", [outcome["clean"] for outcome in outcomes])}
    for index, attack in enumerate(outcomes[0]["attacks"] if outcomes else ()):
        found = [outcome["attacks"][index]["right"] for outcome in outcomes]
        if found[0]["images"]:
            shares[attack["attack"]] = (line_colour(index), MARKERS[index % len(MARKERS)], found)
    for name, (ink, marker, found) in shares.items():
        rates = [share["rate"] for share in found]
        reach = [[abs(share["rate"] - share["interval"][end]) for share in found] for end in (0, 1)]
        axes.errorbar(
            range(len(rates)),
            rates,
            yerr=None if recalibrated else reach,
            color=ink,
            linestyle=":" if recalibrated else "-",
            elinewidth=0.7,
            marker=marker,
            markersize=4,
            label=name if labelled else None,
        )


def _described(outcome: dict[str, Any]) -> str:
    attacks = ", ".join(
        f"{each['attack']} {told(each['right']['rate'])}"
        for each in outcome["attacks"]
        if each["right"]["rate"] is not None
    )
    clean = f"clean {told(outcome['clean']['rate'])}"
    how = f" at amplitude {outcome['amplitude']:g}{_how(outcome['recalibrated'])}: {clean}"
    return f"{how}, {attacks}" if attacks else how


def _how(recalibrated: bool) -> str:
    return " set anew" if recalibrated else ""


def _setting(row: dict[str, Any]) -> str:
    """Return what a row's setting is called, with a star where it is the version's own."""
    setting = row["setting"][row["varied"]]
    name = setting if isinstance(setting, str) else f"{setting:g}"
    scope = f" ({row['scope']})" if row["varied"] == "layer" and row["scope"] else ""
    return f"{name}{scope}{' *' if row['own'] else ''}"


def _legend(figure: Figure, columns: int) -> None:
    """Put one legend for all panels below them, without a second entry of a name."""
    entries: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if entries:
        figure.legend(entries.values(), entries.keys(), loc="outside lower left", ncols=columns)
