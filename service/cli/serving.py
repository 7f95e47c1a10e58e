"""Commands that run the gateway, and that read what it wrote."""

import asyncio
import json
import logging
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from service.cli.common import JsonOption, StoreOption, failures_told, settings_with
from service.settings import EngineName, Precision, unknown_variables


def serve(
    store: StoreOption = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.", show_default="127.0.0.1")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.", show_default="8000")] = None,
    model: Annotated[list[str] | None, typer.Option(help="Serve only this model, as NAME or NAME@VERSION.")] = None,
    engine: Annotated[EngineName | None, typer.Option(help="What computes the answers.", show_default="auto")] = None,
    precision: Annotated[
        Precision | None, typer.Option(help="What answers are computed in.", show_default="auto")
    ] = None,
) -> None:
    """Serve the store's models; every other setting comes from PORTCULLIS_*."""
    with failures_told():
        from service.server import run

        settings = settings_with(
            store=store,
            host=host,
            port=port,
            models=tuple(model) if model else None,
            engine=engine,
            precision=precision,
        )
        logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
        logger = logging.getLogger("portcullis")
        logger.setLevel(logging.INFO)
        for name in unknown_variables():
            logger.warning("%s is set, but there is no such setting.", name)
        run(settings)


def demo(
    port: Annotated[int, typer.Option(help="Port to listen on, or the next free one.")] = 8000,
    once: Annotated[bool, typer.Option("--once", help="Stop after the table.")] = False,
    folder: Annotated[Path, typer.Option(help="Where the demonstration keeps its files.")] = Path("var/demo"),
) -> None:
    """Protect a classifier of handwritten digits, attack it through HTTP, and show what happens."""
    with failures_told():
        from service.demo import run

        raise typer.Exit(run(folder, port, once=once))


def alerts(
    model: Annotated[str | None, typer.Option(help="Only this model's.")] = None,
    limit: Annotated[int, typer.Option(help="The most to list.", min=1)] = 20,
    as_json: JsonOption = False,
) -> None:
    """List the newest alerts in the database."""
    with failures_told():
        from service.alerts import Alert, AlertFilter, AlertLog
        from service.schemas import AlertRow

        async def newest() -> tuple[Alert, ...]:
            log = await AlertLog.open(settings_with().database)
            try:
                return (await log.page(AlertFilter(model=model), None, limit)).alerts
            finally:
                await log.close()

        found = asyncio.run(newest())
        if as_json:
            rows = [AlertRow.model_validate(alert, from_attributes=True).model_dump(mode="json") for alert in found]
            typer.echo(json.dumps(rows, indent=2))
            return
        table = Table("created", "model", "label", "score", "client", "status", "id")
        for alert in found:
            created = alert.created.isoformat(timespec="seconds")
            table.add_row(created, alert.model, alert.label, f"{alert.score:.2f}", alert.client, alert.status, alert.id)
        Console().print(table)
