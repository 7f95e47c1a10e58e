"""A registered classifier: an ONNX graph, and the differentiable torch form of it."""

from functools import cached_property
from pathlib import Path
from typing import Self

import onnx
import torch
from torch import Tensor, nn

from defenses.layers import Layer, LayerNotFound, find_head, find_tap, inside, passed_by_all, scopes_of, unknown_layer
from defenses.onnx_import import IMAGE, LOGITS, GraphUnsuitable
from defenses.onnx_torch import OnnxModule

__all__ = ["Classifier", "Layer", "LayerNotFound"]


class Classifier(nn.Module):
    """Classify images by a canonical graph (see ``canonicalise``): x (N, C, H, W) in [0, 1] to logits (N, K).

    ``model`` is the graph, ``graph`` its torch form, ``image_shape`` (C, H, W), ``classes`` K. Layers go by the name of
    a value in the graph, or of a module it was exported from, such as ``layer2`` or ``layer2.1``.
    Raises ``GraphUnsuitable`` for a graph that is not canonical, ``OperatorUnsupported`` naming what cannot run.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        super().__init__()
        self.model = model
        self.image_shape, self.classes = _signature(model)
        self.graph = OnnxModule(model)

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read a canonical graph from a file, and its weights from the file beside it if they are there."""
        return cls(onnx.load(str(path)))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, K) for images (N, C, H, W) in [0, 1]."""
        return self.graph(x, (LOGITS,))[0]  # type: ignore[no-any-return]

    def features(self, x: Tensor, layer: str) -> Tensor:
        """Return the layer's values (N, ...); what comes after it is not computed. Raises ``LayerNotFound``."""
        return self.graph(x, (self.resolve_layer(layer).name,))[0]  # type: ignore[no-any-return]

    def logits_and_features(self, x: Tensor, layer: str) -> tuple[Tensor, Tensor]:
        """Return logits (N, K) and the layer's values (N, ...) in one pass. Raises ``LayerNotFound``."""
        logits, features = self.graph(x, (LOGITS, self.resolve_layer(layer).name))
        return logits, features

    def layers(self) -> list[Layer]:
        """Return every floating-point value that has one entry per image, in order of computation."""
        return list(self._layers.values())

    def resolve_layer(self, name: str) -> Layer:
        """Return the layer of a value's name, or the last one inside a module. Raises ``LayerNotFound``."""
        if name not in self._resolved:
            within = [layer for layer in self._layers.values() if name and inside(layer.scope, name)]
            if name in self._layers:
                within = [self._layers[name]]
            if not within:
                raise unknown_layer(name, self._names())
            self._resolved[name] = within[-1]
        return self._resolved[name]

    @cached_property
    def tap(self) -> Layer:
        """The layer for the Inspector, found by itself (see ``find_tap``). Raises ``LayerNotFound``."""
        inputs = {name: node.inputs for node in self.graph.nodes for name in node.outputs}
        return find_tap(self._layers, self._passed, inputs)

    @cached_property
    def head_layer(self) -> Layer:
        """The layer for NIP, found by itself (see ``find_head``). Raises ``LayerNotFound``."""
        return find_head(self._layers, self._passed, LOGITS)

    @cached_property
    def _resolved(self) -> dict[str, Layer]:
        return {}

    @cached_property
    def _passed(self) -> list[str]:
        return passed_by_all(self.graph.nodes, IMAGE, LOGITS)

    @cached_property
    def _layers(self) -> dict[str, Layer]:
        """Every layer, its shape taken from real passes of one and of two images."""
        scopes = scopes_of(self.model)
        operators = {name: node.operator for node in self.graph.nodes for name in node.outputs}
        one, two = self._shapes(1), self._shapes(2)
        return {
            name: Layer(name, scopes.get(name, ""), operators[name], shape[1:])
            for name, shape in one.items()
            if len(shape) > 1 and shape[0] == 1 and two.get(name) == (2, *shape[1:])
        }

    def _shapes(self, batch: int) -> dict[str, tuple[int, ...]]:
        device = next((tensor.device for tensor in self.graph.parameters()), torch.device("cpu"))
        with torch.no_grad():
            values = self.graph(torch.full((batch, *self.image_shape), 0.5, device=device), self.graph.values)
        return {
            name: tuple(value.shape)
            for name, value in zip(self.graph.values, values, strict=True)
            if value.is_floating_point()
        }

    def _names(self) -> list[str]:
        modules = [
            ".".join(parts[:depth])
            for parts in (layer.scope.split(".") for layer in self._layers.values() if layer.scope)
            for depth in range(1, len(parts) + 1)
        ]
        return [*modules, *self._layers]


def _signature(model: onnx.ModelProto) -> tuple[tuple[int, int, int], int]:
    """Return (C, H, W) and K of a canonical graph."""
    ends = [
        (value.name, [dim.dim_value for dim in value.type.tensor_type.shape.dim])
        for value in (*model.graph.input, *model.graph.output)
    ]
    match ends:
        case [(str(image), [0, c, h, w]), (str(logits), [0, k])] if (
            image == IMAGE and logits == LOGITS and c * h * w * k
        ):
            return (c, h, w), k
    raise GraphUnsuitable(
        "Expected a canonical graph, from image (N, C, H, W) to logits (N, K), got "
        f"{', '.join(f'{name} {dims}' for name, dims in ends)}; canonicalise it first."
    )
