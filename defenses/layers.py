"""The layers of a classifier's graph: what they are called, and which of them the defenses look at."""

import ast
import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from onnx import ModelProto, NodeProto

from defenses.onnx_torch.node import Node

SCOPES = "pkg.torch.onnx.name_scopes"
"""The metadata in which torch's exporter notes the modules around a node, outermost first, the node itself last."""

DENSE = ("Gemm", "MatMul")


@dataclass(frozen=True)
class Layer:
    """A value of the graph that has one entry per image.

    ``name`` is the value's name, ``scope`` the innermost module that computes it (empty where the graph does not say),
    ``operator`` the node's operator, ``shape`` that of one image's entry, such as (C, H, W).
    """

    name: str
    scope: str
    operator: str
    shape: tuple[int, ...]


class LayerNotFound(KeyError):
    """A classifier has no layer of that name, or none that fits a purpose by itself."""

    def __init__(self, message: str) -> None:
        self.message = message
        super().__init__(message)

    def __str__(self) -> str:
        return self.message


def unknown_layer(name: str, known: Iterable[str]) -> LayerNotFound:
    """Return the error for a name that is neither a value nor a module, with names near to it."""
    near = difflib.get_close_matches(name, list(dict.fromkeys(known)), n=5, cutoff=0.4)
    hint = f"; near to it are {', '.join(near)}" if near else ""
    return LayerNotFound(f"The classifier has no layer named {name!r}{hint}.")


def scopes_of(model: ModelProto) -> dict[str, str]:
    """Return the innermost module of each value, such as ``layer2.1``; empty where the graph does not say.

    Torch's exporter notes it as metadata; the older one, and Keras' converter, in the node's name as a path.
    """
    return {name: _scope(node) for node in model.graph.node for name in node.output if name}


def _scope(node: NodeProto) -> str:
    noted = next((entry.value for entry in node.metadata_props if entry.key == SCOPES), None)
    if noted is not None:
        scopes = ast.literal_eval(noted)
        return str(scopes[-2]) if len(scopes) > 1 else ""
    scope, parent = "", ""
    for part in node.name.strip("/").split("/")[:-1]:
        child = part.removeprefix(f"{parent}.") if parent else part
        scope, parent = f"{scope}.{child}" if scope else child, part
    return scope


def inside(scope: str, module: str) -> bool:
    """Say whether a scope is that module or within it."""
    return scope == module or scope.startswith(f"{module}.")


def passed_by_all(nodes: Sequence[Node], image: str, logits: str) -> list[str]:
    """Return the values that every path from the image to the logits goes through, in order, the logits included."""
    order = {image: 0}
    doors: dict[str, frozenset[str]] = {image: frozenset({image})}
    for node in nodes:
        read = [doors[name] for name in node.inputs if name in doors]
        if read and node.operator not in ("Shape", "Size"):
            common = frozenset.intersection(*read)
            for name in node.outputs:
                doors[name] = common | {name}
                order[name] = len(order)
    return sorted(doors[logits] - {image}, key=order.__getitem__)


def find_tap(layers: Mapping[str, Layer], passed: Sequence[str], inputs: Mapping[str, Sequence[str]]) -> Layer:
    """Return the layer that the Inspector looks at.

    It is the last value, before the maps shrink again, whose height and width are about half of the first
    convolution's output; of those on every path to the logits if there are such. Where the maps never halve (a vision
    transformer), it is the residual sum of tokens nearest to the middle of the depth. ``passed`` are the values on
    every path, ``inputs`` the values that each value is computed from. Raises ``LayerNotFound``.
    """
    stem = next((layer for layer in layers.values() if layer.operator == "Conv" and len(layer.shape) == 3), None)
    if stem is not None:
        common = set(passed)
        for rows in (1, 0):  # channels first, or last as in Swin
            fitting = [
                layer
                for layer in layers.values()
                if len(layer.shape) == 3
                and all(_halved(layer.shape[rows + place], size) for place, size in enumerate(stem.shape[1:]))
            ]
            if fitting:
                return next((layer for layer in reversed(fitting) if layer.name in common), fitting[-1])
    sums = [
        layers[name]
        for name in passed
        if name in layers
        and layers[name].operator == "Add"
        and len(layers[name].shape) == 2
        and all(read in layers for read in inputs[name])
    ]
    if sums:
        return sums[(len(sums) - 1) // 2]
    raise LayerNotFound(
        "No layer was found for the Inspector: no maps of half the stem's size, no residual sums of tokens. Name one."
    )


def _halved(size: int, stem: int) -> bool:
    """Say whether a size is a half, give or take what unpadded convolutions cut off."""
    return 1.5 <= stem / size <= 2.5


def find_head(layers: Mapping[str, Layer], passed: Sequence[str], logits: str) -> Layer:
    """Return the layer that NIP looks at: the vector (D,) per image that enters the first dense layer of the head.

    The head is what follows the last value of higher rank on every path to the logits. Raises ``LayerNotFound``.
    """
    head: list[Layer] = []
    for name in reversed(passed):
        if name not in layers or len(layers[name].shape) != 1:
            break
        head.insert(0, layers[name])
    first_dense = next((place for place, layer in enumerate(head) if layer.operator in DENSE), len(head))
    before = [layer for layer in head[:first_dense] if layer.name != logits]
    if not before:
        raise LayerNotFound("No layer was found for NIP: no vector enters a dense layer. Name one.")
    return before[-1]
