"""The command that fits a baseline."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
    PromoteOption,
    fit_and_show,
    tell,
)

if TYPE_CHECKING:
    from defenses.evaluation import Progress
    from service.datasets import Dataset

PURIFIERS = "Of the methods that purify"
DETECTORS = "Of the methods that detect"
UNLESS = "the method's"


def baseline(
    name: ClassifierArgument,
    data: DataOption,
    method: Annotated[
        str,
        typer.Option(
            help="smoothing, bit-depth, jpeg, total-variation, noise or none, which purify; feature-squeezing, magnet "
            "or lid, which detect."
        ),
    ],
    kernel: Annotated[
        int | None,
        typer.Option(help="smoothing, feature-squeezing: the side of the median's square.", show_default=UNLESS),
    ] = None,
    bits: Annotated[
        int | None, typer.Option(help="bit-depth, feature-squeezing: the bits of a value.", show_default=UNLESS)
    ] = None,
    quality: Annotated[
        int | None, typer.Option(help="jpeg: from 1 to 100.", show_default="75", rich_help_panel=PURIFIERS)
    ] = None,
    subsampling: Annotated[
        str | None,
        typer.Option(help="jpeg: 4:2:0 or 4:4:4.", show_default="4:2:0", rich_help_panel=PURIFIERS),
    ] = None,
    weight: Annotated[
        float | None,
        typer.Option(
            help="total-variation: what the variation counts.", show_default="0.03", rich_help_panel=PURIFIERS
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(help="total-variation: steps of the minimisation.", show_default="20", rich_help_panel=PURIFIERS),
    ] = None,
    sigma: Annotated[
        float | None,
        typer.Option(
            help="noise, magnet: the noise's standard deviation, in [0, 1]; of magnet in training.", show_default=UNLESS
        ),
    ] = None,
    search: Annotated[
        int | None,
        typer.Option(
            help="feature-squeezing: the side of the square that non-local means look through.",
            show_default="11",
            rich_help_panel=DETECTORS,
        ),
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(
            help="feature-squeezing: the strength of non-local means, in [0, 1].",
            show_default="4/255",
            rich_help_panel=DETECTORS,
        ),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(help="magnet: how long the autoencoder is trained.", show_default="5", rich_help_panel=DETECTORS),
    ] = None,
    neighbors: Annotated[
        int | None,
        typer.Option(help="lid: the nearest references that count.", show_default="20", rich_help_panel=DETECTORS),
    ] = None,
    references: Annotated[
        int | None,
        typer.Option(help="lid: benign images to compare with.", show_default="100", rich_help_panel=DETECTORS),
    ] = None,
    layer: Annotated[
        list[str] | None,
        typer.Option(
            help="lid: look at this layer; repeat for several.",
            show_default="five over the depth",
            rich_help_panel=DETECTORS,
        ),
    ] = None,
    attack: Annotated[
        list[str] | None,
        typer.Option(
            help="lid: fit on this attack; repeat for several.",
            show_default="fgsm and pgd-stop",
            rich_help_panel=DETECTORS,
        ),
    ] = None,
    examples: Annotated[
        int | None,
        typer.Option(
            help="lid: images that each attack is run on.", min=1, show_default="1000", rich_help_panel=DETECTORS
        ),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(help="The false-positive rate to calibrate to.", show_default="0.05", rich_help_panel=DETECTORS),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images in a batch; fewer need less memory.", min=1)] = 128,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    fresh: FreshOption = False,
    promote: PromoteOption = False,
    data_root: DataRootOption = Path("var/data"),
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Fit a published defense to compare with, and publish the protected classifier.

    An option that the method has not is refused. A fit that was interrupted resumes when the same command is given
    again.
    """
    with failures_told(), interruptions_told(), exhaustion_told():
        from defenses.baselines import BaselinePlan
        from service.fit_baseline import publish_baseline

        plan = BaselinePlan.chosen(
            method,
            {
                "kernel": kernel,
                "bits": bits,
                "quality": quality,
                "subsampling": subsampling,
                "weight": weight,
                "steps": steps,
                "sigma": sigma,
                "search": search,
                "strength": strength,
                "epochs": epochs,
                "neighbors": neighbors,
                "references": references,
                "layers": layer and tuple(layer),
                "attacks": attack and tuple(attack),
                "examples": examples,
                "budget": budget,
            },
            batch_size=batch_size,
            seed=seed,
        )

        def publish(root: Path, classifier: Fetched, dataset: "Dataset", progress: "Progress") -> Manifest:
            return publish_baseline(
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
            advice="a milder setting of the method costs less",
        )
