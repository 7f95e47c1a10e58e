"""Lines, marks and axes of rates, as the figures of every report have them."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from service.report_parts.svg import COLOURS, colour

LINES = tuple(name for name in COLOURS if name.startswith("line-"))
MARKERS = ("o", "s", "^", "D", "v", "P")


def line_colour(index: int) -> str:
    """Return the colour of a figure's line by its place."""
    return colour(LINES[index % len(LINES)])


def percent_ticks(axis: Axis) -> None:
    """Write an axis of shares in per cent."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.10g} %"))


def rate_axes(figure: Figure, images: int, x: str, y: str) -> Axes:
    """Return axes of rates, the lower logarithmic from below one image in so many to all of them."""
    axes = figure.add_subplot()
    axes.set_xscale("log")
    axes.set_xlim(0.5 / images, 1)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    percent_ticks(axes.xaxis)
    percent_ticks(axes.yaxis)
    return axes


def rate_points(curve: Sequence[Sequence[float]], least: float) -> tuple[list[float], list[float]]:
    """Return the coordinates of a curve for a logarithmic axis that begins at ``least``."""
    return [max(x, least) for x, _ in curve], [y for _, y in curve]


def told(rate: float) -> str:
    """Return a share in per cent, as a figure's description tells it."""
    return f"{100 * rate:.1f} %"
