"""What the commands that fit share: how a fit is run, and what it shows when it is published."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from model_store import SERVING, Fetched, Manifest, parse_reference
from service.cli.common import open_models, read_dataset, settings_with

if TYPE_CHECKING:
    from defenses.evaluation import Progress
    from service.datasets import Dataset

ClassifierArgument = Annotated[str, typer.Argument(help="The classifier, as NAME or NAME@VERSION.")]
PresetOption = Annotated[
    Literal["default", "paper"], typer.Option(help="What the options below are where they are not given.")
]
DeviceOption = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where to fit.")]
FreshOption = Annotated[bool, typer.Option("--fresh", help="Begin anew what was interrupted.")]
PromoteOption = Annotated[bool, typer.Option("--promote", help="Serve the new version.")]

ACCEPTABLE_LOSS = 0.2
"""The clean accuracy that a fit may cost before its user is warned."""

Publish = Callable[[Path, Fetched, "Dataset", "Progress"], Manifest]
"""Fit in a store's folder for a classifier on a data set, and publish."""


def fit_and_show(
    name: str,
    publish: Publish,
    *,
    data: list[str],
    seed: int,
    data_root: Path,
    store: Path | None,
    promote: bool,
    as_json: bool,
    advice: str,
) -> None:
    """Fit by ``publish``, promote the new version if asked to, and show it; ``advice`` ends the warning of a cost."""
    from service.fit import find_classifier
    from service.progress import progress_bars

    models = open_models(store)
    classifier = find_classifier(models, *parse_reference(name))
    with progress_bars(shown=not as_json) as progress:
        dataset = read_dataset(data, classifier.manifest, seed, data_root, progress)
        manifest = publish(settings_with(store=store).store, classifier, dataset, progress)
    lost = manifest.metrics["clean_accuracy_undefended"] - manifest.metrics["clean_accuracy"]
    if lost > ACCEPTABLE_LOSS:
        tell(f"this defense costs {100 * lost:.1f} points of clean accuracy; {advice}.")
    if promote:
        models.set_alias(manifest.name, SERVING, manifest.version)
    if as_json:
        typer.echo(manifest.model_dump_json(indent=2))
        return
    _show(manifest)
    if not promote:
        typer.echo(f"Serve it with: portcullis promote {manifest.name}@{manifest.version}")


def tell(sentence: str) -> None:
    """Tell the user something that is no result, on the error stream."""
    typer.echo(f"portcullis: {sentence}", err=True)


def _show(manifest: Manifest) -> None:
    table = Table("measured on the test split", "rate", title=f"{manifest.name}, version {manifest.version}")
    for name, value in manifest.metrics.items():
        table.add_row(name, f"{100 * value:.2f} %")
    Console().print(table)
