"""Any classifier as the one ONNX graph that is kept of it: ``image`` in [0, 1] to ``logits``, the batch free."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx
import onnx.inliner
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from defenses import onnx_surgery as surgery
from defenses.onnx_parity import Parity, ParityBroken, check_parity, run, session, structured_images
from defenses.onnx_trace import ExportFailed, export_classifier

__all__ = [
    "ExportFailed",
    "GraphUnsuitable",
    "Parity",
    "ParityBroken",
    "canonicalise",
    "check_parity",
    "export_classifier",
]

IMAGE, LOGITS, BATCH = "image", "logits", "N"
OLDEST_IR = 8
FLOAT_TYPES = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE)
MIXING_TOLERANCE = 1e-2
"""Logits of one image may differ by this much of their scale between batches; half precision needs it."""

Statistics = tuple[Sequence[float], Sequence[float]]
ImageShape = tuple[int, int, int]


class GraphUnsuitable(ValueError):
    """A graph is not, and cannot be made, a classifier from images (N, C, H, W) to logits (N, K)."""


@dataclass(frozen=True)
class _Input:
    """What a foreign graph takes in: the input's name, element type, batch (None if free) and (C, H, W)."""

    name: str
    element_type: int
    batch: int | None
    shape: ImageShape


def canonicalise(
    model: ModelProto,
    *,
    normalisation: Statistics | None = None,
    input_range: Literal["unit", "byte"] = "unit",
    layout: Literal["NCHW", "NHWC"] = "NCHW",
    image_shape: ImageShape | None = None,
) -> ModelProto:
    """Return a classifier's canonical graph: input ``image`` FP32 (N, C, H, W) in [0, 1], output ``logits`` (N, K).

    The graph given takes images in ``layout``, in [0, 1] or with ``byte`` in [0, 255] (an input of UINT8 always does),
    from which ``normalisation`` (mean and deviation per channel, in the units of that range) is still to be taken.
    What it needs is put before it, a trailing softmax is taken off, and a fixed batch is freed where that is proven to
    work. ``image_shape`` (C, H, W) is needed where the graph leaves it open. A canonical graph comes back unchanged.
    Raises ``GraphUnsuitable``.
    """
    model = _own_copy(model)
    source = _read_input(model, layout, image_shape)
    _keep_output(model, surgery.without_softmax(model.graph, _choose_output(model).name))
    in_bytes = input_range == "byte" or source.element_type == TensorProto.UINT8
    _prepare_images(model, source, normalisation, in_bytes, layout)
    _declare(model, source.batch, source.shape)
    images = structured_images(source.shape, max(3, source.batch or 1))
    first = _first_run(model, images[: source.batch or 1])
    _finish_logits(model, first)
    _declare(model, None, source.shape)
    if not _takes_any_batch(model, images):
        _free_batch(model, source.batch or 1, images, first.reshape(len(first), -1))
    _declare(model, None, source.shape, first.shape[1])
    _check(model)
    return model


def _own_copy(model: ModelProto) -> ModelProto:
    if any(tensor.data_location == TensorProto.EXTERNAL for tensor in model.graph.initializer):
        raise GraphUnsuitable(
            "The graph's weights are in another file; read it with onnx.load(path), which reads both."
        )
    own = ModelProto()
    own.CopyFrom(model)
    if own.functions:
        own = onnx.inliner.inline_local_functions(own)
    weights = {tensor.name for tensor in own.graph.initializer}
    inputs = [value for value in own.graph.input if value.name not in weights]
    del own.graph.input[:]
    own.graph.input.extend(inputs)
    own.ir_version = max(own.ir_version, OLDEST_IR)
    return own


def _read_input(model: ModelProto, layout: str, shape: ImageShape | None) -> _Input:
    inputs = list(model.graph.input)
    if len(inputs) != 1:
        named = ", ".join(value.name for value in inputs) or "none"
        raise GraphUnsuitable(f"Expected a graph with one input, the image, got {len(inputs)}: {named}.")
    (value,) = inputs
    element_type = value.type.tensor_type.elem_type
    if element_type not in (*FLOAT_TYPES, TensorProto.UINT8):
        kind = TensorProto.DataType.Name(element_type)
        raise GraphUnsuitable(f"Expected images of FLOAT, FLOAT16, DOUBLE or UINT8, got an input of {kind}.")
    dims = _dims(value) or (None,) * 4
    if len(dims) != 4:
        raise GraphUnsuitable(f"Expected an input of four axes, {layout}, got {len(dims)}: {_shown(dims)}.")
    declared = dims[1:] if layout == "NCHW" else (dims[3], dims[1], dims[2])
    likely = dims[3] in (1, 3) and dims[1] not in (1, 3, None)
    if layout == "NCHW" and likely:
        raise GraphUnsuitable(f"The input {_shown(dims)} looks like NHWC; say so if it is.")
    if shape is None and None in declared:
        raise GraphUnsuitable(f"The graph leaves its image's shape open, {_shown(dims)}; give it as (C, H, W).")
    given = shape or declared
    if any(want not in (None, got) for want, got in zip(declared, given, strict=True)):
        raise GraphUnsuitable(f"The graph takes images of shape {_shown(declared)}, not {_shown(given)}.")
    channels, height, width = (int(size or 0) for size in given)
    return _Input(value.name, element_type, dims[0], (channels, height, width))


def _dims(value: ValueInfoProto) -> tuple[int | None, ...] | None:
    """Return a value's sizes, None for free ones; None if its rank is not declared."""
    tensor = value.type.tensor_type
    if not tensor.HasField("shape"):
        return None
    return tuple(dim.dim_value if dim.HasField("dim_value") and dim.dim_value > 0 else None for dim in tensor.shape.dim)


def _shown(dims: Sequence[int | None]) -> str:
    return f"({', '.join('?' if size is None else str(size) for size in dims)})"


def _choose_output(model: ModelProto) -> ValueInfoProto:
    """Return the output named ``logits``, or the only one that can be logits, or the first of several that can."""
    outputs: list[ValueInfoProto] = list(onnx.shape_inference.infer_shapes(model).graph.output)
    fitting = [value for value in outputs if value.type.tensor_type.elem_type in (*FLOAT_TYPES, 0)]
    fitting = [value for value in fitting if len(_dims(value) or (0, 0)) == 2] or fitting[:1]
    if not fitting:
        listed = ", ".join(
            f"{value.name} {TensorProto.DataType.Name(value.type.tensor_type.elem_type)} {_shown(_dims(value) or ())}"
            for value in outputs
        )
        raise GraphUnsuitable(f"Expected an output of logits (N, K) in floating point, got {listed or 'none'}.")
    return next((value for value in fitting if value.name == LOGITS), fitting[0])


def _keep_output(model: ModelProto, name: str) -> None:
    del model.graph.output[:]
    model.graph.output.append(helper.make_empty_tensor_value_info(name))
    surgery.prune(model.graph)
    _rename_to(model, name, LOGITS)


def _rename_to(model: ModelProto, old: str, new: str) -> None:
    if old != new:
        surgery.rename(model.graph, new, surgery.fresh_name(model.graph, f"{new}_inside"))
        surgery.rename(model.graph, old, new)


def _prepare_images(
    model: ModelProto, source: _Input, normalisation: Statistics | None, in_bytes: bool, layout: str
) -> None:
    """Put the steps from ``image`` to what the graph takes before it."""
    steps: list[tuple[str, NDArray[np.float32] | None, dict[str, Any]]] = []
    if in_bytes:
        steps.append(("Mul", np.array(255, np.float32), {}))
    if normalisation is not None:
        mean, deviation = (_per_channel(values, source.shape[0]) for values in normalisation)
        if source.element_type == TensorProto.UINT8 or not (deviation > 0).all():
            raise GraphUnsuitable("Normalisation wants positive deviations, and a graph that takes floating point.")
        steps += [("Sub", mean, {}), ("Div", deviation, {})]
    if layout == "NHWC":
        steps.append(("Transpose", None, {"perm": (0, 2, 3, 1)}))
    # Bytes stay in floating point: the casts of the graph become idle, and gradients pass where bytes would stop them.
    if source.element_type in (TensorProto.FLOAT16, TensorProto.DOUBLE):
        steps.append(("Cast", None, {"to": source.element_type}))
    _rename_to(model, model.graph.input[0].name, IMAGE)
    if steps:
        surgery.rename(model.graph, IMAGE, surgery.fresh_name(model.graph, "prepared_image"))
        _put_before(model, steps)


def _per_channel(values: Sequence[float], channels: int) -> NDArray[np.float32]:
    if len(values) != channels:
        raise GraphUnsuitable(f"Expected normalisation for {channels} channels, got {len(values)} values.")
    return np.array(values, np.float32).reshape(1, channels, 1, 1)


def _put_before(model: ModelProto, steps: Sequence[tuple[str, NDArray[np.float32] | None, dict[str, Any]]]) -> None:
    graph, name = model.graph, IMAGE
    prepared, nodes = graph.input[0].name, list[NodeProto]()
    for place, (operator, operand, attributes) in enumerate(steps):
        label = f"prepare/{operator.lower()}"
        inputs = [name]
        if operand is not None:
            inputs.append(surgery.fresh_name(graph, f"{label}_by"))
            graph.initializer.append(numpy_helper.from_array(operand, inputs[1]))
        name = prepared if place == len(steps) - 1 else surgery.fresh_name(graph, f"{label}_output")
        nodes.append(helper.make_node(operator, inputs, [name], label, **attributes))
    for node in reversed(nodes):
        graph.node.insert(0, node)


def _finish_logits(model: ModelProto, logits: NDArray[Any]) -> None:
    """Make the output FP32 (N, K), where it is of another precision or has idle axes after the classes."""
    if not np.issubdtype(logits.dtype, np.floating):
        raise GraphUnsuitable(f"Expected logits in floating point, got {logits.dtype}.")
    if logits.ndim < 2 or int(np.prod(logits.shape[2:])) != 1 or logits.shape[1] < 2:
        raise GraphUnsuitable(f"Expected logits (N, K) of two classes or more, got an output of shape {logits.shape}.")
    operators: list[tuple[str, dict[str, Any]]] = [("Flatten", {"axis": 1})] if logits.ndim > 2 else []
    if logits.dtype != np.float32:
        operators.append(("Cast", {"to": int(TensorProto.FLOAT)}))
    for operator, attributes in operators:
        before = surgery.fresh_name(model.graph, f"{LOGITS}_before_{operator.lower()}")
        surgery.rename(model.graph, LOGITS, before)
        model.graph.node.append(helper.make_node(operator, [before], [LOGITS], f"{operator}_{LOGITS}", **attributes))
        model.graph.output[0].name = LOGITS


def _declare(model: ModelProto, batch: int | None, shape: ImageShape, classes: int | None = None) -> None:
    graph, size = model.graph, batch or BATCH
    del graph.input[:], graph.output[:]
    graph.input.append(helper.make_tensor_value_info(IMAGE, TensorProto.FLOAT, [size, *shape]))
    if classes is None:
        graph.output.append(helper.make_empty_tensor_value_info(LOGITS))
    else:
        graph.output.append(helper.make_tensor_value_info(LOGITS, TensorProto.FLOAT, [size, classes]))


def _check(model: ModelProto) -> None:
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        raise GraphUnsuitable(f"The graph is not valid ONNX: {error}") from error


def _first_run(model: ModelProto, images: NDArray[np.float32]) -> NDArray[Any]:
    try:
        logits = run(session(model), images)
    except Exception as error:
        raise GraphUnsuitable(
            f"The graph does not run in ONNX Runtime on FP32 images of shape {images.shape}: {error}"
        ) from error
    if not np.isfinite(logits).all():
        raise GraphUnsuitable("The graph gives logits that are not finite.")
    return logits


def _takes_any_batch(model: ModelProto, images: NDArray[np.float32]) -> bool:
    """Say whether batches of 1, 2 and 3 give every image the same logits."""
    try:
        runs = session(model)
        single = np.concatenate([run(runs, images[place : place + 1]) for place in range(3)])
        return all(_same(run(runs, images[:size]), single[:size]) for size in (2, 3))
    except Exception:  # ONNX Runtime has no class of its own for shapes that do not fit
        return False


def _free_batch(model: ModelProto, batch: int, images: NDArray[np.float32], expected: NDArray[Any]) -> None:
    freed = surgery.free_batch(model.graph, IMAGE, batch)
    if not freed or not _takes_any_batch(model, images) or not _same(run(session(model), images), expected):
        raise GraphUnsuitable(
            f"The graph works for batches of {batch} alone, and the constants that fix them cannot be freed; export "
            "the model with a dynamic batch dimension."
        )
    surgery.prune(model.graph)


def _same(logits: NDArray[Any], expected: NDArray[Any]) -> bool:
    logits = logits[: len(expected)]
    scale = max(float(np.abs(expected).max()), 1e-6)
    return logits.shape == expected.shape and bool(np.abs(logits - expected).max() <= MIXING_TOLERANCE * scale)
