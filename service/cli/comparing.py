"""The command that sets two evaluations beside each other."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from service.cli.common import JsonOption, failures_told

if TYPE_CHECKING:
    from service.evaluation.compare import Comparison, Difference, Place, Share

WORSE = 3
"""The exit status where a rate is worse and that was to be a failure."""


def compare(
    first: Annotated[Path, typer.Argument(help="An evaluation, as evaluate --output writes it.", metavar="A.json")],
    second: Annotated[Path, typer.Argument(help="Another, to be compared with the first.", metavar="B.json")],
    anyway: Annotated[
        bool, typer.Option("--anyway", help="Compare evaluations of other classifiers, data or images too.")
    ] = False,
    fail_on_worse: Annotated[
        bool, typer.Option("--fail-on-worse", help=f"Exit with {WORSE} where a rate is worse beyond chance.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Tell where a second evaluation is better or worse than a first, and what may be chance.

    Compared are clean accuracy, false positives and what is resisted of each attack that both have.
    """
    with failures_told():
        from service.evaluation.compare import compare as compared
        from service.evaluation.compare import load_report

        comparison = compared(load_report(first), load_report(second), anyway=anyway)
        if as_json:
            typer.echo(json.dumps(comparison.as_json(), indent=2))
        else:
            Console().print(comparison_tables(comparison))
        if fail_on_worse and comparison.worse:
            raise typer.Exit(WORSE)


def comparison_tables(comparison: "Comparison") -> Group:
    """Return a comparison as a table of differences, and below it what is otherwise not the same."""
    table = Table(title="the second less the first, in points", box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    table.caption = (
        "Worse and better: the 95 % interval of the difference, Newcombe's, excludes 0. Of many rates that are alike "
        "up to one in twenty does so by chance. Over the same images it is rather too wide. In brackets: images. !: a "
        "check failed. ?: no check looked at it."
    )
    table.add_column("rate", overflow="fold")
    for heading in ("A", "B", "B - A", "95 %"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    defense = ""
    for each in comparison.differences:
        defense, before = _defenses(each), defense
        if defense != before:
            table.add_row(Text(defense, style="bold"))
        table.add_row(*_cells(each))
    told = [
        *(f"Not alike: {each}." for each in comparison.unlike),
        *(f"Otherwise made: {each}." for each in comparison.notes),
        *(f"In the first alone: {_defense(place)}, {_rate(place)}." for place in comparison.only_first),
        *(f"In the second alone: {_defense(place)}, {_rate(place)}." for place in comparison.only_second),
    ]
    return Group(table, *map(Text, told))


def _cells(each: "Difference") -> tuple[Text, ...]:
    low, high = each.interval
    both = (each.first, each.second)
    mark = " !" if any(share.untrusted for share in both) else " ?" if any(share.unchecked for share in both) else ""
    verdict = "worse" if each.worse else "better" if each.better else ""
    return (
        Text(_rate(each.place) + mark),
        Text(_share(each.first)),
        Text(_share(each.second)),
        Text(f"{100 * each.difference:+.1f}"),
        Text(f"{100 * low:+.1f}, {100 * high:+.1f}"),
        Text(verdict, style="bold red" if each.worse else "green"),
    )


def _share(share: "Share") -> str:
    return f"{100 * share.rate:.1f} % ({share.images})"


def _defenses(each: "Difference") -> str:
    name = _defense(each.place)
    return name if each.second_defense == each.place.defense else f"{name}, {each.second_defense}"


def _defense(place: "Place") -> str:
    return f"{place.method} {place.defense}"


def _rate(place: "Place") -> str:
    if place.attack is None:
        return place.measure
    return f"{place.scenario}, {place.attack}, {place.form}"
