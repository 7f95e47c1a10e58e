"""Commands that measure what a defense does."""

import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console, RenderableType

from model_store import DataRecord, Manifest, Store, parse_reference
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
)

if TYPE_CHECKING:
    from defenses.evaluation import Progress
    from service.datasets import Dataset
    from service.evaluate import Report
    from service.hardware import DeviceName
    from service.nip_studies import StudyName, StudyReport
    from service.nip_success import SuccessReport
    from service.scenario_a import ScenarioAPlan, ScenarioAReport

    Read = Callable[[Manifest, DataRecord | None], Dataset]

THROUGH_HTTP = ("fgsm", "pgd-stop")
"""The attacks that a gateway is measured with unless told otherwise; few examples of the others survive rounding."""


def evaluate(
    name: Annotated[
        str, typer.Argument(help="The model, as NAME or NAME@VERSION; with --url as the gateway calls it.")
    ],
    data: DataOption,
    url: Annotated[
        str | None, typer.Option(help="Measure the running gateway there, which serves this store, through HTTP.")
    ] = None,
    attack: Annotated[
        list[str] | None,
        typer.Option(
            help="Attack with this; repeat for several.",
            show_default="fgsm, pgd-stop, deepfool and cw; with --url fgsm and pgd-stop",
        ),
    ] = None,
    clean: Annotated[bool, typer.Option("--clean", help="Measure on clean images only.")] = False,
    limit: Annotated[int, typer.Option(help="Images attempted per attack; with --url also clean ones.", min=1)] = 300,
    seed: SeedOption = 0,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where to compute, without --url.")] = "auto",
    confusion: Annotated[
        bool | None, typer.Option(help="Switch the confusion layers, without --url.", show_default="as published")
    ] = None,
    noise: Annotated[bool, typer.Option(help="Leave the defense's noise on, without --url.")] = True,
    controls: Annotated[
        bool,
        typer.Option("--controls", help="Of a NIP defense, measure what replaces its direction too, and its oracle."),
    ] = False,
    study: Annotated[
        list[str] | None,
        typer.Option(
            help="Do this study in place of the measurement: influence, tknc, k, layer, eta or neurons; repeat for "
            "several.",
            show_default="none",
        ),
    ] = None,
    plots: Annotated[Path | None, typer.Option(help="Also draw each study into this folder, as SVG.")] = None,
    data_root: DataRootOption = Path("var/data"),
    store: StoreOption = None,
    output: Annotated[Path | None, typer.Option(help="Also write the JSON into this file.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Attack a defense and count what it resists: a published version, or with --url a running gateway.

    The attacks are crafted on the bare classifier (scenario A), from the test split of the data that the defense was
    fitted on; --seed orders the images. A study looks into a NIP defense in place of measuring it: at the influence of
    its neurons, their consistency (tknc), and at pools that are made for the moment with other numbers of neurons (k),
    of other layers, of fewer candidates (eta), or with the perturbation added to the activations (neurons).
    """
    with failures_told():
        from service.progress import progress_bars
        from service.scenario_a import ScenarioAPlan
        from service.tables import report_table

        if output and not output.absolute().parent.is_dir():
            raise FileNotFoundError(f"There is no folder {output.absolute().parent} to write {output.name} into.")
        if url and (device != "auto" or confusion is not None or not noise or controls):
            raise ValueError(
                "--device, --confusion, --noise and --controls are for a measurement without --url: a gateway has its "
                "own."
            )
        chosen = () if clean else tuple(attack or (THROUGH_HTTP if url else ScenarioAPlan.attacks))
        plan = ScenarioAPlan(chosen, limit, seed, confusion, noise)
        if plots and not study:
            raise ValueError("--plots draws studies: name one or more with --study.")
        otherwise = bool(url or clean or controls or confusion is not None or not noise)
        studies = _chosen_studies(study, plots, otherwise=otherwise) if study else ()
        models = open_models(store)
        with progress_bars(shown=not as_json) as progress:

            def read(input_of: Manifest, fitted_on: DataRecord | None) -> "Dataset":
                split_seed = fitted_on.split_seed if fitted_on else seed
                dataset = read_dataset(data, input_of, split_seed, data_root, progress)
                if fitted_on and fitted_on.digest != dataset.digest:
                    _warn_of_other_images(name, fitted_on.digest, dataset.digest)
                return dataset

            shown: RenderableType
            if url:
                through_http = _measure_gateway(url, models, name, plan, read, progress)
                values, shown = through_http.as_json(), report_table(through_http)
            elif studies:
                studied = _study_version(models, name, studies, plan, device, read, progress)
                values, shown = studied.as_json(), _study_tables(studied)
            else:
                offline = _measure_version(models, name, plan, device, read, progress, controls=controls)
                values, shown = offline.as_json(), _tables(offline)
        text = json.dumps(values, indent=2)
        if output:
            output.write_text(text + "\n")
        if plots:
            _draw(values, plots)
        if as_json:
            typer.echo(text)
        else:
            Console().print(shown)


def _measure_version(
    models: Store,
    name: str,
    plan: "ScenarioAPlan",
    device: "DeviceName",
    read: "Read",
    progress: "Progress",
    *,
    controls: bool,
) -> "ScenarioAReport | SuccessReport":
    from defenses.coophance import Regulator
    from defenses.nip import InversePerturbation
    from service.defended import load_defended
    from service.hardware import find_device
    from service.nip_success import SuccessPlan, measure_success
    from service.scenario_a import measure_scenario_a

    found = find_device(device)
    fetched, protected = load_defended(models, *parse_reference(name))
    pool = isinstance(protected.purifier, InversePerturbation)
    if not isinstance(protected.purifier, Regulator) and (plan.confusion is not None or not plan.noise):
        raise ValueError(f"--confusion and --noise are for a defense that has noise, and {name} has none.")
    if controls and not pool:
        raise ValueError(f"--controls is for a defense with a pool of inverse perturbations, and {name} has none.")
    dataset = read(fetched.manifest, fetched.manifest.data)
    if not pool:
        return measure_scenario_a(
            fetched, protected, dataset, plan, device=found, progress=progress, command=command_line()
        )
    wanted = SuccessPlan(plan.attacks, plan.limit, plan.seed, controls)
    return measure_success(fetched, protected, dataset, wanted, device=found, progress=progress, command=command_line())


def _chosen_studies(names: list[str], plots: Path | None, *, otherwise: bool) -> "tuple[StudyName, ...]":
    from service.nip_studies import check_folder, known_studies

    if otherwise:
        raise ValueError(
            "--url, --clean, --controls, --confusion and --noise are for a measurement, and --study asks for another."
        )
    if plots:
        check_folder(plots)
    return known_studies(names)


def _study_version(
    models: Store,
    name: str,
    studies: "tuple[StudyName, ...]",
    plan: "ScenarioAPlan",
    device: "DeviceName",
    read: "Read",
    progress: "Progress",
) -> "StudyReport":
    from service.defended import load_defended
    from service.hardware import find_device
    from service.nip_studies import StudyPlan, check_suitable, run_studies

    found = find_device(device)
    kind = models.manifest(*parse_reference(name)).kind
    if kind != "nip":
        raise ValueError(f"--study is for a defense of kind nip, and {name} is of kind {kind}.")
    fetched, protected = load_defended(models, *parse_reference(name))
    check_suitable(fetched.manifest, protected)
    dataset = read(fetched.manifest, fetched.manifest.data)
    wanted = StudyPlan(studies, plan.attacks, plan.limit, plan.seed)
    return run_studies(fetched, protected, dataset, wanted, device=found, progress=progress, command=command_line())


def _study_tables(report: "StudyReport") -> "RenderableType":
    from service.nip_studies import study_tables

    return study_tables(report)


def _draw(values: dict[str, Any], folder: Path) -> None:
    from service.nip_studies import write_plots

    write_plots(values, folder)


def _tables(report: "ScenarioAReport | SuccessReport") -> "RenderableType":
    from service.scenario_a import ScenarioAReport
    from service.tables import scenario_a_tables, success_tables

    return scenario_a_tables(report) if isinstance(report, ScenarioAReport) else success_tables(report)


def _measure_gateway(
    url: str, models: Store, name: str, plan: "ScenarioAPlan", read: "Read", progress: "Progress"
) -> "Report":
    from defenses.classifier import Classifier
    from service.client import Client
    from service.evaluate import Report, measure
    from service.fit import find_classifier
    from service.served import GRAPH

    if parse_reference(name)[1] is not None:
        raise ValueError(
            f"Expected a name without a version, since the gateway at {url} has its own in service, got {name}."
        )
    with closing(Client(url)) as client:
        served = client.served(name)
        if served.mode == "shadow":
            raise ValueError(f"{name} is served in shadow mode, in which clients are told nothing that can be counted.")
        bare = find_classifier(models, name, served.version)
        test = read(bare.manifest, models.manifest(name, served.version).data).test
        classifier = Classifier.load(bare.folder / GRAPH).eval()
        measured = measure(
            client,
            name,
            classifier,
            test,
            attacks=plan.attacks,
            limit=plan.limit,
            seed=plan.seed,
            progress=progress,
        )
    return Report.of(name, served, measured)


def _warn_of_other_images(name: str, fitted_on: str, found: str) -> None:
    typer.echo(
        f"portcullis: {name} was fitted on other images than these (digest {fitted_on[:12]}, not {found[:12]}), so "
        "that some of these may have been fitted on.",
        err=True,
    )
