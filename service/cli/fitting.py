"""Commands that fit a defense."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from model_store import SERVING, Manifest, parse_reference
from service.cli.common import (
    DataOption,
    DataRootOption,
    JsonOption,
    SeedOption,
    StoreOption,
    command_line,
    failures_told,
    open_models,
    read_dataset,
    settings_with,
)

app = typer.Typer(no_args_is_help=True, help="Fit a defense for a registered classifier and publish it.")

ACCEPTABLE_LOSS = 0.2
"""The clean accuracy that a fit may cost before its user is warned."""


@app.callback()
def fit() -> None:
    """Fit a defense for a registered classifier and publish it."""


@app.command()
def coophance(
    name: Annotated[str, typer.Argument(help="The classifier, as NAME or NAME@VERSION.")],
    data: DataOption,
    attack: Annotated[
        list[str] | None,
        typer.Option(help="Fit on this attack; repeat for several.", show_default="fgsm, pgd-stop and pgd"),
    ] = None,
    examples: Annotated[int, typer.Option(help="Adversarial examples per attack.", min=1)] = 2000,
    epochs: Annotated[float, typer.Option(help="How long the Regulator is trained.", min=0)] = 20,
    minutes: Annotated[float | None, typer.Option(help="Training time instead of epochs.", min=0)] = None,
    budget: Annotated[float, typer.Option(help="The false-positive rate to calibrate to.")] = 0.05,
    form: Annotated[Literal["batch-norm", "plain"], typer.Option(help="The Regulator's form.")] = "batch-norm",
    confusion: Annotated[bool, typer.Option(help="Leave the confusion noise on at inference.")] = True,
    alpha: Annotated[float, typer.Option(help="How much of the measured fluctuation confuses.", min=0)] = 1.0,
    flip: Annotated[bool, typer.Option(help="Mirror training images; not for digits or signs.")] = True,
    inspect: Annotated[Literal["raw", "purified"], typer.Option(help="The image that the Inspector sees.")] = "raw",
    layer: Annotated[str | None, typer.Option(help="The Inspector's layer, if not the registered one.")] = None,
    inverse_penalty: Annotated[float, typer.Option(help="The C of the Inspector's regressions.")] = 1e-3,
    seed: SeedOption = 0,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where to fit.")] = "auto",
    promote: Annotated[bool, typer.Option("--promote", help="Serve the new version.")] = False,
    data_root: DataRootOption = Path("var/data"),
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Fit a Regulator and an Inspector, calibrate the threshold, and publish the protected classifier."""
    with failures_told():
        from defenses.coophance import FitPlan
        from service.fit import find_classifier, fit_and_publish
        from service.progress import progress_bars

        plan = FitPlan(
            attacks=tuple(attack or FitPlan.attacks),
            examples=examples,
            epochs=epochs,
            minutes=minutes,
            budget=budget,
            form=form,
            confusion=confusion,
            alpha=alpha,
            flip=flip,
            inspects=inspect,
            layer=layer,
            inverse_penalty=inverse_penalty,
            seed=seed,
        )
        models = open_models(store)
        classifier = find_classifier(models, *parse_reference(name))
        with progress_bars(shown=not as_json) as progress:
            dataset = read_dataset(data, classifier.manifest, seed, data_root, progress)
            root = settings_with(store=store).store
            manifest = fit_and_publish(
                root, classifier, dataset, plan, device=device, progress=progress, command=command_line()
            )
        lost = manifest.metrics["clean_accuracy_undefended"] - manifest.metrics["clean_accuracy"]
        if lost > ACCEPTABLE_LOSS:
            typer.echo(
                f"portcullis: this defense costs {100 * lost:.1f} points of clean accuracy; fit longer.", err=True
            )
        if promote:
            models.set_alias(manifest.name, SERVING, manifest.version)
        if as_json:
            typer.echo(manifest.model_dump_json(indent=2))
            return
        _show(manifest)
        if not promote:
            typer.echo(f"Serve it with: portcullis promote {manifest.name}@{manifest.version}")


def _show(manifest: Manifest) -> None:
    table = Table("measured on the test split", "rate", title=f"{manifest.name}, version {manifest.version}")
    for name, value in manifest.metrics.items():
        table.add_row(name, f"{100 * value:.2f} %")
    Console().print(table)
