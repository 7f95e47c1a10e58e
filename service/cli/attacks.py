"""The command that lists the attacks."""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.table import Table

from service.cli.common import JsonOption, failures_told

if TYPE_CHECKING:
    from defenses.attacks.attack import Entry


def attacks(as_json: JsonOption = False) -> None:
    """List the attacks: parameters, norm, what they need to see of a model, how often they ask it, and their source."""
    with failures_told():
        from defenses.attacks import ATTACKS

        if as_json:
            typer.echo(json.dumps({name: _facts(entry) for name, entry in ATTACKS.items()}, indent=2))
        else:
            Console().print(_table(ATTACKS))


def _facts(entry: "Entry") -> dict[str, object]:
    facts = entry.facts
    return {
        "parameters": dict(entry.defaults),
        "norm": facts.norm,
        "sees": facts.sees,
        "on": facts.on,
        "targeted": facts.targeted,
        "passes": facts.passes,
        "source": facts.paper,
    }


def _table(entries: "Mapping[str, Entry]") -> Table:
    table = Table(title="attacks", caption="Passes: how often a model is asked about an image at most.")
    for heading in ("attack", "parameters", "norm", "sees", "on", "passes", "source"):
        table.add_column(heading, justify="right" if heading == "passes" else "left", overflow="fold")
    for name, entry in entries.items():
        facts = entry.facts
        parameters = ", ".join(f"{key}={value:.4g}" for key, value in entry.defaults.items())
        table.add_row(name, parameters, facts.norm, facts.sees, facts.on, f"{facts.passes:,}", facts.paper)
    return table
