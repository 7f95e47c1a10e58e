"""Commands that fit a defense."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Column, Table

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
from service.cli.endings import exhaustion_told, interruptions_told

app = typer.Typer(no_args_is_help=True, help="Fit defenses, and look after fits that were interrupted.")

ACCEPTABLE_LOSS = 0.2
"""The clean accuracy that a fit may cost before its user is warned."""


@app.callback()
def fit() -> None:
    """Fit defenses, and look after fits that were interrupted."""


@app.command()
def coophance(
    name: Annotated[str, typer.Argument(help="The classifier, as NAME or NAME@VERSION.")],
    data: DataOption,
    preset: Annotated[
        Literal["default", "paper"], typer.Option(help="What the options below are where they are not given.")
    ] = "default",
    attack: Annotated[
        list[str] | None, typer.Option(help="Fit on this attack; repeat for several.", show_default="the preset's")
    ] = None,
    examples: Annotated[int | None, typer.Option(help="Images that each attack is run on.", min=1)] = None,
    budget: Annotated[float | None, typer.Option(help="The false-positive rate to calibrate to.")] = None,
    accuracy_loss: Annotated[
        float | None, typer.Option(help="The share of clean images that the Regulator may cost.", min=0)
    ] = None,
    strength: Annotated[
        float | None, typer.Option(help="The share of the purified image, in place of choosing it.")
    ] = None,
    epochs: Annotated[float | None, typer.Option(help="How long the Regulator is trained.", min=0)] = None,
    minutes: Annotated[float | None, typer.Option(help="Training time instead of epochs.", min=0)] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Images in a training batch; fewer need less memory.", min=1)
    ] = None,
    channels: Annotated[str | None, typer.Option(help="Widths of the Regulator's stages, as 16,32,64,128.")] = None,
    skip_channels: Annotated[str | None, typer.Option(help="Widths of its skips; 0 leaves one out.")] = None,
    batch_norm: Annotated[bool | None, typer.Option(help="Build the Regulator with batch norm.")] = None,
    output: Annotated[
        Literal["image", "residual"] | None, typer.Option(help="What its network gives: the image, or a change to it.")
    ] = None,
    training_noise: Annotated[
        float | None, typer.Option(help="Standard deviation of its input noise in training, in [0, 1].", min=0)
    ] = None,
    input_noise: Annotated[
        float | None, typer.Option(help="Standard deviation of its input noise at inference, in [0, 1].", min=0)
    ] = None,
    confusion: Annotated[
        Literal["on", "training", "off"] | None,
        typer.Option(help="Where the confusion layers act: always, only in training, or nowhere."),
    ] = None,
    alpha: Annotated[float | None, typer.Option(help="How much of the measured fluctuation confuses.", min=0)] = None,
    precision: Annotated[
        Literal["auto", "float32", "bfloat16"] | None,
        typer.Option(help="Its training's arithmetic: bfloat16 where the machine has it, or as said."),
    ] = None,
    flip: Annotated[bool | None, typer.Option(help="Mirror training images; not for digits or signs.")] = None,
    stop: Annotated[
        Literal["validated", "last"] | None, typer.Option(help="Choose where the training stops, or take its end.")
    ] = None,
    inspect: Annotated[
        Literal["raw", "purified"] | None, typer.Option(help="The image that the Inspector sees.")
    ] = None,
    layer: Annotated[str | None, typer.Option(help="The Inspector's layer, if not the registered one.")] = None,
    most_features: Annotated[
        int | None, typer.Option(help="Pool the Inspector's layer to at most so many features.", min=1)
    ] = None,
    inverse_penalty: Annotated[
        float | None, typer.Option(help="The C of the Inspector's regressions, in place of choosing it.")
    ] = None,
    surviving: Annotated[
        bool | None, typer.Option(help="Fit the Inspector to what the Regulator leaves, or to every attack.")
    ] = None,
    fusion: Annotated[
        bool | None, typer.Option(help="Weigh the Inspector's score with how the two answers differ.")
    ] = None,
    thresholds: Annotated[
        Literal["model", "class"] | None, typer.Option(help="Calibrate one threshold, or one for each class.")
    ] = None,
    regulator: Annotated[
        str | None, typer.Option(help="Use a published Regulator again, as NAME@VERSION.", show_default="fit one")
    ] = None,
    seed: SeedOption = 0,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where to fit.")] = "auto",
    fresh: Annotated[bool, typer.Option("--fresh", help="Begin anew what was interrupted.")] = False,
    promote: Annotated[bool, typer.Option("--promote", help="Serve the new version.")] = False,
    data_root: DataRootOption = Path("var/data"),
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Fit a Regulator and an Inspector, calibrate the threshold, and publish the protected classifier.

    A fit that was interrupted resumes with the stage it was at when the same command is given again.
    """
    with failures_told(), interruptions_told(), exhaustion_told():
        from service.fit import find_classifier, fit_and_publish
        from service.fit_plan import chosen_plan, read_widths
        from service.progress import progress_bars

        plan = chosen_plan(
            preset,
            fit={
                "attacks": attack and tuple(attack),
                "examples": examples,
                "budget": budget,
                "accuracy_loss": accuracy_loss,
                "strength": strength,
                "seed": seed,
            },
            regulator={
                "epochs": epochs,
                "minutes": minutes,
                "batch_size": batch_size,
                "channels": read_widths(channels),
                "skip_channels": read_widths(skip_channels),
                "batch_norm": batch_norm,
                "output": output,
                "training_noise": training_noise,
                "inference_noise": input_noise,
                "confusion": confusion,
                "alpha": alpha,
                "precision": precision,
                "flip": flip,
                "stop": stop,
            },
            inspector={
                "inspects": inspect,
                "layer": layer,
                "most_features": most_features,
                "inverse_penalty": inverse_penalty,
                "surviving": surviving,
                "fusion": fusion,
                "thresholds": thresholds,
            },
            reused=regulator,
        )
        models = open_models(store)
        classifier = find_classifier(models, *parse_reference(name))
        with progress_bars(shown=not as_json) as progress:
            dataset = read_dataset(data, classifier.manifest, seed, data_root, progress)
            root = settings_with(store=store).store
            manifest = fit_and_publish(
                root,
                classifier,
                dataset,
                plan,
                regulator=regulator,
                device=device,
                fresh=fresh,
                progress=progress,
                notice=lambda told: typer.echo(f"portcullis: {told}", err=True),
                command=command_line(),
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


def _show(manifest: Manifest) -> None:
    table = Table("measured on the test split", "rate", title=f"{manifest.name}, version {manifest.version}")
    for name, value in manifest.metrics.items():
        table.add_row(name, f"{100 * value:.2f} %")
    Console().print(table)
