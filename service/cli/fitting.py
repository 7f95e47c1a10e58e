"""Commands that fit a defense."""

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Column, Table

from service.cli.common import JsonOption, StoreOption, failures_told, settings_with
from service.cli.fit_adversarial import adversarial
from service.cli.fit_baseline import baseline
from service.cli.fit_coophance import coophance
from service.cli.fit_nip import nip

app = typer.Typer(no_args_is_help=True, help="Fit defenses, and look after fits that were interrupted.")


@app.callback()
def fit() -> None:
    """Fit defenses, and look after fits that were interrupted."""


app.command()(coophance)
app.command()(nip)
app.command()(baseline)
app.command()(adversarial)


@app.command("list")
def unfinished(store: StoreOption = None, as_json: JsonOption = False) -> None:
    """List the fits that were interrupted, and those under way."""
    with failures_told():
        from service.fit_job import FITS, FitJobs

        found = FitJobs(settings_with(store=store).store / FITS).unfinished()
        if as_json:
            typer.echo(json.dumps([fit.model_dump(mode="json") for fit in found], indent=2))
            return
        table = Table(Column("key", min_width=16), "model", "data set", "started", "last stage", "size", "process")
        for fit in found:
            record = fit.record
            table.add_row(
                fit.key,
                *((record.model, record.dataset, f"{record.started:%Y-%m-%d %H:%M}") if record else ("", "", "")),
                fit.stages[-1] if fit.stages else "",
                f"{fit.size / 2**20:.1f} MiB",
                "none" if fit.pid is None else str(fit.pid),
            )
        Console().print(table)


@app.command()
def discard(
    key: Annotated[str, typer.Argument(help="The fit's key, as `portcullis fit list` shows it.")],
    store: StoreOption = None,
) -> None:
    """Remove what is kept of an interrupted fit."""
    with failures_told():
        from service.fit_job import FITS, FitJobs

        FitJobs(settings_with(store=store).store / FITS).discard(key)
        typer.echo(f"Nothing is kept of the fit {key} any more.")
