"""The command that trains a classifier adversarially."""

from fractions import Fraction
from pathlib import Path
from typing import Annotated, Literal

import typer

from model_store import SERVING, Manifest, Store, parse_reference
from service.cli.common import (
    DataOption,
    DataRootOption,
    JsonOption,
    SeedOption,
    StoreOption,
    command_line,
    failures_told,
    settings_with,
)
from service.cli.endings import exhaustion_told, interruptions_told
from service.cli.fitted import DeviceOption, FreshOption, PromoteOption, tell

TRAINING = "Of the training"


class NumberUnreadable(ValueError):
    """An option is no number; ``option`` is its name."""

    def __init__(self, option: str, text: str) -> None:
        self.option = option
        super().__init__(f"Expected of {option} a number or a fraction such as 8/255, got {text!r}.")


class VersionNamed(ValueError):
    """A name is given with a version, which is the store's to number."""

    def __init__(self, text: str) -> None:
        super().__init__(f"Expected a name without a version, since the store numbers the new one, got {text!r}.")


def adversarial(
    name: Annotated[str, typer.Argument(help="The new classifier's name, or one that gets a next version.")],
    data: DataOption,
    arch: Annotated[
        str, typer.Option(help="cifar_resnet20, 32, 44 or 56, package.module:factory, or torchvision:NAME.")
    ],
    input_shape: Annotated[str, typer.Option(help="Channels, height and width, such as 3x32x32.")],
    weights: Annotated[
        Path | None, typer.Option(help="Start from a state dict, safetensors or torch.", show_default="fresh weights")
    ] = None,
    mean: Annotated[str | None, typer.Option(help="The mean per channel, such as 0.485,0.456,0.406.")] = None,
    std: Annotated[str | None, typer.Option(help="The standard deviation per channel.")] = None,
    resize: Annotated[Literal["bilinear", "bicubic"] | None, typer.Option(help="Let other sizes in.")] = None,
    labels: Annotated[
        str | None,
        typer.Option(
            help="The classes' names in the order of the logits, separated by commas, or a file.",
            show_default="the data set's, sorted",
        ),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(help="How long to train.", min=1, show_default="15", rich_help_panel=TRAINING),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(help="Training time instead of epochs; one at least is trained.", rich_help_panel=TRAINING),
    ] = None,
    epsilon: Annotated[
        str, typer.Option(help="The bound of the perturbations, for images in [0, 1].", rich_help_panel=TRAINING)
    ] = "8/255",
    alpha: Annotated[
        str | None,
        typer.Option(help="The size of their one step.", show_default="1.25 epsilon", rich_help_panel=TRAINING),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(help="Images in a batch; fewer need less memory.", min=2, rich_help_panel=TRAINING)
    ] = 128,
    learning_rate: Annotated[
        float, typer.Option(help="The highest, in the middle of the training.", rich_help_panel=TRAINING)
    ] = 0.2,
    flip: Annotated[
        bool, typer.Option(help="Mirror training images; not for digits or signs.", rich_help_panel=TRAINING)
    ] = True,
    test_examples: Annotated[
        int, typer.Option(help="Test images that the accuracy under PGD is measured on.", min=1)
    ] = 1000,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    fresh: FreshOption = False,
    promote: PromoteOption = False,
    data_root: DataRootOption = Path("var/data"),
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train a classifier on adversarial examples of its own, and keep it in the store, to compare with.

    A training that was interrupted resumes after its last whole epoch when the same command is given again.
    """
    with failures_told(), interruptions_told(), exhaustion_told():
        from defenses.baselines.adversarial_plan import AdversarialPlan
        from service import declare
        from service.adversarial import Network, publish_adversarial
        from service.datasets import load_dataset
        from service.fit_plan import OptionIdle
        from service.progress import progress_bars
        from service.register import Declaration
        from service.repository import MODELS

        if parse_reference(name)[1] is not None:
            raise VersionNamed(name)
        if epochs is not None and minutes is not None:
            raise OptionIdle("--minutes", "no --epochs", f"{epochs}")
        plan = AdversarialPlan(
            epochs=15 if epochs is None else epochs,
            minutes=minutes,
            epsilon=_number("--epsilon", epsilon),
            alpha=None if alpha is None else _number("--alpha", alpha),
            batch_size=batch_size,
            learning_rate=learning_rate,
            flip=flip,
            test_examples=test_examples,
            seed=seed,
        )
        shape = declare.read_shape(input_shape)
        assert shape is not None
        declared = Declaration(shape=shape, normalisation=declare.read_normalisation(mean, std), resize=resize)
        root = settings_with(store=store).store
        with progress_bars(shown=not as_json) as progress:
            dataset = load_dataset(
                data,
                declared.input_of(shape),
                labels=declare.read_labels(labels) or None,
                split_seed=seed,
                root=data_root,
                progress=lambda done, total: progress("images", done, total),
            )
            manifest = publish_adversarial(
                root,
                name,
                Network(arch, weights),
                dataset,
                declared,
                plan,
                device=device,
                fresh=fresh,
                progress=progress,
                notice=tell,
                command=command_line(),
            )
        if promote:
            Store.open(root / MODELS).set_alias(name, SERVING, manifest.version)
        typer.echo(manifest.model_dump_json(indent=2) if as_json else _told(manifest))


def _number(option: str, text: str) -> float:
    try:
        return float(Fraction(text))
    except (ValueError, ZeroDivisionError, OverflowError):
        raise NumberUnreadable(option, text) from None


def _told(manifest: Manifest) -> str:
    """Return a sentence on a published classifier, as it is on record."""
    measured = manifest.options["measured_by"]
    assert isinstance(measured, dict)
    clean, robust = (100 * manifest.metrics[f"{which}_accuracy"] for which in ("clean", "robust"))
    return (
        f"Published {manifest.name}, version {manifest.version}: clean accuracy {clean:.2f} % on the test images, "
        f"{robust:.2f} % under PGD of {measured['steps']} steps on {measured['images']} of them."
    )
