"""The command that measures what a defense does."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console, RenderableType

from service.cli.common import DataOption, DataRootOption, JsonOption, SeedOption, StoreOption, failures_told
from service.cli.measured import Asked

if TYPE_CHECKING:
    from defenses.evaluation.plan import EvaluationPlan
    from service.evaluate import CraftedOn

THROUGH_HTTP = ("fgsm", "pgd-stop")
"""The attacks that a gateway is measured with unless told otherwise; few examples of the others survive rounding."""

BY_ANSWERS = ("auna", "boundary:steps=200")
"""The attacks that a gateway's answers are searched with unless told otherwise."""

FROM_THE_STORE = ("fgsm", "pgd-stop", "deepfool", "cw")
"""The attacks that a version is measured with unless told otherwise: those of the paper's table 1 that are quick."""


def evaluate(
    names: Annotated[
        list[str],
        typer.Argument(
            help="The versions, as NAME or NAME@VERSION, all of one classifier; with --url one NAME, as the gateway "
            "calls it.",
            metavar="NAME...",
        ),
    ],
    data: DataOption,
    url: Annotated[
        str | None, typer.Option(help="Measure the running gateway there, which serves this store, through HTTP.")
    ] = None,
    crafted_on: Annotated[
        Literal["classifier", "gateway"] | None,
        typer.Option(
            help="With --url, attack the bare classifier and send what fools it, or the gateway by its answers alone.",
            show_default="classifier",
        ),
    ] = None,
    attack: Annotated[
        list[str] | None,
        typer.Option(
            help="Attack with this; repeat for several.",
            show_default="fgsm, pgd-stop, deepfool and cw; with --url fgsm and pgd-stop, or auna and "
            "boundary:steps=200 on the gateway",
        ),
    ] = None,
    scenario: Annotated[
        list[str] | None,
        typer.Option(
            help="What the attacker knows: A, the classifier alone, B, the defense too, or transfer, the defense's "
            "answers and nothing else; repeat for several.",
            show_default="A",
        ),
    ] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(help="Attack with several values of a parameter, as pgd@epsilon=1/255,2/255,4/255; repeatable."),
    ] = None,
    clean: Annotated[bool, typer.Option("--clean", help="Measure on clean images only.")] = False,
    limit: Annotated[int, typer.Option(help="Images attempted per attack; with --url also clean ones.", min=1)] = 300,
    dear_limit: Annotated[
        int, typer.Option(help="The same for attacks that ask more than 300 times about an image.", min=1)
    ] = 200,
    samples: Annotated[
        int, typer.Option(help="Noises that an attack on a noisy defense takes a gradient over (scenario B).", min=1)
    ] = 8,
    queries: Annotated[
        int, typer.Option(help="Images that a substitute learns the defense's answers to (scenario transfer).", min=2)
    ] = 5000,
    noise_seeds: Annotated[int, typer.Option(help="Noises that each rate is measured under.", min=1)] = 3,
    lottery: Annotated[
        int, typer.Option(help="Images that are submitted again and again to a noisy defense.", min=0)
    ] = 100,
    checks: Annotated[bool, typer.Option(help="Check the attacks themselves, which takes further ones.")] = True,
    minutes: Annotated[
        float | None, typer.Option(help="Begin nothing more after so long; the same command goes on.", min=0)
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(help="Folder where examples are kept.", show_default="the folder evaluations of the store"),
    ] = None,
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
    report: Annotated[Path | None, typer.Option(help="Also write a page for people into this HTML file.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Attack defenses and count what they resist: published versions, or with --url a running gateway.

    The attacks are crafted on the bare classifier (scenario A), on all of the defense (scenario B), or on a substitute
    that has learnt the defense's answers to images of the fit split (scenario transfer), from the test split of the
    data that the defenses were fitted on; --seed orders the images. What is crafted is kept, so that the
    same command goes on where it was stopped, and several may share the work. A study looks into a NIP defense in place
    of measuring it: at the influence of its neurons, their consistency (tknc), and at pools that are made for the
    moment with other numbers of neurons (k), of other layers, of fewer candidates (eta), or with the perturbation added
    to the activations (neurons).
    """
    with failures_told():
        from defenses.evaluation.plan import EvaluationPlan, known_scenarios
        from service.progress import progress_bars

        for file in (output, report):
            if file and not file.absolute().parent.is_dir():
                raise FileNotFoundError(f"There is no folder {file.absolute().parent} to write {file.name} into.")
        unless_told = FROM_THE_STORE if not url else BY_ANSWERS if crafted_on == "gateway" else THROUGH_HTTP
        chosen = () if clean else tuple(attack or (() if sweep else unless_told))
        plan = EvaluationPlan(
            attacks=chosen,
            scenarios=known_scenarios(scenario or ["A"]),
            sweeps=tuple(sweep or ()),
            limit=limit,
            dear_limit=dear_limit,
            seed=seed,
            samples=samples,
            queries=queries,
            noise_seeds=noise_seeds,
            lottery=lottery,
            noise=noise,
            confusion=confusion,
            checks=checks,
        )
        _check_alone(plan, url=url, study=study, plots=plots, controls=controls, clean=clean, report=report)
        _check_url(url, crafted_on, clean=clean, device=device)
        with progress_bars(shown=not as_json) as progress:
            asked = Asked(names, data, data_root, store, seed, device, progress)
            values, shown = _measured(
                asked,
                plan,
                url,
                study or [],
                plots,
                crafted_on=crafted_on or "classifier",
                controls=controls,
                cache=cache,
                minutes=minutes,
                report=report,
            )
        text = json.dumps(values, indent=2)
        if output:
            output.write_text(text + "\n")
        if as_json:
            typer.echo(text)
        else:
            Console().print(shown)


def _measured(
    asked: Asked,
    plan: "EvaluationPlan",
    url: str | None,
    study: list[str],
    plots: Path | None,
    *,
    crafted_on: "CraftedOn",
    controls: bool,
    cache: Path | None,
    minutes: float | None,
    report: Path | None,
) -> tuple[dict[str, Any], RenderableType]:
    """Do what was asked for; return it as JSON values and as something to be printed."""
    from service.cli import measured

    if url:
        return measured.through_http(asked, url, plan, crafted_on)
    if study:
        return measured.studies(asked, study, plan, plots)
    if controls:
        return measured.beside_controls(asked, plan)
    return measured.evaluation(asked, plan, cache=cache, minutes=minutes, report=report)


def _check_url(url: str | None, crafted_on: str | None, *, clean: bool, device: str) -> None:
    """Refuse what only a gateway can be asked for, or cannot; raises ``ValueError``."""
    if url and device != "auto":
        raise ValueError("--device is for a measurement without --url: a gateway has its own.")
    if crafted_on and not url:
        raise ValueError("--crafted-on is for a gateway: name it with --url, or say --scenario for a version.")
    if crafted_on == "gateway" and clean:
        raise ValueError("--crafted-on gateway attacks, and --clean leaves attacks out.")


def _check_alone(
    plan: "EvaluationPlan",
    *,
    url: str | None,
    study: list[str] | None,
    plots: Path | None,
    controls: bool,
    clean: bool,
    report: Path | None,
) -> None:
    """Refuse options that belong to another kind of measurement; raises ``ValueError``."""
    switched = plan.confusion is not None or not plan.noise
    offline = plan.scenarios != ("A",) or bool(plan.sweeps) or report is not None
    if clean and plan.sweeps:
        raise ValueError("--clean measures clean images alone, and --sweep attacks: leave one out.")
    if plots and not study:
        raise ValueError("--plots draws studies: name one or more with --study.")
    if url and (switched or controls or offline):
        raise ValueError(
            "--confusion, --noise, --controls, --scenario, --sweep and --report are for a measurement without --url: a "
            "gateway is attacked as a client sees it."
        )
    if study and (url or clean or controls or switched or offline):
        raise ValueError(
            "--url, --clean, --controls, --confusion, --noise, --scenario, --sweep and --report are for a measurement, "
            "and --study asks for another."
        )
    if controls and (switched or offline):
        raise ValueError("--controls is for scenario A alone, without --sweep, --report, --confusion and --noise.")
