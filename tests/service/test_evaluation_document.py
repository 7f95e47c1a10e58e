"""The schema document says of every field of an evaluation's JSON what there is."""

import types
import typing
from dataclasses import fields, is_dataclass
from pathlib import Path

from service.evaluation import EvaluationReport

ROOT = Path(__file__).parents[2]


def documented() -> dict[str, dict[str, str]]:
    """Return the type of each field of each object that the schema document describes."""
    found: dict[str, dict[str, str]] = {}
    for section in (ROOT / "docs" / "evaluation-report.md").read_text().split("\n## ")[1:]:
        rows = [line.strip("|").split(" | ") for line in section.splitlines() if line.startswith("| `")]
        if rows:
            found[section.splitlines()[0]] = {row[0].strip(" `"): row[1].strip() for row in rows}
            assert all(len(row[2].strip()) > 3 for row in rows), "each field has a meaning"
    return found


def in_json(hint: object) -> str:
    """Return what JSON holds for a Python type."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(in_json(each) for each in inner))
    if origin is typing.Literal:
        return " or ".join(f'`"{each}"`' for each in inner)
    if origin is dict:
        return f"object of {_together(in_json(inner[1]))}"
    if origin in (tuple, list):
        each = _together(in_json(inner[0]))
        return f"array of {each}" if origin is list or inner[-1] is Ellipsis else f"[{', '.join(map(in_json, inner))}]"
    if is_dataclass(hint):
        return f"{hint.__name__}"
    return {int: "integer", float: "number", str: "string", bool: "boolean", type(None): "null"}[hint]


def _together(told: str) -> str:
    return f"({told})" if " or " in told else told


def described(kind: type, found: dict[str, dict[str, str]]) -> dict[str, dict[str, str]]:
    """Return the fields of a dataclass, and of those within it, as JSON holds them."""
    hints = typing.get_type_hints(kind)
    found[kind.__name__] = {each.name: in_json(hints[each.name]) for each in fields(kind)}
    waiting = list(hints.values())
    while waiting:
        hint = waiting.pop()
        if is_dataclass(hint) and hint.__name__ not in found:
            described(hint, found)
        waiting += typing.get_args(hint)
    return found


def test_every_field_of_the_json_is_documented_with_its_type():
    assert documented() == described(EvaluationReport, {})
