"""A version's graph, brought to what it is run for."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.utils import Extractor

from service.engines.errors import GraphUnloadable

NOISE_SCALE = "noise_scale"

_RANDOM = frozenset(
    ("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli")
)


def outputs_of(path: Path) -> set[str]:
    """Return the names of a graph's outputs; raises ``GraphUnloadable`` for a file that holds no graph."""
    try:
        return {value.name for value in onnx.load(path, load_external_data=False).graph.output}
    except Exception as error:  # protobuf's errors and the file system's share no narrower ancestor
        raise GraphUnloadable(path, str(error)) from error


def pruned(path: Path, outputs: Sequence[str]) -> onnx.ModelProto:
    """Return a graph without what its named outputs do not need."""
    model = onnx.load(path, load_external_data=False)
    kept = Extractor(model).extract_model([value.name for value in model.graph.input], list(outputs))
    # The noise's scale would be an input that has no default any more, where nothing reads it.
    read = {name for node in kept.graph.node for name in node.input}
    for value in [value for value in kept.graph.input if value.name not in read]:
        kept.graph.input.remove(value)
    return kept


def fix_noise(model: onnx.ModelProto, scale: float) -> None:
    """Turn the scale of a graph's noise from an input with a default into a constant, where it has one.

    What is computed from constants alone the runtime computes once, when it loads the graph.
    """
    for tensor in model.graph.initializer:
        if tensor.name == NOISE_SCALE:
            tensor.CopyFrom(numpy_helper.from_array(np.array(scale, np.float32), NOISE_SCALE))
    for value in [value for value in model.graph.input if value.name == NOISE_SCALE]:
        model.graph.input.remove(value)


class Draw(NamedTuple):
    """Standard normal noise that a graph takes as the input ``name``, in the shape of its value ``like``."""

    name: str
    like: str


def with_noise_fed(model: onnx.ModelProto) -> tuple[onnx.ModelProto, tuple[Draw, ...]]:
    """Return a graph that takes as inputs what its nodes drew of standard normal noise, and what these inputs are.

    A node that draws otherwise, or from a seed of its own, stays as it is (see ``random_operators``).
    """
    fed = onnx.ModelProto()
    fed.CopyFrom(model)
    draws = tuple(Draw(node.output[0], node.input[0]) for node in model.graph.node if _is_standard_normal(node))
    del fed.graph.node[:]
    fed.graph.node.extend(node for node in model.graph.node if not _is_standard_normal(node))
    fed.graph.input.extend(helper.make_tensor_value_info(draw.name, TensorProto.FLOAT, None) for draw in draws)
    return fed, draws


def random_operators(model: onnx.ModelProto) -> list[str]:
    """Return the names of a graph's operators that draw at random, each once."""
    return sorted({node.op_type for node in model.graph.node} & _RANDOM)


def noise_graph() -> onnx.ModelProto:
    """Return a graph that draws standard normal ``noise`` (M,) of the size of its input ``like`` (M,)."""
    like, noise = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["M"]) for name in ("like", "noise"))
    node = helper.make_node("RandomNormalLike", ["like"], ["noise"])
    graph = helper.make_graph([node], "noise", [like], [noise])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def _is_standard_normal(node: onnx.NodeProto) -> bool:
    given = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    return (
        node.op_type == "RandomNormalLike"
        and given.get("mean", 0.0) == 0
        and given.get("scale", 1.0) == 1
        and given.get("dtype", TensorProto.FLOAT) == TensorProto.FLOAT
        and "seed" not in given
    )
