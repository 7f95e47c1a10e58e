"""What a version costs by its parts, and how that grows: `python -m loadtest.cost_model NAME@VERSION`.

Counts; measures nothing. Prints Markdown: the multiply-adds and bytes of each part of a version, those of a Regulator
by the side of its image, and those of an Inspector by its classes and layer.
"""

from collections.abc import Iterable, Sequence
from math import prod
from pathlib import Path
from typing import Annotated

import onnx
import torch
import typer
from torch import nn

from defenses.coophance import InspectorPlan, Regulator, RegulatorConfig
from defenses.coophance.inspector import pool_within, pooled_features
from loadtest.compute import ANSWERED
from loadtest.cost import Cost, costs, total, weight_bytes
from model_store import Store, parse_reference
from service.cli.common import failures_told
from service.engines import outputs_of, pruned
from service.repository import MODELS
from service.served import GRAPH

SIDES = (32, 64, 128, 224)
CLASSES = (10, 100, 1000)
LAYERS = {"32x16x16": (32, 16, 16), "128x16x16": (128, 16, 16), "512x28x28": (512, 28, 28), "256x56x56": (256, 56, 56)}
"""Layers as they are met: ResNet-20 and ResNet-18 at 32x32, and two stages of ResNet-50 at 224x224."""


def main(
    name: Annotated[str, typer.Argument(help="A protected version, as NAME or NAME@VERSION.")],
    store: Annotated[Path, typer.Option(help="Folder of the model store.")] = Path("var/demo/store"),
) -> None:
    """Print the three tables."""
    with failures_told():
        fetched = Store.open(store / MODELS).fetch(*parse_reference(name))
        parent = fetched.manifest.parent
        if parent is None:
            raise ValueError(f"{name} has no defense; expected a version that `portcullis fit` published.")
        bare = Store.open(store / MODELS).fetch(parent.name, parent.version)
        tables = (
            version_table(fetched.folder / GRAPH, bare.folder / GRAPH),
            regulator_table(),
            inspector_table(InspectorPlan().most_features),
        )
    typer.echo("\n\n".join(tables))


def version_table(protected: Path, bare: Path) -> str:
    """Return one image's cost by part of a graph, with its share of the bare classifier's multiply-adds."""
    whole = total(costs(onnx.load(bare)))
    parts = costs(pruned(protected, [name for name in ANSWERED if name in outputs_of(protected)]))
    rows = [("bare classifier", whole), *parts.items(), ("all of it", total(parts))]
    lines = [
        [name, f"{cost.multiply_adds:,}", f"{cost.multiply_adds / whole.multiply_adds:.2f}", *_bytes(cost)]
        for name, cost in rows
    ]
    lines[-1][3] = f"{weight_bytes(protected):,}"  # passes that share their weights hold them once
    return markdown_table(("part", "multiply-adds", "over bare", "bytes of weights", "bytes of activations"), lines)


def regulator_table(sides: Sequence[int] = SIDES) -> str:
    """Return a Regulator's cost by the side of an RGB image, in its default widths."""
    rows = []
    for side in sides:
        regulator = Regulator(RegulatorConfig((3, side, side))).eval()
        count = convolutions(regulator, (3, side, side))
        weights = 4 * sum(parameter.numel() for parameter in regulator.parameters())
        rows.append([f"{side}x{side}", f"{count:,}", f"{weights:,}"])
    return markdown_table(("image", "multiply-adds", "bytes of weights"), rows)


def inspector_table(most_features: int) -> str:
    """Return an Inspector's weights by its layer and classes, pooled to so many features at most and as they are."""
    rows = []
    for name, shape in LAYERS.items():
        pool = pool_within(shape, most_features)
        features = pooled_features(shape, pool)
        for classes in CLASSES:
            sizes = (4 * classes * prod(shape), 4 * classes * features, 2 * classes * features)
            rows.append(
                [name, str(classes), f"{pool}x{pool}", f"{features:,}", *(f"{size / 2**20:,.1f}" for size in sizes)]
            )
    header = ("layer", "classes", "pooled by", "features", "not pooled, MiB", "float32, MiB", "float16, MiB")
    return markdown_table(header, rows)


def convolutions(regulator: Regulator, shape: tuple[int, int, int]) -> int:
    """Return the multiply-adds of one image (C, H, W) in a Regulator's convolutions."""
    counts: list[int] = []

    def count(module: nn.Conv2d, _: object, output: torch.Tensor) -> None:
        counts.append(module.weight.numel() * prod(output.shape[2:]))

    hooks = [module.register_forward_hook(count) for module in regulator.modules() if isinstance(module, nn.Conv2d)]
    with torch.no_grad():
        regulator.reconstruct(torch.zeros(1, *shape), torch.zeros(()))
    for hook in hooks:
        hook.remove()
    return sum(counts)


def _bytes(cost: Cost) -> tuple[str, str]:
    return f"{cost.weight_bytes:,}", f"{cost.activation_bytes:,}"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return rows of cells as a table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    typer.run(main)
