"""Figures of the reports as SVG files that stand alone."""

import re
from importlib.resources import files
from pathlib import Path
from xml.etree import ElementTree

from markupsafe import Markup

from service.report_parts.svg import COLOURS, SVG

FONTS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"


def write_figure(figure: Markup, path: Path) -> None:
    """Write an SVG element of ``draw`` as a file with the page's light colours on its own ground.

    Raises ``OSError`` where it cannot be written.
    """
    style = files("service.report_parts").joinpath("page.css").read_text(encoding="utf-8")
    inks = {name: _ink(style, name) for name in COLOURS}
    text = re.sub(r"var\(--([a-z0-9-]+)\)", lambda found: inks[found[1]], str(figure))
    ElementTree.register_namespace("", SVG)
    root = ElementTree.fromstring(text)
    left, top, width, height = root.attrib["viewBox"].split()
    root.attrib |= {"width": f"{width}pt", "height": f"{height}pt", "font-family": FONTS}
    ground = {"x": left, "y": top, "width": width, "height": height, "fill": _ink(style, "page")}
    # After the title and the description, which come first.
    root.insert(2, ElementTree.Element(f"{{{SVG}}}rect", ground))
    path.write_text(ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n", encoding="utf-8")


def _ink(style: str, name: str) -> str:
    """Return a colour of the style sheet, whose light ones come first."""
    found = re.search(rf"--{name}: (#[0-9a-f]+);", style)
    assert found is not None
    return found[1]
