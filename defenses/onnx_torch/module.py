"""An ONNX graph as a torch module that gradients flow through."""

from collections.abc import Sequence
from dataclasses import dataclass

import onnx
import torch
from torch import Tensor, nn

from defenses.onnx_torch.errors import ValueNotFound
from defenses.onnx_torch.graph import SHAPE_READERS, Graph, call, read_graph
from defenses.onnx_torch.node import Node
from defenses.onnx_torch.operators import OPERATORS

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Step:
    """One node of a plan: its inputs that belong on the CPU, and the values that nothing reads after it."""

    node: Node
    host_places: frozenset[int]
    last_used: tuple[str, ...]


class OnnxModule(nn.Module):
    """Run an ONNX graph of one input on torch, in float32, on the device its weights are on.

    Opsets 7 to 26 of the default domain, local functions included. Weights become parameters that want no gradient,
    other constants buffers; equal ones are kept once. Gradients flow from every output to the input. Shapes, axes and
    counts are computed on the CPU, so that an accelerator is not waited for. ``outputs`` are the graph's output names,
    ``nodes`` its nodes in order, and ``values`` the names of all that depends on the input's elements, in order.

    Raises, when built, ``OperatorUnsupported`` naming every node that cannot run, and ``GraphInvalid``.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        super().__init__()
        self._plans: dict[tuple[str, ...], tuple[Step, ...]] = {}
        with torch.inference_mode(False):
            graph = read_graph(model)
            self._host_values = graph.host_values
            self._slots = self._register_constants(graph)
        self.input = graph.input
        self.outputs = graph.outputs
        self.nodes = graph.nodes
        self.values = graph.content
        self._host_constants = {name: value for name, value in graph.constants.items() if name in graph.host_values}
        self._producers = {name: place for place, node in enumerate(graph.nodes) for name in node.outputs if name}

    def forward(self, x: Tensor, outputs: Sequence[str] | None = None) -> tuple[Tensor, ...]:
        """Return the named values for input x, the graph's outputs unless told; only what they need is computed.

        Raises ``ValueNotFound``.
        """
        wanted = tuple(self.outputs if outputs is None else outputs)
        if wanted not in self._plans:
            self._plans[wanted] = self._plan(wanted)
        values = {self.input: x.float() if x.is_floating_point() else x}
        for step in self._plans[wanted]:
            inputs = [
                self._read(values, name, x.device, place in step.host_places, step.node)
                for place, name in enumerate(step.node.inputs)
            ]
            values.update(zip(step.node.outputs, call(step.node, inputs), strict=False))
            for name in step.last_used:
                values.pop(name, None)
        return tuple(values[name] if name in values else self._constant(name) for name in wanted)

    def _register_constants(self, graph: Graph) -> dict[str, str]:
        """Register what the accelerator reads; return the slot of each name."""
        slots, registered = {}, dict[int, str]()
        on_device = {
            name
            for node in graph.nodes
            for place, name in enumerate(node.inputs)
            if name in graph.constants and place not in self._host_places(node)
        }
        for name, tensor in graph.constants.items():
            if name not in on_device and name not in graph.outputs:
                continue
            if id(tensor) not in registered:
                registered[id(tensor)] = f"constant_{len(registered)}"
                if tensor.is_floating_point():
                    self.register_parameter(registered[id(tensor)], nn.Parameter(tensor, requires_grad=False))
                else:
                    self.register_buffer(registered[id(tensor)], tensor)
            slots[name] = registered[id(tensor)]
        return slots

    def _host_places(self, node: Node) -> frozenset[int]:
        if node.operator not in SHAPE_READERS and self._host_values.intersection(node.outputs):
            return frozenset(range(len(node.inputs)))
        return frozenset(OPERATORS[node.operator].host)

    def _read(
        self, values: dict[str, Tensor], name: str, device: torch.device, host: bool, node: Node
    ) -> Tensor | None:
        if not name:
            return None
        if name not in values:
            return self._host_constants[name] if host else self._constant(name)
        tensor = values[name]
        if host:
            return tensor.to(CPU)
        return tensor if node.operator in SHAPE_READERS else tensor.to(device, non_blocking=True)

    def _constant(self, name: str) -> Tensor:
        tensor: Tensor = getattr(self, self._slots[name])
        return tensor

    def _plan(self, wanted: tuple[str, ...]) -> tuple[Step, ...]:
        for name in wanted:
            if name != self.input and name not in self._producers and name not in self._slots:
                raise ValueNotFound(name)
        needed: set[int] = set()
        open_names = list(wanted)
        while open_names:
            place = self._producers.get(open_names.pop())
            if place is not None and place not in needed:
                needed.add(place)
                open_names.extend(self.nodes[place].inputs)
        kept, steps = set(wanted), []
        for place in sorted(needed, reverse=True):
            node = self.nodes[place]
            unread = {name for name in (*node.inputs, *node.outputs) if name and name not in kept}
            kept |= unread
            steps.append(Step(node, self._host_places(node), tuple(unread)))
        return tuple(reversed(steps))
