"""The command that fits NIP."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from model_store import Fetched, Manifest
from service.cli.common import (
    DataOption,
    DataRootOption,
    JsonOption,
    SeedOption,
    StoreOption,
    command_line,
    failures_told,
)
from service.cli.endings import exhaustion_told, interruptions_told
from service.cli.fitted import (
    ClassifierArgument,
    DeviceOption,
    FreshOption,
    PresetOption,
    PromoteOption,
    fit_and_show,
    tell,
)

if TYPE_CHECKING:
    from defenses.evaluation import Progress
    from service.datasets import Dataset


def nip(
    name: ClassifierArgument,
    data: DataOption,
    preset: PresetOption = "default",
    candidates: Annotated[int | None, typer.Option(help="How many unknown inputs the pool is made for.", min=1)] = None,
    eta: Annotated[float | None, typer.Option(help="Candidates for each of them, above 0 and at most 1.")] = None,
    k1: Annotated[int | None, typer.Option(help="Front neurons, of the most influence.", min=0)] = None,
    k2: Annotated[int | None, typer.Option(help="Tail neurons, of the least influence.", min=0)] = None,
    layer: Annotated[
        str | None, typer.Option(help="The layer of the neurons, if not the one found at registering.")
    ] = None,
    sign: Annotated[
        Literal["tail-front", "front-tail"] | None,
        typer.Option(help="The loss whose gradient a candidate is: as printed, or as the authors' program has it."),
    ] = None,
    template: Annotated[
        Literal["global", "class", "frequency"] | None,
        typer.Option(help="What remains in all benign images, in all of a class, or in a share of them."),
    ] = None,
    template_share: Annotated[float | None, typer.Option(help="That share, with --template frequency.")] = None,
    similarity: Annotated[
        Literal["index", "influence"] | None,
        typer.Option(help="Compare index sequences with the template, or the influence of the neurons."),
    ] = None,
    search: Annotated[
        Literal["all", "class"] | None, typer.Option(help="Among all candidates, or those of the predicted class.")
    ] = None,
    amplitude: Annotated[
        float | None, typer.Option(help="The strength of the perturbation, in place of choosing it.")
    ] = None,
    accuracy_loss: Annotated[
        float | None, typer.Option(help="The share of clean images that the strength may cost.", min=0)
    ] = None,
    amplitudes: Annotated[str | None, typer.Option(help="The strengths that are tried, as 0.05,0.1,0.2.")] = None,
    precision: Annotated[
        Literal["float16", "float32"] | None, typer.Option(help="What candidates are kept in.")
    ] = None,
    attack: Annotated[
        list[str] | None,
        typer.Option(help="Measure against this attack; repeat for several.", show_default="the preset's"),
    ] = None,
    test_examples: Annotated[int | None, typer.Option(help="Test images that each attack is run on.", min=1)] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images in a batch; fewer need less memory.", min=1)] = None,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    fresh: FreshOption = False,
    promote: PromoteOption = False,
    data_root: DataRootOption = Path("var/data"),
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a pool of inverse perturbations of benign images, calibrate its strength, and publish the defense.

    There is no detector: no image is alerted. Attacks are only measured against. A fit that was interrupted resumes
    with the stage it was at when the same command is given again.
    """
    with failures_told(), interruptions_told(), exhaustion_told():
        from service.fit_nip import publish_nip
        from service.fit_plan import chosen_nip_plan, read_amplitudes

        plan = chosen_nip_plan(
            preset,
            {
                "candidates": candidates,
                "eta": eta,
                "k1": k1,
                "k2": k2,
                "layer": layer,
                "sign": sign,
                "template": template,
                "template_share": template_share,
                "similarity": similarity,
                "search": search,
                "amplitude": amplitude,
                "accuracy_loss": accuracy_loss,
                "amplitudes": read_amplitudes(amplitudes),
                "precision": precision,
                "attacks": attack and tuple(attack),
                "test_examples": test_examples,
                "batch_size": batch_size,
                "seed": seed,
            },
        )

        def publish(root: Path, classifier: Fetched, dataset: "Dataset", progress: "Progress") -> Manifest:
            return publish_nip(
                root,
                classifier,
                dataset,
                plan,
                device=device,
                fresh=fresh,
                progress=progress,
                notice=tell,
                command=command_line(),
            )

        fit_and_show(
            name,
            publish,
            data=data,
            seed=seed,
            data_root=data_root,
            store=store,
            promote=promote,
            as_json=as_json,
            advice="say with --accuracy-loss what it may cost",
        )
