"""Small edits of ONNX graphs, in place: renaming, pruning, taking a softmax off, freeing a fixed batch."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import AttributeProto, GraphProto, NodeProto, helper, numpy_helper

SOFTMAX_FOLLOWERS = ("Identity", "Flatten", "Reshape", "Squeeze", "Cast", "Dropout")
"""What may stand between a softmax and the output without changing what it means."""


def producers(graph: GraphProto) -> dict[str, NodeProto]:
    """Return the node that produces each value."""
    return {name: node for node in graph.node for name in node.output if name}


def fresh_name(graph: GraphProto, wanted: str) -> str:
    """Return ``wanted``, with a number after it if the graph has a value of that name."""
    taken = {name for node in graph.node for name in (*node.input, *node.output)}
    taken.update(value.name for values in (graph.input, graph.output, graph.initializer) for value in values)
    name, number = wanted, 1
    while name in taken:
        name, number = f"{wanted}_{number}", number + 1
    return name


def rename(graph: GraphProto, old: str, new: str) -> None:
    """Rename a value wherever it is produced or read, subgraphs included."""
    for node in graph.node:
        node.input[:] = [new if name == old else name for name in node.input]
        node.output[:] = [new if name == old else name for name in node.output]
        for attribute in node.attribute:
            for body in (attribute.g,) if attribute.type == AttributeProto.GRAPH else attribute.graphs:
                rename(body, old, new)
    for values in (graph.input, graph.output):
        for value in values:
            value.name = new if value.name == old else value.name
    for tensor in graph.initializer:
        tensor.name = new if tensor.name == old else tensor.name


def prune(graph: GraphProto) -> None:
    """Leave out the nodes and initializers that no output needs, and all noted shapes, which may be stale."""
    wanted = {value.name for value in graph.output}
    kept = []
    for node in reversed(graph.node):
        if wanted.intersection(node.output):
            wanted.update(_read_by(node))
            kept.append(node)
    initializers = [tensor for tensor in graph.initializer if tensor.name in wanted]
    for field, rest in ((graph.node, kept[::-1]), (graph.initializer, initializers)):
        copies = [type(item).FromString(item.SerializeToString()) for item in rest]
        del field[:]
        field.extend(copies)
    del graph.value_info[:]


def _read_by(node: NodeProto) -> Iterable[str]:
    yield from node.input
    for attribute in node.attribute:
        for body in (attribute.g,) if attribute.type == AttributeProto.GRAPH else attribute.graphs:
            for inner in body.node:
                yield from _read_by(inner)
            yield from (value.name for value in body.output)


def constants(graph: GraphProto) -> dict[str, NDArray[Any]]:
    """Return the small constants of a graph: initializers and Constant nodes of up to 64 elements."""
    found = {
        tensor.name: numpy_helper.to_array(tensor)
        for tensor in graph.initializer
        if np.prod(tensor.dims, dtype=int) <= 64
    }
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute and node.attribute[0].name in ("value", "value_ints"):
            value = helper.get_attribute_value(node.attribute[0])
            found[node.output[0]] = np.array(value) if isinstance(value, list) else numpy_helper.to_array(value)
    return found


def without_softmax(graph: GraphProto, output: str) -> str:
    """Take a softmax before the output off; return the name of the value that holds the logits now.

    What follows the softmax stays where it only reshapes or casts.
    """
    made_by, follower, name = producers(graph), None, output
    while name in made_by and made_by[name].op_type in SOFTMAX_FOLLOWERS:
        follower, name = made_by[name], made_by[name].input[0]
    softmax = made_by.get(name)
    if softmax is None or softmax.op_type != "Softmax":
        return output
    if follower is None:
        return str(softmax.input[0])
    follower.input[0] = softmax.input[0]
    return output


def free_batch(graph: GraphProto, image: str, batch: int) -> bool:
    """Let constant shapes that begin with a fixed batch take any; return whether there was one.

    A Reshape to (batch, ...) becomes one to (-1, ...), or to (0, ...), which keeps the input's first size, where -1 is
    taken. Whether the result is right is for the caller to prove.
    """
    known, of_the_image, freed = constants(graph), {image}, False
    for node in graph.node:
        if not of_the_image.intersection(_read_by(node)):
            continue
        of_the_image.update(node.output)
        shape = known.get(node.input[1]) if node.op_type == "Reshape" and len(node.input) > 1 else None
        if shape is None or shape.ndim != 1 or not shape.size or shape[0] != batch:
            continue
        allows_zero = any(attribute.name == "allowzero" and attribute.i for attribute in node.attribute)
        taken = -1 in shape[1:]
        if taken and allows_zero:
            continue
        freer = np.concatenate(([0 if taken else -1], shape[1:])).astype(np.int64)
        node.input[1] = fresh_name(graph, f"{node.output[0]}_shape")
        graph.initializer.append(numpy_helper.from_array(freer, node.input[1]))
        freed = True
    return freed
