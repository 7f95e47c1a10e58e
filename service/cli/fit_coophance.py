"""The command that fits CoopHANCE."""

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


def coophance(
    name: ClassifierArgument,
    data: DataOption,
    preset: PresetOption = "default",
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
    device: DeviceOption = "auto",
    fresh: FreshOption = False,
    promote: PromoteOption = False,
    data_root: DataRootOption = Path("var/data"),
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Fit a Regulator and an Inspector, calibrate the threshold, and publish the protected classifier.

    A fit that was interrupted resumes with the stage it was at when the same command is given again.
    """
    with failures_told(), interruptions_told(), exhaustion_told():
        from service.fit_coophance import publish_coophance
        from service.fit_plan import chosen_plan, read_widths

        _check_attacks(attack or [])
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

        def publish(root: Path, classifier: Fetched, dataset: "Dataset", progress: "Progress") -> Manifest:
            return publish_coophance(
                root,
                classifier,
                dataset,
                plan,
                regulator=regulator,
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
            advice="fit longer",
        )


def _check_attacks(texts: list[str]) -> None:
    """Refuse attacks that no defense can be fitted to, as a wrong use of the command."""
    from defenses.attacks import AttackUnsuitable, attack_to_fit

    for text in texts:
        try:
            attack_to_fit(text)
        except AttackUnsuitable as error:
            raise typer.BadParameter(str(error), param_hint="--attack") from error
