"""Time the protected pipeline beside the bare classifier: `make bench` prints JSON.

Both graphs run on ONNX Runtime in one process, in turns, on the same images; the ratio of their medians is what to
quote, since absolute times vary with the machine. Multiply-adds are counted on the graphs' convolutions and matrix
products, so that the ratio has something to be held against.
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
from service.engine import Engine, pruned
from service.repository import MODELS
from service.served import GRAPH

BATCHES = (1, 32)


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
    outputs = {"bare": ["logits"], "protected": ["logits", "score", "alert"]}
    engines = {name: Engine(path, outputs[name]) for name, path in graphs.items()}
    shape = protected.manifest.input.shape
    result = {
        "command": " ".join(["python -m loadtest.bench", *sys.argv[1:]]),
        "model": f"{protected.manifest.name}@{protected.manifest.version}",
        "machine": {"processor": platform.machine(), "python": platform.python_version()},
        "onnxruntime": onnxruntime.__version__,
        "multiply_adds": {name: multiply_adds(pruned(path, outputs[name])) for name, path in graphs.items()},
        "milliseconds": {str(batch): compare(engines, (batch, *shape), rounds) for batch in BATCHES},
    }
    typer.echo(json.dumps(result, indent=2))


def compare(engines: dict[str, Engine], shape: tuple[int, ...], rounds: int) -> dict[str, float]:
    """Return the median milliseconds of each engine, taken in turns, and the ratio of the medians."""
    images = np.random.default_rng(0).random(shape, np.float32)
    times: dict[str, list[float]] = {name: [] for name in engines}
    for turn in range(rounds + 3):
        for name, engine in engines.items():
            start = time.perf_counter()
            engine.predict(images)
            if turn >= 3:
                times[name].append(1000 * (time.perf_counter() - start))
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {**medians, "ratio": medians["protected"] / medians["bare"]}


def multiply_adds(graph: onnx.ModelProto) -> int:
    """Count the multiply-adds of one image in the graph's convolutions and matrix products with weights."""
    graph = shape_inference.infer_shapes(graph)
    weights = {tensor.name: numpy_helper.to_array(tensor).shape for tensor in graph.graph.initializer}
    shapes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*graph.graph.value_info, *graph.graph.output)
    }
    total = 0
    for node in graph.graph.node:
        if node.op_type == "Conv":
            total += int(np.prod(weights[node.input[1]])) * int(np.prod(shapes[node.output[0]][2:]))
        elif node.op_type in ("Gemm", "MatMul") and node.input[1] in weights:
            total += int(np.prod(weights[node.input[1]]))
    return total


if __name__ == "__main__":
    typer.run(main)
