"""The fit report as a page."""

from collections.abc import Iterator, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from service.fit_report.plots import detector_plot, loss_plot, resistance_plot, score_plot, selection_plot
from service.fit_report.samples import SAMPLES, Strip

NOTHING = "-"

STAGES = {
    "handover": "training, the first 60 % of the steps",
    "sample model": "sample model, the last 40 %",
    "statistics": "fluctuation statistics",
    "regulator": "Regulator, the last 40 %",
    "selection": "stopping point and strength",
    "inspector": "Inspector",
}
"""What a stage is called on the page, where its own name tells too little."""


def render(report: dict[str, Any], strips: Sequence[Sequence[Strip]]) -> str:
    """Return a fit's report as one HTML page that needs nothing beside it.

    ``strips`` are the pictures of the report's samples, attack by attack. Every name is escaped; every number is a
    ``data`` element whose value is that of the JSON.
    """
    environment = Environment(
        loader=PackageLoader("service.fit_report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "count": _count,
        "decimal": _decimal,
        "duration": _duration,
        "leaves": _leaves,
        "percent": _percent,
        "points": _points,
        "stage": lambda name: STAGES.get(name, name),
    }
    plots = {
        "resistance": resistance_plot(report),
        "detector": detector_plot(report),
        "scores": [score_plot(report, index) if shown else None for index, shown in enumerate(strips)],
        "loss": loss_plot(report) if report["regulator"]["curves"] else None,
        "selection": selection_plot(report),
    }
    return environment.get_template("page.html.jinja").render(
        report=report, strips=strips, plots=plots, samples_shown=SAMPLES, nothing=NOTHING
    )


def _number(value: float | None, text: str) -> Markup:
    return Markup('<data value="{}">{}</data>').format(repr(value), text) if value is not None else escape(NOTHING)


def _percent(rate: float | None, places: int = 1) -> Markup:
    return _number(rate, "" if rate is None else f"{100 * rate:.{places}f} %")


def _points(difference: float, places: int = 1) -> Markup:
    return _number(difference, f"{100 * difference:.{places}f}")


def _decimal(value: float | None, places: int = 2) -> Markup:
    return _number(value, "" if value is None else f"{value:.{places}f}")


def _count(value: float | None) -> Markup:
    return _number(value, "" if value is None else f"{value:,.0f}")


def _duration(seconds: float | None) -> Markup:
    if seconds is None or seconds < 60:
        return _number(seconds, "" if seconds is None else f"{seconds:.1f} s")
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return _number(seconds, f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s")


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted name and the value of each leaf; lists are leaves."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", ", ".join(map(str, value)) if isinstance(value, list) else value
