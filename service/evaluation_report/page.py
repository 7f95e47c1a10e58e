"""The page of an evaluation."""

import re
from pathlib import Path

from markupsafe import Markup

from service.evaluation import Evaluated, EvaluationReport
from service.evaluation_report.curves import Plot, budget_plots, component_plots, resistance_plots
from service.evaluation_report.samples import sample_groups
from service.evaluation_report.tables import (
    checks_failed_first,
    generalisation_of,
    overviews_of,
    plan_terms,
    result_tables,
    substitutes_of,
    sweep_tables,
)
from service.report_parts.page import NOTHING, page_environment


def write_page(evaluated: Evaluated, path: Path) -> None:
    """Write an evaluation's page into a file; raises ``OSError`` where it cannot be written."""
    path.write_text(render(evaluated), encoding="utf-8")


def render(evaluated: Evaluated) -> str:
    """Return an evaluation as one HTML page that needs nothing beside it.

    Every name is escaped. Every number that was measured is a ``data`` element whose value is that of the JSON.
    """
    report = evaluated.report
    environment = page_environment("service.evaluation_report")
    environment.filters["breakable"] = _breakable
    return environment.get_template("page.html.jinja").render(
        report=report,
        overviews=overviews_of(report),
        results=result_tables(report),
        checks=checks_failed_first(report.checks),
        sweeps=sweep_tables(report),
        substitutes=substitutes_of(report),
        matrix=generalisation_of(report),
        terms=plan_terms(report.plan),
        samples=sample_groups(report, evaluated.samples),
        plots=_plots(report),
        nothing=NOTHING,
    )


def _breakable(name: str) -> Markup:
    """Return an attack's name that may go on in another line behind a colon, an equals sign or a comma."""
    return Markup("<wbr>").join(re.split("(?<=[:=,])", name))


def _plots(report: EvaluationReport) -> dict[str, tuple[Plot, ...]]:
    return {
        "resistance": resistance_plots(report),
        "budget": budget_plots(report),
        "components": component_plots(report),
    }
