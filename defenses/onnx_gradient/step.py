"""Writing the derivative of one node: new nodes with fresh names, constants, and sums over what was broadcast."""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor

from defenses.onnx_gradient.errors import GradientUnsupported
from defenses.onnx_gradient.values import Shape, Values, element_type
from defenses.onnx_torch.errors import Unsupported
from defenses.onnx_torch.node import Node


@dataclass
class Writer:
    """Collect nodes in order, and constants, equal ones once; every name begins with ``prefix``."""

    prefix: str
    nodes: list[NodeProto] = field(default_factory=list)
    constants: dict[tuple[object, ...], TensorProto] = field(default_factory=dict)

    def write(self, operator: str, *inputs: str, **attributes: Any) -> str:
        """Add a node of one output; return the output's name."""
        name = f"{self.prefix}{len(self.nodes)}_{operator}"
        self.nodes.append(helper.make_node(operator, inputs, [name], name, **attributes))
        return name

    def constant(self, value: NDArray[Any]) -> str:
        """Return the name of a constant of that value."""
        key = (value.dtype.str, value.shape, value.tobytes())
        if key not in self.constants:
            name = f"{self.prefix}constant_{len(self.constants)}"
            self.constants[key] = numpy_helper.from_array(np.ascontiguousarray(value).reshape(value.shape), name)
        return self.constants[key].name


@dataclass(frozen=True)
class Step:
    """A node on the way back, and the gradients by its outputs, None where nothing reads the output."""

    node: Node
    gradients: Sequence[str | None]
    values: Values
    writer: Writer

    @property
    def gradient(self) -> str:
        """The gradient by the first output."""
        gradient = self.gradients[0]
        assert gradient is not None
        return gradient

    @property
    def output(self) -> str:
        """The name of the first output."""
        return self.node.outputs[0]

    @property
    def output_shape(self) -> Shape:
        """The shape of the first output."""
        return self.values.shapes[self.output]

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type that the node computes in."""
        return np.dtype(helper.tensor_dtype_to_np_dtype(element_type(self.values, self.output)))

    def input(self, place: int = 0) -> str:
        """Return the name of an input."""
        return self.node.inputs[place]

    def has(self, place: int) -> bool:
        """Say whether an optional input is there."""
        return len(self.node.inputs) > place and bool(self.node.inputs[place])

    def shape(self, place: int = 0) -> Shape:
        """Return the shape of an input."""
        return self.values.shapes[self.input(place)]

    def fixed(self, place: int) -> Tensor | None:
        """Return an input that is the same for every image, None where it is absent; refuse one that varies."""
        if not self.has(place):
            return None
        if self.input(place) not in self.values.fixed:
            self.refuse(f"its input {self.input(place)!r} is not constant")
        return self.values.fixed[self.input(place)]

    def refuse(self, reason: str) -> NoReturn:
        """Raise ``GradientUnsupported`` for this node."""
        raise GradientUnsupported([unsupported(self.node, reason)])

    def sizes(self, axes: Sequence[int], place: int = 0) -> tuple[int, ...]:
        """Return an input's sizes along axes; refuse the node where one depends on the batch."""
        found = [self.shape(place)[axis] for axis in axes]
        if None in found:
            self.refuse("it works along an axis whose size depends on the batch")
        return tuple(size for size in found if size is not None)

    def write(self, operator: str, *inputs: str | float, **attributes: Any) -> str:
        """Add a node of one output; numbers among its inputs become constants of the type of this node."""
        named = [name if isinstance(name, str) else self.constant(name) for name in inputs]
        return self.writer.write(operator, *named, **attributes)

    def constant(self, value: NDArray[Any] | float) -> str:
        """Return a constant of the type that the node computes in."""
        return self.writer.constant(np.asarray(value).astype(self.dtype))

    def integers(self, values: Sequence[int]) -> str:
        """Return a constant list of sizes, axes or counts."""
        return self.writer.constant(np.array(values, np.int64).reshape(-1))

    def mask(self, comparison: str, *inputs: str | float) -> str:
        """Return ones where a comparison holds, and zeros elsewhere."""
        return self.write("Cast", self.write(comparison, *inputs), to=self.element_type)

    @property
    def element_type(self) -> int:
        """The ONNX element type that the node computes in."""
        return element_type(self.values, self.output)

    def shaped_as(self, gradient: str, place: int = 0) -> str:
        """Reshape a gradient to an input's shape."""
        shape = self.shape(place)
        if shape.count(None) > 1:
            return self.write("Reshape", gradient, self.write("Shape", self.input(place)))
        if shape.count(None) and not math.prod(size for size in shape if size is not None):
            self.refuse("it works on a value without elements")
        return self.write("Reshape", gradient, self.integers([-1 if size is None else size for size in shape]))

    def expanded(self, gradient: str, place: int = 0) -> str:
        """Repeat a gradient along the axes where it has size 1 and the input more."""
        return self.write(
            "Expand", gradient, self.integers([1 if size is None else size for size in self.shape(place)])
        )

    def summed(self, gradient: str, place: int, shape: Shape | None = None) -> str:
        """Sum a gradient of ``shape`` (the output's unless told) over the axes that an input was broadcast along."""
        given = self.output_shape if shape is None else shape
        wanted = self.shape(place)
        ahead = len(given) - len(wanted)
        axes = list(range(ahead))
        axes += [ahead + axis for axis, size in enumerate(wanted) if size == 1 and given[ahead + axis] != 1]
        if axes:
            gradient = self.write("ReduceSum", gradient, self.integers(axes), keepdims=1)
        return self.write("Squeeze", gradient, self.integers(range(ahead))) if ahead else gradient


@dataclass(frozen=True)
class Derivative:
    """How the gradient by an input is written.

    ``write(step, place)`` returns the name of the gradient by the input at that place. ``places`` are the inputs that
    there is one for, None for all; ``refuse`` returns the reason why a certain node has none, or None. With
    ``every_output`` the gradients by all of the outputs are taken, otherwise that by the first alone.
    """

    write: Callable[[Step, int], str]
    places: tuple[int, ...] | None = (0,)
    refuse: Callable[[Node], str | None] | None = None
    every_output: bool = False

    def reason(self, node: Node, varying: Collection[str], read: Collection[str]) -> str | None:
        """Return why a node has no gradient by its inputs that vary and outputs that are read, None where it has."""
        for place, name in enumerate(node.inputs):
            if name in varying and self.places is not None and place not in self.places:
                return f"its gradient by {name!r} is not supported"
        if not self.every_output and any(name in read for name in node.outputs[1:] if name in varying):
            return "its gradient by an output beyond the first is not supported"
        return self.refuse(node) if self.refuse else None


def unsupported(node: Node, reason: str) -> Unsupported:
    """Return a node that has no derivative, and why."""
    return Unsupported(node.operator, node.domain, node.opset, node.name, reason)
