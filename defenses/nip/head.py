"""The part of a classifier between a layer and the logits, and what the logits' derivative there is."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from defenses.classifier import Classifier, Layer
from defenses.onnx_import import LOGITS
from defenses.onnx_torch.node import Node
from defenses.purifier import PurifierNotExportable

RESHAPING = ("Cast", "Dropout", "Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze")
"""Operators that leave the values of an image as they are, and in their order."""


class HeadUnsuitable(PurifierNotExportable):
    """What follows a layer is no chain of dense maps and ReLUs, so that its derivative cannot be served."""

    def __init__(self, layer: str, reason: str) -> None:
        self.layer = layer
        super().__init__(
            f"What lies between the layer {layer!r} and the logits cannot be served as one graph: expected a chain of "
            f"Gemm, MatMul, Add and Relu, but {reason}."
        )


@dataclass(frozen=True)
class Step:
    """One step of a chain: a product with a matrix (D, E), the sum with a vector (D,), or a ReLU of (D,)."""

    operator: Literal["product", "sum", "relu"]
    constant: Tensor | None = None


class ChainHead(nn.Module):
    """A head that is a chain of dense maps and ReLUs, whose derivative is itself a chain of forward operations.

    Where there is no ReLU behind the layer the derivative does not depend on the activations, and no pass through the
    head is needed. The weights are the classifier's own, and are no part of the state that is saved.
    """

    def __init__(self, steps: Sequence[Step]) -> None:
        super().__init__()
        self.operators = tuple(step.operator for step in steps)
        for place, step in enumerate(steps):
            self.register_buffer(f"constant_{place}", step.constant, persistent=False)

    @property
    def linear(self) -> bool:
        """Whether one linear map lies between the layer and the logits."""
        return "relu" not in self.operators

    def derivative(self, x: Tensor, activations: Tensor, cotangent: Tensor) -> Tensor:
        """Return the derivative (N, ...) of the sum of cotangent (N, K) times logits by the activations (N, ...).

        ``x`` are the images that the activations are of; they are not looked at.
        """
        rectified = self._rectified(activations.flatten(1))
        gradient = cotangent
        for place in reversed(range(len(self.operators))):
            if self.operators[place] == "product":
                gradient = gradient @ self._constant(place).T
            elif self.operators[place] == "relu":
                gradient = gradient * rectified.pop()
        return gradient.reshape(activations.shape)

    def _rectified(self, values: Tensor) -> list[Tensor]:
        """Return, for each ReLU in order, which values (N, D) it lets through; there is nothing to do without one."""
        through: list[Tensor] = []
        wanted = self.operators.count("relu")
        for place, operator in enumerate(self.operators):
            if len(through) == wanted:
                break
            if operator == "product":
                values = values @ self._constant(place)
            elif operator == "sum":
                values = values + self._constant(place)
            else:
                through.append((values > 0).to(values.dtype))
                values = values.relu()
        return through

    def _constant(self, place: int) -> Tensor:
        constant: Tensor = getattr(self, f"constant_{place}")
        return constant


class AutogradHead(nn.Module):
    """A head of any form, whose derivative takes a pass of the whole classifier and one back: for offline use.

    ``reason`` is why it cannot be served as one graph.
    """

    def __init__(self, classifier: Classifier, layer: str, reason: HeadUnsuitable) -> None:
        super().__init__()
        self.layer = layer
        self.reason = reason
        self._classifier = (classifier,)  # in a tuple: it is no part of the purifier

    def derivative(self, x: Tensor, activations: Tensor, cotangent: Tensor) -> Tensor:
        """Return the derivative (N, ...) of the sum of cotangent (N, K) times logits by the activations of x."""
        (classifier,) = self._classifier
        with torch.enable_grad():
            logits, values = classifier.graph(x.detach().requires_grad_(), (LOGITS, self.layer))
            gradient: Tensor = torch.autograd.grad((logits * cotangent.detach()).sum(), values)[0]
        return gradient


Head = ChainHead | AutogradHead


def head_behind(classifier: Classifier, layer: Layer) -> Head:
    """Return the head behind a layer: as a chain where the graph is one, else with its derivative by autograd."""
    try:
        return ChainHead(read_chain(classifier, layer))
    except HeadUnsuitable as reason:
        return AutogradHead(classifier, layer.name, reason)


def read_chain(classifier: Classifier, layer: Layer) -> list[Step]:
    """Return the steps from a layer's values to the logits. Raises ``HeadUnsuitable`` where the graph is no chain."""
    shapes = {each.name: each.shape for each in classifier.layers()}
    content = {classifier.graph.input, *classifier.graph.values}
    steps: list[Step] = []
    value = layer.name
    for node in _nodes_behind(classifier, layer):
        if [name for name in node.inputs if name in content] != [value]:
            raise HeadUnsuitable(layer.name, f"{_told(node)} joins several values")
        before, after = shapes[value], shapes.get(node.outputs[0])
        found = None if after is None else _steps(classifier, node, before, after)
        if found is None:
            raise HeadUnsuitable(layer.name, f"there is {_told(node)}")
        steps += found
        value = node.outputs[0]
    return steps


def _nodes_behind(classifier: Classifier, layer: Layer) -> list[Node]:
    """Return the nodes that compute the logits from the layer, in order."""
    graph = classifier.graph
    content = {graph.input, *graph.values}
    producers = {name: place for place, node in enumerate(graph.nodes) for name in node.outputs if name}
    needed: set[int] = set()
    open_names = [LOGITS]
    while open_names:
        name = open_names.pop()
        if name == layer.name or name not in content:
            continue
        if name == graph.input:
            raise HeadUnsuitable(layer.name, "the logits depend on the image past that layer")
        place = producers[name]
        if place not in needed:
            needed.add(place)
            open_names.extend(graph.nodes[place].inputs)
    return [graph.nodes[place] for place in sorted(needed)]


def _steps(classifier: Classifier, node: Node, before: tuple[int, ...], after: tuple[int, ...]) -> list[Step] | None:
    """Return the steps of one node that maps an image's values of one shape to another; None where there are none."""

    def constant(place: int) -> Tensor:
        (tensor,) = classifier.graph(torch.empty(0), (node.inputs[place],))
        return tensor.detach()  # type: ignore[no-any-return]

    if node.operator in RESHAPING and math.prod(before) == math.prod(after):
        return []
    if node.operator == "Relu":
        return [Step("relu")]
    own = next(place for place, name in enumerate(node.inputs) if name in classifier.graph.values)
    if node.operator == "Add":
        other = constant(1 - own)
        return [Step("sum", other.broadcast_to(1, *after).reshape(-1))] if before == after else None
    if node.operator == "MatMul" and own == 0 and len(before) == 1 and constant(1).ndim == 2:
        return [Step("product", constant(1))]
    if node.operator == "Gemm" and own == 0 and len(before) == 1 and not node.get("transA", 0):
        return _gemm(node, constant, after)
    return None


def _gemm(node: Node, constant: Callable[[int], Tensor], after: tuple[int, ...]) -> list[Step]:
    weight = constant(1).T if node.get("transB", 0) else constant(1)
    alpha, beta = node.get("alpha", 1.0), node.get("beta", 1.0)
    steps = [Step("product", weight if alpha == 1 else alpha * weight)]
    if len(node.inputs) > 2 and node.inputs[2]:
        steps.append(Step("sum", (beta * constant(2)).broadcast_to(1, *after).reshape(-1)))
    return steps


def _told(node: Node) -> str:
    return f"the node {node.name!r} ({node.operator})"
