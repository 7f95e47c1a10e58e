"""What the commands share: options, the settings, and how a failure is told."""

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from model_store import Manifest, Store
from service.repository import MODELS
from service.settings import Settings

if TYPE_CHECKING:
    from defenses.evaluation import Progress
    from service.datasets import Dataset

StoreOption = Annotated[
    Path | None, typer.Option("--store", help="Folder of the model store.", show_default="var/store")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
DataOption = Annotated[
    list[str], typer.Option("--data", help="A folder, a zip (repeat for several), digits, or torchvision:NAME.")
]
DataRootOption = Annotated[Path, typer.Option(help="Where torchvision data sets are kept.")]
SeedOption = Annotated[int, typer.Option(help="Seed of the splits, the training and the attacks.")]

OWN_PACKAGES = ("service", "defenses", "model_store")


@contextmanager
def failures_told() -> Iterator[None]:
    """Turn an error that has a sentence to say into that sentence and exit status 1."""
    try:
        yield
    except ModuleNotFoundError as error:
        typer.echo(f"portcullis: {error}. This command needs more: pip install 'portcullis[fit]'.", err=True)
        raise typer.Exit(1) from error
    except Exception as error:
        ours = type(error).__module__.partition(".")[0] in OWN_PACKAGES
        if not ours and not isinstance(error, ValueError | LookupError | OSError):
            raise
        typer.echo(f"portcullis: {error}", err=True)
        raise typer.Exit(1) from error


def settings_with(**given: Any) -> Settings:
    """Return the settings of the environment, with those given put in their place."""
    return Settings(**{name: value for name, value in given.items() if value is not None})


def open_models(store: Path | None) -> Store:
    """Return the store of the models that are served."""
    return Store.open(settings_with(store=store).store / MODELS)


def read_dataset(data: list[str], manifest: Manifest, seed: int, root: Path, progress: "Progress") -> "Dataset":
    """Load a data set in the shape and with the labels that a classifier wants."""
    from service.datasets import load_dataset

    return load_dataset(
        data,
        manifest.input,
        labels=manifest.labels,
        split_seed=seed,
        root=root,
        progress=lambda done, total: progress("images", done, total),
    )


def command_line() -> str:
    """Return the command as it was given, for the record."""
    return shlex.join(["portcullis", *sys.argv[1:]])
