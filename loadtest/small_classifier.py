"""Train a small classifier, for measurements that want one: `python -m loadtest.small_classifier`.

For photographs the network is a ResNet of three stages behind a stem that halves twice. For images of less than 64
pixels it is one that starts at full size and ends in a layer 512 wide, of 39 million multiply-adds at 32x32. It is
trained from scratch on the fitting split only, so that the splits that validate, calibrate and test a defense stay new
to it. Writes an ONNX file for `portcullis register --onnx` and prints the accuracies as JSON.
"""

import json
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import onnx
import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

from defenses.architectures import BasicBlock
from defenses.coophance import Augmentation
from defenses.coophance.selection import accuracy_of
from defenses.onnx_trace import export_classifier
from defenses.pixels import to_float
from defenses.precision import has_bfloat16
from model_store import InputSpec
from service.cli.common import DataOption
from service.datasets import Split, load_dataset
from service.progress import progress_bars

WIDTHS = (32, 64, 128)
FEATURES = 512
CPU = torch.device("cpu")


def network(shape: tuple[int, ...], classes: int) -> nn.Module:
    """Return the untrained classifier of images (N, C, H, W) of a shape (C, H, W)."""
    trunk, width = (_tiny(shape[0]), FEATURES) if min(shape[1:]) < 64 else (_photographic(shape[0]), WIDTHS[-1])
    return nn.Sequential(
        *(*trunk, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2)),
        nn.Linear(width, classes),
    )


def _photographic(channels: int) -> list[nn.Module]:
    blocks: list[nn.Module] = []
    for before, width in zip((WIDTHS[0], *WIDTHS), WIDTHS, strict=False):
        blocks += [BasicBlock(before, width, 1 if before == width else 2), BasicBlock(width, width, 1)]
    return [*_convolution(channels, WIDTHS[0], 7, 2), nn.MaxPool2d(3, 2, 1), *blocks]


def _tiny(channels: int) -> list[nn.Module]:
    blocks = [BasicBlock(before, width, 2) for before, width in pairwise(WIDTHS)]
    return [*_convolution(channels, WIDTHS[0], 3, 1), *blocks, *_convolution(WIDTHS[-1], FEATURES, 3, 2)]


def _convolution(before: int, width: int, side: int, stride: int) -> list[nn.Module]:
    return [nn.Conv2d(before, width, side, stride, side // 2, bias=False), nn.BatchNorm2d(width), nn.ReLU()]


def main(
    data: DataOption,
    output: Annotated[Path, typer.Option(help="The ONNX file to write.")],
    shape: Annotated[str, typer.Option(help="Channels, height and width.")] = "3x224x224",
    epochs: Annotated[int, typer.Option(help="Passes over the fitting split.", min=1)] = 40,
    batch_size: Annotated[int, typer.Option(help="Images in a training batch.", min=2)] = 32,
    seed: Annotated[int, typer.Option(help="Seed of the splits and the training.")] = 0,
) -> None:
    """Train on the fitting split, measure on the test split, write the graph."""
    sides = tuple(int(side) for side in shape.split("x"))
    spec = InputSpec(shape=sides, mode="RGB" if sides[0] == 3 else "L", resize="bilinear")
    dataset = load_dataset(data, spec, labels=None, split_seed=seed)
    torch.manual_seed(seed)
    model = network(sides, len(dataset.labels)).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    start = time.perf_counter()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    steps = epochs * -(-len(dataset.fit.targets) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    with progress_bars() as progress:
        for epoch in range(epochs):
            for x, y in _batches(dataset.fit, batch_size, seed + epoch):
                with torch.autocast("cpu", torch.bfloat16, enabled=has_bfloat16(CPU)):
                    loss = F.cross_entropy(model(x).float(), y, label_smoothing=0.1)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
            progress("classifier", epoch + 1, epochs)
    seconds = time.perf_counter() - start
    # Of another memory format the exporter makes nodes that no derivative is written for.
    model = model.to(memory_format=torch.contiguous_format).eval()
    output.parent.mkdir(parents=True, exist_ok=True)
    onnx.save_model(export_classifier(model, sides), output)
    accuracies = {
        name: accuracy_of(model, torch.from_numpy(split.images), torch.from_numpy(split.targets), CPU)
        for name, split in (("fit", dataset.fit), ("test", dataset.test))
    }
    typer.echo(json.dumps({"labels": dataset.labels, "accuracy": accuracies, "epochs": epochs, "seconds": seconds}))


def _batches(split: Split, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield one epoch of augmented images and their classes, in an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    images, targets = torch.from_numpy(split.images), torch.from_numpy(split.targets)
    augment = Augmentation(rotation=10, shift=0.1, zoom=0.2, flip=True)
    for rows in torch.randperm(len(images), generator=generator).split(size):
        x = augment(to_float(images[rows]), generator)
        yield x.contiguous(memory_format=torch.channels_last), targets[rows]


if __name__ == "__main__":
    typer.run(main)
