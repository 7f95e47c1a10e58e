"""The fit report as a page."""

from collections.abc import Iterator, Sequence
from typing import Any

from service.fit_report.plots import detector_plot, loss_plot, resistance_plot, score_plot, selection_plot
from service.fit_report.samples import SAMPLES, Strip
from service.report_parts.page import NOTHING, page_environment

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
    environment = page_environment("service.fit_report")
    environment.filters |= {"leaves": _leaves, "stage": lambda name: STAGES.get(name, name)}
    plots = {
        "resistance": resistance_plot(report),
        "detector": detector_plot(report),
        "scores": [score_plot(report, index) if shown else None for index, shown in enumerate(strips)],
        "loss": loss_plot(report) if report["regulator"]["curves"] else None,
        "selection": selection_plot(report) if report["selection"]["chosen"]["corrected"] is not None else None,
    }
    return environment.get_template("page.html.jinja").render(
        report=report, strips=strips, plots=plots, samples_shown=SAMPLES, nothing=NOTHING
    )


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted name and the value of each leaf; lists are leaves."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", ", ".join(map(str, value)) if isinstance(value, list) else value
