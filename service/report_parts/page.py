"""A report as a page that needs no other file: its templates, and how numbers are written in them."""

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

NOTHING = "-"


def page_environment(package: str) -> Environment:
    """Return an environment for the templates of a package, and the style sheets that all pages share.

    Every name is escaped. The filters ``count``, ``decimal``, ``duration``, ``general``, ``percent`` and ``points``
    write a number as a ``data`` element whose value is the number itself, and None as a dash.
    """
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package, "."), PackageLoader("service.report_parts", ".")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "count": _count,
        "decimal": _decimal,
        "duration": _duration,
        "general": _general,
        "percent": _percent,
        "points": _points,
    }
    return environment


def _number(value: float | None, text: str) -> Markup:
    return Markup('<data value="{}">{}</data>').format(repr(value), text) if value is not None else escape(NOTHING)


def _percent(rate: float | None, places: int = 1) -> Markup:
    return _number(rate, "" if rate is None else f"{100 * rate:.{places}f} %")


def _points(difference: float, places: int = 1) -> Markup:
    return _number(difference, f"{100 * difference:.{places}f}")


def _decimal(value: float | None, places: int = 2) -> Markup:
    return _number(value, "" if value is None else f"{value:.{places}f}")


def _general(value: float | None, digits: int = 4) -> Markup:
    return _number(value, "" if value is None else f"{value:.{digits}g}")


def _count(value: float | None) -> Markup:
    return _number(value, "" if value is None else f"{value:,.0f}")


def _duration(seconds: float | None) -> Markup:
    if seconds is None or seconds < 60:
        return _number(seconds, "" if seconds is None else f"{seconds:.1f} s")
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return _number(seconds, f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s")
