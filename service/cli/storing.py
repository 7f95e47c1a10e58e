"""Commands on the model store."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from model_store import SERVING, Store, StoreError, parse_reference
from service.cli.common import JsonOption, StoreOption, command_line, failures_told, open_models, settings_with


def register(
    name: Annotated[str, typer.Argument(help="The model's name.")],
    onnx: Annotated[Path | None, typer.Option(help="An ONNX file.")] = None,
    arch: Annotated[
        str | None,
        typer.Option(help="cifar_resnet20, 32, 44 or 56, package.module:factory, or torchvision:NAME."),
    ] = None,
    weights: Annotated[Path | None, typer.Option(help="With --arch: a state dict, safetensors or torch.")] = None,
    classes: Annotated[int, typer.Option(help="With --arch: how many classes.", min=2)] = 10,
    input_shape: Annotated[str | None, typer.Option(help="Channels, height and width, such as 3x32x32.")] = None,
    mean: Annotated[str | None, typer.Option(help="The mean per channel, such as 0.485,0.456,0.406.")] = None,
    std: Annotated[str | None, typer.Option(help="The standard deviation per channel.")] = None,
    input_range: Annotated[
        Literal["unit", "byte"], typer.Option(help="With --onnx: unit for [0, 1], byte for [0, 255].")
    ] = "unit",
    layout: Annotated[Literal["NCHW", "NHWC"], typer.Option(help="With --onnx: the order of its input.")] = "NCHW",
    resize: Annotated[Literal["bilinear", "bicubic"] | None, typer.Option(help="Let other sizes in.")] = None,
    labels: Annotated[str | None, typer.Option(help="The classes' names, separated by commas, or a file.")] = None,
    tap: Annotated[str | None, typer.Option(help="The Inspector's layer, if not the one found.")] = None,
    head: Annotated[str | None, typer.Option(help="NIP's layer, if not the one found.")] = None,
    store: StoreOption = None,
) -> None:
    """Keep a classifier as an ONNX graph in the store."""
    with failures_told():
        from service import declare
        from service import register as registering

        declared = registering.Declaration(
            shape=declare.read_shape(input_shape),
            normalisation=declare.read_normalisation(mean, std),
            input_range=input_range,
            layout=layout,
            resize=resize,
            labels=declare.read_labels(labels),
            tap=tap,
            head=head,
        )
        source = declare.read_source(onnx_file=onnx, arch=arch, weights=weights, classes=classes)
        manifest = registering.register(open_models(store), name, source, declared, command=command_line())
        tap, head = (manifest.layers.get(role, "not found") for role in ("tap", "head"))
        typer.echo(
            f"Registered {name}, version {manifest.version}: {len(manifest.labels)} classes, "
            f"input {'x'.join(map(str, manifest.input.shape))}, Inspector's layer {tap}, NIP's layer {head}, "
            f"parity with ONNX Runtime {manifest.metrics['parity']:.1e}."
        )


def promote(
    reference: Annotated[str, typer.Argument(help="The version to serve, as NAME@VERSION.")],
    store: StoreOption = None,
) -> None:
    """Make a version the one that is served; a running gateway takes it at its next start."""
    with failures_told():
        models = open_models(store)
        name, ref = parse_reference(reference)
        version = models.fetch(name, ref).manifest.version
        models.set_alias(name, SERVING, version)
        typer.echo(f"{name} is served in version {version}.")


def models(store: StoreOption = None, as_json: JsonOption = False) -> None:
    """List the store's models and their versions; exit 1 if one cannot be read."""
    with failures_told():
        found = open_models(store)
        rows, unreadable = [], False
        for name in found.models():
            serving = found.aliases(name).get(SERVING)
            for version in found.versions(name):
                try:
                    manifest = found.manifest(name, version)
                except StoreError as error:
                    typer.echo(f"portcullis: {error}", err=True)
                    unreadable = True
                else:
                    rows.append({"serving": version == serving, **json.loads(manifest.model_dump_json())})
        if as_json:
            typer.echo(json.dumps(rows, indent=2))
            raise typer.Exit(int(unreadable))
        table = Table("model", "version", "kind", "serving", "threshold", "clean accuracy", "created")
        for row in rows:
            accuracy = row["metrics"].get("clean_accuracy")
            table.add_row(
                row["name"],
                str(row["version"]),
                row["kind"],
                "yes" if row["serving"] else "",
                _threshold(row["threshold"]),
                "" if accuracy is None else f"{100 * accuracy:.2f} %",
                row["created"],
            )
        Console().print(table)
        raise typer.Exit(int(unreadable))


def _threshold(value: float | list[float] | None) -> str:
    if isinstance(value, list):
        return f"{min(value):.3f} to {max(value):.3f}, by class"
    return "" if value is None else f"{value:.3f}"


def verify(
    name: Annotated[str | None, typer.Argument(help="Only this model.")] = None, store: StoreOption = None
) -> None:
    """Check every file of the store against its digest; exit 1 if anything is wrong."""
    with failures_told():
        root = settings_with(store=store).store
        problems = [problem for part in ("models", "regulators") for problem in Store.open(root / part).verify(name)]
        for problem in problems:
            typer.echo(f"{problem.name}: {problem.message}")
        if problems:
            raise typer.Exit(1)
        typer.echo("Every file is as it was published.")
