"""Time the fit of an Inspector's regressions over the width of its layer: `python -m loadtest.inspector_seconds`.

The features are those of a convolution with random weights, a ReLU behind it, of images clean and attacked; the labels
are what a classifier answers. What is timed is the fit's own code, class by class, the features included.
"""

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import torch
import typer
from torch import Tensor, nn

from defenses.attacks import attack, craft
from defenses.classifier import Classifier
from defenses.coophance.inspector_fit import INVERSE_PENALTIES
from defenses.coophance.regressions import Watched, fit_regressions
from defenses.evaluation import Progress
from defenses.pixels import to_float
from defenses.stages import Stages
from model_store import Store, parse_reference
from service.cli.common import DataOption, StoreOption, read_dataset, settings_with
from service.fit import find_classifier, splits_of
from service.hardware import hardware
from service.progress import progress_bars
from service.repository import MODELS
from service.served import GRAPH

CPU = torch.device("cpu")


def main(
    name: Annotated[str, typer.Argument(help="The classifier, as NAME or NAME@VERSION.")],
    data: DataOption,
    channels: Annotated[list[int] | None, typer.Option(help="Widths of the layer, at half the image's sides.")] = None,
    examples: Annotated[int, typer.Option(help="Images attacked, of all classes.")] = 2000,
    negatives: Annotated[int, typer.Option(help="Clean images of each class.")] = 2000,
    store: StoreOption = None,
) -> None:
    """Fit the regressions of every class for each width, and print the seconds as JSON."""
    models = Store.open(settings_with(store=store).store / MODELS)
    fetched = find_classifier(models, *parse_reference(name))
    classifier = Classifier.load(fetched.folder / GRAPH).eval()
    with progress_bars() as progress:
        fit = splits_of(read_dataset(data, fetched.manifest, 0, Path("var/data"), progress)).fit
        attacked = craft(
            attack("pgd-stop"),
            classifier,
            *fit,
            limit=examples,
            device=CPU,
            seed=0,
            progress=lambda done, of: progress("pgd-stop", done, of),
        )
        rows = torch.cat([(fit.targets == c).nonzero().flatten()[:negatives] for c in range(classifier.classes)])
        benign = Watched(fit.images[rows], fit.targets[rows], torch.ones(len(rows), dtype=torch.bool))
        adversarial = Watched(attacked.x_adv, _predicted(classifier, attacked.x_adv), ~attacked.fooled)
        widths = [
            _timed(width, penalties, benign, adversarial, classifier.classes, progress)
            for width in channels or (32, 128)
            for penalties in (INVERSE_PENALTIES[1:2], INVERSE_PENALTIES)
        ]
    command = " ".join(["python -m loadtest.inspector_seconds", *sys.argv[1:]])
    typer.echo(json.dumps({"command": command, "hardware": hardware(CPU), "fits": widths}, indent=1))


def _timed(
    channels: int,
    penalties: tuple[float, ...],
    benign: Watched,
    adversarial: Watched,
    classes: int,
    progress: Progress,
) -> dict[str, object]:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Conv2d(benign.images.shape[1], channels, 3, 2, 1), nn.ReLU(), nn.Flatten())

    @torch.no_grad()
    def features(images: Tensor) -> Tensor:
        return torch.cat([layer(to_float(batch)) for batch in images.split(128)])

    with TemporaryDirectory() as folder:
        fitted = fit_regressions(
            features,
            benign,
            adversarial,
            classes,
            penalties,
            surviving=False,
            stages=Stages(Path(folder)),
            progress=lambda done, of: progress(f"{channels} channels", done, of),
        )
    return {
        "features": fitted.weights.shape[2],
        "inverse_penalties": penalties,
        "examples_per_class": [sum(pair) for pair in zip(fitted.negatives, fitted.positives, strict=True)],
        "seconds_per_class": fitted.seconds,
        "mean_seconds": sum(fitted.seconds) / len(fitted.seconds),
    }


@torch.no_grad()
def _predicted(classifier: Classifier, images: Tensor) -> Tensor:
    return torch.cat([classifier(to_float(batch)).argmax(1) for batch in images.split(128)])


if __name__ == "__main__":
    typer.run(main)
