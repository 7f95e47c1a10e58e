"""Time the protected pipeline beside the bare classifier: `make bench` prints JSON.

The graphs run on ONNX Runtime in one process, in turns, on the same images; the ratios of their medians are what to
quote, since absolute times vary with the machine. Where a version corrects what it alerts, its first graph is timed as
`protected` and the second one, which runs on alerted images alone, as `corrected`. Multiply-adds are counted on the
graphs' convolutions and matrix products, so that the ratio has something to be held against.
"""

import json
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import onnx
import onnxruntime
import typer
from onnx import numpy_helper, shape_inference

from model_store import Store, parse_reference
from service.engine import Engine, outputs_of, pruned
from service.repository import MODELS
from service.served import CORRECTION, GRAPH

BATCHES = (1, 32)
ANSWERED = ("logits", "score", "alert")
"""What is asked of a protected graph, as far as it is there."""


def main(
    model: Annotated[str, typer.Argument(help="A protected model, as NAME or NAME@VERSION.")] = "digits",
    store: Annotated[Path, typer.Option(help="Folder of the model store.")] = Path("var/demo/store"),
    rounds: Annotated[int, typer.Option(help="Turns of each graph at each batch size.", min=3)] = 60,
) -> None:
    """Compare a protected version with the bare classifier it was fitted for."""
    models = Store.open(store / MODELS)
    protected = models.fetch(*parse_reference(model))
    parent = protected.manifest.parent
    if parent is None:
        typer.echo(f"{model} has no defense; expected a version that `portcullis fit` published.", err=True)
        raise typer.Exit(1)
    bare = models.fetch(parent.name, parent.version)
    graphs = {"bare": bare.folder / GRAPH, "protected": protected.folder / GRAPH}
    if CORRECTION in protected.manifest.files:
        graphs["corrected"] = protected.folder / CORRECTION
    present = outputs_of(graphs["protected"])
    outputs = {"bare": ["logits"], "protected": [name for name in ANSWERED if name in present], "corrected": ["logits"]}
    engines = {name: Engine(path, outputs[name]) for name, path in graphs.items()}
    shape, classes = protected.manifest.input.shape, len(protected.manifest.labels)
    result = {
        "command": " ".join(["python -m loadtest.bench", *sys.argv[1:]]),
        "model": f"{protected.manifest.name}@{protected.manifest.version}",
        "machine": {"processor": platform.machine(), "python": platform.python_version()},
        "onnxruntime": onnxruntime.__version__,
        "multiply_adds": {name: multiply_adds(pruned(path, outputs[name])) for name, path in graphs.items()},
        "milliseconds": {str(batch): compare(engines, (batch, *shape), classes, rounds) for batch in BATCHES},
    }
    typer.echo(json.dumps(result, indent=2))


def compare(
    engines: dict[str, Engine], shape: tuple[int, ...], classes: int, rounds: int
) -> dict[str, float | dict[str, float]]:
    """Return the median milliseconds of each engine, taken in turns, and their ratios to the bare one's."""
    images = np.random.default_rng(0).random(shape, np.float32)
    logits = np.zeros((len(images), classes), np.float32)
    inputs = {name: {"image": images} for name in engines}
    if "corrected" in engines:
        inputs["corrected"] = {"purified": images, "undefended_logits": logits}
    times: dict[str, list[float]] = {name: [] for name in engines}
    for turn in range(rounds + 3):
        for name, engine in engines.items():
            start = time.perf_counter()
            engine.feed(**inputs[name])
            if turn >= 3:
                times[name].append(1000 * (time.perf_counter() - start))
    medians = {name: statistics.median(values) for name, values in times.items()}
    ratios = {name: median / medians["bare"] for name, median in medians.items() if name != "bare"}
    return {**medians, "ratio": ratios}


def multiply_adds(graph: onnx.ModelProto) -> int:
    """Count the multiply-adds of one image in the graph's convolutions and matrix products with weights."""
    graph = shape_inference.infer_shapes(graph)
    weights = {tensor.name: numpy_helper.to_array(tensor).shape for tensor in graph.graph.initializer}
    shapes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*graph.graph.value_info, *graph.graph.output)
    }
    weights = {**shapes, **weights}  # those of a derivative are computed in the graph
    total = 0
    for node in graph.graph.node:
        if node.op_type == "Conv":
            total += int(np.prod(weights[node.input[1]])) * int(np.prod(shapes[node.output[0]][2:]))
        elif node.op_type == "ConvTranspose":
            total += int(np.prod(weights[node.input[1]])) * int(np.prod(shapes[node.input[0]][2:]))
        elif node.op_type in ("Gemm", "MatMul") and node.input[1] in weights:
            total += int(np.prod(weights[node.input[1]]))
    return total


if __name__ == "__main__":
    typer.run(main)
