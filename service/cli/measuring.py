"""Commands that measure what a gateway does."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from service.cli.common import (
    DataOption,
    DataRootOption,
    JsonOption,
    SeedOption,
    StoreOption,
    failures_told,
    open_models,
    read_dataset,
)


def evaluate(
    name: Annotated[str, typer.Argument(help="The model, as the gateway calls it.")],
    data: DataOption,
    url: Annotated[str, typer.Option(help="A running gateway that serves this store.")] = "http://127.0.0.1:8000",
    attack: Annotated[
        list[str] | None, typer.Option(help="Attack with this; repeat for several.", show_default="fgsm and pgd-stop")
    ] = None,
    clean: Annotated[bool, typer.Option("--clean", help="Send clean images only.")] = False,
    limit: Annotated[int, typer.Option(help="Images of each kind.", min=1)] = 300,
    seed: SeedOption = 0,
    data_root: DataRootOption = Path("var/data"),
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Send clean and adversarial test images to a running gateway and count what comes back.

    The test images are those of the split that the model was fitted with; --seed orders them.
    """
    with failures_told():
        from defenses.classifier import Classifier
        from service.client import Client
        from service.evaluate import Report, measure
        from service.fit import find_classifier
        from service.progress import progress_bars
        from service.served import GRAPH
        from service.tables import report_table

        client = Client(url)
        served = client.served(name)
        if served.mode == "shadow":
            raise ValueError(f"{name} is served in shadow mode, in which clients are told nothing that can be counted.")
        models = open_models(store)
        bare = find_classifier(models, name, served.version)
        fitted_on = models.manifest(name, served.version).data
        with progress_bars(shown=not as_json) as progress:
            split_seed = fitted_on.split_seed if fitted_on else seed
            dataset = read_dataset(data, bare.manifest, split_seed, data_root, progress)
            if fitted_on and fitted_on.digest != dataset.digest:
                typer.echo(
                    f"portcullis: {name} was fitted on other images than these (digest {fitted_on.digest[:12]}, not "
                    f"{dataset.digest[:12]}), so that some of these may have been fitted on.",
                    err=True,
                )
            measured = measure(
                client,
                name,
                Classifier.load(bare.folder / GRAPH).eval(),
                dataset.test,
                attacks=[] if clean else attack or ["fgsm", "pgd-stop"],
                limit=limit,
                seed=seed,
                progress=progress,
            )
        report = Report.of(name, served, measured)
        if as_json:
            typer.echo(json.dumps(report.as_json(), indent=2))
        else:
            Console().print(report_table(report))
