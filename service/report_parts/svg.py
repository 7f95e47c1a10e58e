"""Figures as SVG that stands inside a page and takes the page's colours and fonts."""

import io
import re
from collections.abc import Callable
from typing import Any
from xml.etree import ElementTree

from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.typing import RcKeyType

SVG = "http://www.w3.org/2000/svg"

COLOURS = ("ink", "muted", "grid", "clean", "left", "corrected", *(f"line-{index}" for index in range(1, 7)))
"""The names of the page's colours, as its style sheet defines them."""

STYLE: dict[RcKeyType, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 9,
    "axes.titlesize": 9,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "figure.constrained_layout.use": True,
}


def colour(name: str) -> str:
    """Return what stands for one of the page's colours until a figure is in the page."""
    return f"#0000{1 + COLOURS.index(name):02x}"


def draw(name: str, title: str, description: str, size: tuple[float, float], paint: Callable[[Figure], None]) -> Markup:
    """Return a figure of so many inches as an SVG element; ``paint`` draws on the blank figure.

    ``name`` is unique in the page. The title and the description are for those who cannot see the figure. Text stays
    text; colours are variables of the page's style sheet. The global settings of matplotlib are as they were
    afterwards.
    """
    inks: dict[RcKeyType, str] = {
        "text.color": colour("ink"),
        "axes.labelcolor": colour("ink"),
        "axes.edgecolor": colour("muted"),
        "xtick.color": colour("muted"),
        "ytick.color": colour("muted"),
        "grid.color": colour("grid"),
        "svg.hashsalt": name,
    }
    content = io.StringIO()
    with rc_context({**STYLE, **inks}):
        figure = Figure(figsize=size)
        FigureCanvasSVG(figure)
        paint(figure)
        figure.savefig(content, format="svg")
    return _embedded(content.getvalue(), name, title, description)


def _embedded(document: str, name: str, title: str, description: str) -> Markup:
    root = ElementTree.fromstring(document)
    for element in root.iter():
        element.tag = element.tag.removeprefix(f"{{{SVG}}}")
        if "style" in element.attrib:
            element.attrib["style"] = _styled(element.attrib["style"])
        _rename(element, name)
    for child in [child for child in root if child.tag not in {"defs", "g"} or child.find("style") is not None]:
        root.remove(child)
    for tag, text in (("desc", description), ("title", title)):
        told = ElementTree.Element(tag, id=f"{name}-{tag}")
        told.text = text
        root.insert(0, told)
    root.attrib = {
        "xmlns": SVG,
        "viewBox": root.attrib["viewBox"],
        "role": "img",
        "aria-labelledby": f"{name}-title {name}-desc",
        "class": "plot",
    }
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _styled(style: str) -> str:
    """Return a style with the page's colours, and without a font of its own."""
    for name in COLOURS:
        style = style.replace(colour(name), f"var(--{name})")
    return re.sub(r"font-family:[^;]*;? ?", "", style)


def _rename(element: ElementTree.Element, name: str) -> None:
    """Make the ids that an element has, or refers to, the figure's own."""
    for key, value in list(element.attrib.items()):
        if key == "id":
            element.attrib[key] = f"{name}-{value}"
        elif key.endswith("}href"):
            del element.attrib[key]
            element.attrib["href"] = value.replace("#", f"#{name}-")
        elif "url(#" in value:
            element.attrib[key] = value.replace("url(#", f"url(#{name}-")
