"""What opening a version costs, and what keeping the runtime's prepared graph would save: `python -m loadtest.opening`.

A version's graph is opened as a gateway does on a processor, in one thread. Beside that stand the runtime's session
for the very graph that is served, and one for that graph as the runtime itself prepared and wrote it, with nothing left
to prepare: what a start could save that found it in the store.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, NamedTuple

import onnxruntime
import typer

from loadtest.compute import ANSWERED
from loadtest.cost_model import markdown_table
from model_store import Store, parse_reference
from service.cli.common import failures_told
from service.engines import OnnxEngine, outputs_of, pruned
from service.engines.onnx_fed import fed_graph
from service.engines.onnx_graph import fix_noise
from service.engines.onnx_session import CPU
from service.repository import MODELS
from service.served import GRAPH

Level = onnxruntime.GraphOptimizationLevel


class Opening(NamedTuple):
    """Milliseconds of processor time: a whole engine, the session of its graph, and that of the prepared graph."""

    engine: float
    session: float
    prepared: float


def main(
    names: Annotated[list[str], typer.Argument(help="Versions, as NAME or NAME@VERSION.")],
    store: Annotated[Path, typer.Option(help="Folder of the model store.")] = Path("var/demo/store"),
    turns: Annotated[int, typer.Option(help="How often each is opened; medians are told.", min=1)] = 7,
) -> None:
    """Print a table of what opening each version takes, in milliseconds of processor time."""
    with failures_told():
        models = Store.open(store / MODELS)
        graphs = {name: models.fetch(*parse_reference(name)).folder / GRAPH for name in names}
        rows = [[name, *(f"{milliseconds:.1f}" for milliseconds in opening(graphs[name], turns))] for name in names]
    typer.echo(markdown_table(("version", "engine", "its session", "session of the prepared graph"), rows))


def opening(path: Path, turns: int) -> Opening:
    """Return the medians of so many openings of a version's graph, in one thread."""
    outputs = [name for name in ANSWERED if name in outputs_of(path)]
    model = pruned(path, outputs)
    fix_noise(model, 1.0)
    graph = fed_graph(model, path, outputs)[0].SerializeToString()
    with TemporaryDirectory() as folder:
        written = Path(folder) / "prepared.onnx"
        options = _options(path)
        options.optimized_model_filepath = str(written)
        onnxruntime.InferenceSession(graph, options, providers=[CPU])
        prepared = written.read_bytes()
    return Opening(
        _milliseconds(lambda: OnnxEngine(path, outputs, threads=1), turns),
        _milliseconds(lambda: onnxruntime.InferenceSession(graph, _options(path), providers=[CPU]), turns),
        _milliseconds(
            lambda: onnxruntime.InferenceSession(prepared, _options(path, Level.ORT_DISABLE_ALL), providers=[CPU]),
            turns,
        ),
    )


def _options(path: Path, level: Level = Level.ORT_ENABLE_ALL) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.graph_optimization_level = level
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    return options


def _milliseconds(call: Callable[[], object], turns: int) -> float:
    taken = []
    for _ in range(turns):
        start = time.process_time()
        call()
        taken.append(1000 * (time.process_time() - start))
    return statistics.median(taken)


if __name__ == "__main__":
    typer.run(main)
