"""A bench's results as a page that needs no other file."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure

from service.report_parts.axes import LINES, line_colour
from service.report_parts.page import page_environment
from service.report_parts.svg import colour, draw

SIZE = (8.0, 3.4)
OTHERS = ("muted", "left", "corrected", "ink")


def page(result: Mapping[str, Any]) -> str:
    """Return what ``loadtest.bench`` measured as HTML, with the phases that there are."""
    phases: dict[str, Any] = {name: result["phases"].get(name) for name in ("compute", "servers", "art", "gateway")}
    servers = phases["servers"]
    plots = {body: rates(best, body) for body, best in servers["best"].items() if best} if servers else {}
    template = page_environment("loadtest").get_template("bench.jinja")
    return template.render(result={**result, "phases": phases}, plots=plots)


def rates(best: Sequence[Mapping[str, Any]], body: str) -> Markup:
    """Return the best rates of the servers as bars, grouped by concurrency, with the spread of their rounds.

    ``body`` is what they were sent; it tells two plots of a page apart.
    """
    servers = list(dict.fromkeys(row["server"] for row in best))
    concurrencies = sorted({row["concurrency"] for row in best})
    rows = {(row["server"], row["concurrency"]): row for row in best}

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        width = 0.8 / len(servers)
        for index, server in enumerate(servers):
            there = [(place, rows[server, c]) for place, c in enumerate(concurrencies) if (server, c) in rows]
            x = np.array([place for place, _ in there]) + (index - (len(servers) - 1) / 2) * width
            height = [row["per_second"] for _, row in there]
            spread = [
                [row["per_second"] - min(row["rounds"]) for _, row in there],
                [max(row["rounds"]) - row["per_second"] for _, row in there],
            ]
            axes.bar(x, height, width * 0.92, color=_colour(index), label=server)
            axes.errorbar(x, height, spread, fmt="none", ecolor=colour("ink"), elinewidth=0.8)
        axes.set_xticks(range(len(concurrencies)), [str(c) for c in concurrencies])
        axes.set_xlabel("requests in flight")
        axes.set_ylabel("requests per second")
        axes.grid(axis="x", visible=False)
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1))

    told = "; ".join(f"{row['server']} at {row['concurrency']}: {row['per_second']:.0f}" for row in best)
    return draw(f"rates-{body}", "Requests per second by server and concurrency", told, SIZE, paint)


def _colour(index: int) -> str:
    return line_colour(index) if index < len(LINES) else colour(OTHERS[(index - len(LINES)) % len(OTHERS)])
