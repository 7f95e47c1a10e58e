"""A graph bound to buffers that stay where they are, so that a GPU can capture a run and replay it."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import helper

from service.engines.answers import Device
from service.engines.buckets import bucket_of, buckets_up_to, portions
from service.engines.errors import GraphUnloadable
from service.engines.onnx_graph import Draw, noise_graph, random_operators, with_noise_fed
from service.engines.onnx_session import open_session

ALIGNMENT = 64
"""Where noise may begin in its buffer, in values: a multiple of 256 bytes."""

PROBED = 2
"""How many images are computed to see the shapes of what is bound: a second row tells a batch from a constant."""

Rows = Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]]
"""The shape of one row and the type of inputs, outputs and noise by name."""


@dataclass(frozen=True)
class _Bucket:
    """The buffers of one size of batch, by the input's or output's name, and their bindings."""

    inputs: Mapping[str, Any]
    outputs: Mapping[str, Any]
    binding: Any
    noise: Any
    run_options: Any


class BoundGraph:
    """Run a graph in a few sizes of batch, each with buffers of its own on the device.

    A batch is filled up with zeros to the next of ``buckets`` and its answers are cut back; a larger one than
    ``max_batch`` is split. With ``cuda_graphs`` a size's run is captured and replayed from then on. A random operator
    would then repeat what it drew, so the noise is an input of the graph, which another one fills on the device before
    each run. Every run is made in one thread, as captured runs must be. ``exact`` is that of ``open_session``. Safe to
    call from several threads. Raises as ``open_session`` does, and ``GraphUnloadable`` for a graph that draws other
    noise than a standard normal one, or whose operators are not all the GPU's with ``cuda_graphs``.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        path: Path,
        outputs: Sequence[str],
        *,
        device: Device,
        threads: int,
        max_batch: int,
        cuda_graphs: bool,
        exact: bool = False,
    ) -> None:
        self.buckets = buckets_up_to(max_batch)
        self._outputs = tuple(outputs)
        self._device = device
        self._inputs = [value.name for value in model.graph.input]
        fed, self._draws = with_noise_fed(model)
        if left := random_operators(fed):
            raise GraphUnloadable(path, f"expected no noise but a standard normal one, got {', '.join(left)}.")
        self._rows = row_shapes(model, path, outputs, self._draws)
        self._cuda_graphs = cuda_graphs
        self._session = open_session(fed, path, device, threads, cuda_graphs=cuda_graphs, exact=exact)
        self._noise = open_session(noise_graph(), path, device, threads) if self._draws else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"bound-{path.stem}")
        self._prepared: dict[int, _Bucket] = {}

    def feed(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return each output by name for inputs by name, all of the same number of rows, 1 or more."""
        return self._thread.submit(self._feed, inputs).result()

    def _feed(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        count = len(next(iter(inputs.values())))
        pieces = [
            self._run({name: values[rows] for name, values in inputs.items()}, rows.stop - rows.start)
            for rows in portions(count, self.buckets[-1])
        ]
        if len(pieces) == 1:
            return pieces[0]
        return {name: np.concatenate([piece[name] for piece in pieces]) for name in self._outputs}

    def _run(self, inputs: Mapping[str, np.ndarray], count: int) -> dict[str, np.ndarray]:
        size = bucket_of(count, self.buckets)
        if size not in self._prepared:
            self._prepared[size] = self._prepare(size)
        bucket = self._prepared[size]
        for name, buffer in bucket.inputs.items():
            buffer.update_inplace(_filled_up(inputs[name], size))
        if self._noise is not None:
            self._noise.run_with_iobinding(bucket.noise)
            bucket.noise.synchronize_outputs()
        bucket.binding.synchronize_inputs()
        self._session.run_with_iobinding(bucket.binding, bucket.run_options)
        # On the processor an array over the buffer is a view, which the next run would overwrite.
        return {name: buffer.numpy()[:count].copy() for name, buffer in bucket.outputs.items()}

    def _prepare(self, size: int) -> _Bucket:
        """Return the buffers and bindings of a size; they are bound once and never moved."""
        inputs, outputs = (
            {name: self._buffer(name, size) for name in names} for names in (self._inputs, self._outputs)
        )
        binding = self._session.io_binding()
        for name, buffer in inputs.items():
            binding.bind_ortvalue_input(name, buffer)
        for name, buffer in outputs.items():
            binding.bind_ortvalue_output(name, buffer)
        options = onnxruntime.RunOptions()
        if self._cuda_graphs:
            options.add_run_config_entry("gpu_graph_id", str(size))
        return _Bucket(inputs, outputs, binding, self._bind_noise(binding, size), options)

    def _bind_noise(self, binding: Any, size: int) -> Any:
        """Bind the graph's inputs of noise to parts of one buffer; return what the noise's own session is bound to."""
        if self._noise is None:
            return None
        shapes = {draw.name: (size, *self._rows[draw.name][0]) for draw in self._draws}
        starts, end = {}, 0
        for name, shape in shapes.items():
            starts[name] = end
            end += -(-prod(shape) // ALIGNMENT) * ALIGNMENT
        buffer = onnxruntime.OrtValue.ortvalue_from_shape_and_type((end,), np.float32, self._device, 0)
        for name, shape in shapes.items():
            place = buffer.data_ptr() + starts[name] * np.dtype(np.float32).itemsize
            binding.bind_input(name, self._device, 0, np.float32, shape, place)
        drawing = self._noise.io_binding()
        # Only the shape of what the noise is to be like is read, so the buffer may be that as well.
        drawing.bind_ortvalue_input("like", buffer)
        drawing.bind_ortvalue_output("noise", buffer)
        return drawing

    def _buffer(self, name: str, size: int) -> Any:
        shape, dtype = self._rows[name]
        return onnxruntime.OrtValue.ortvalue_from_shape_and_type((size, *shape), dtype, self._device, 0)


def row_shapes(model: onnx.ModelProto, path: Path, outputs: Sequence[str], draws: Sequence[Draw]) -> Rows:
    """Return what one row is of a graph's inputs, of its outputs and of its noise, as a run on the processor shows it.

    ``model`` still draws its noise itself. Raises ``GraphUnloadable`` for a value that has not one row for each image.
    """
    declared = {
        value.name: tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)[1:] for value in model.graph.input
    }
    rows = {name: (shape, np.dtype(np.float32)) for name, shape in declared.items()}
    shown = list(dict.fromkeys([*outputs, *(draw.like for draw in draws if draw.like not in declared)]))
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    probe.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in shown if name not in outputs)
    session = open_session(probe, path, "cpu", 1)
    try:
        values = session.run(shown, {name: np.zeros((PROBED, *shape), np.float32) for name, shape in declared.items()})
    except Exception as error:  # the runtime's own exceptions share no narrower ancestor
        raise GraphUnloadable(path, str(error).strip()) from error
    for name, value in zip(shown, values, strict=True):
        if value.ndim == 0 or len(value) != PROBED:
            raise GraphUnloadable(
                path, f"expected {name} to have one row for each of {PROBED} images, got the shape {value.shape}."
            )
        rows[name] = (value.shape[1:], value.dtype)
    return rows | {draw.name: rows[draw.like] for draw in draws}


def _filled_up(values: np.ndarray, size: int) -> np.ndarray:
    """Return float32 values of so many rows, those that are missing zero."""
    if len(values) == size:
        return np.ascontiguousarray(values)
    filled = np.zeros((size, *values.shape[1:]), np.float32)
    filled[: len(values)] = values
    return filled
