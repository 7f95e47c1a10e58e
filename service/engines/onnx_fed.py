"""A graph on the processor whose noise is drawn beside it, which costs less than the runtime's own draws."""

from collections.abc import Mapping, Sequence
from functools import cache
from math import prod
from pathlib import Path
from statistics import NormalDist

import numpy as np
import onnx

from service.engines.onnx_bound import row_shapes
from service.engines.onnx_graph import with_noise_fed
from service.engines.onnx_session import open_session

BITS = 12
"""How many bits of a word tell a value; a table of the values of 16 would crowd a core's nearest cache."""

LEVELS = 2**BITS
"""The values that noise takes: the quantiles of a standard normal distribution in the middle of so many equal parts."""


class FedGraph:
    """Run a graph on the processor, with the standard normal noise that its nodes would have drawn as inputs.

    ``threads`` are those of ``open_session``. Safe to call from several threads. Raises ``GraphUnloadable`` for a graph
    that the runtime refuses, and for noise that has not one row for each image.
    """

    def __init__(self, model: onnx.ModelProto, path: Path, outputs: Sequence[str], *, threads: int) -> None:
        self._outputs = list(outputs)
        fed, self._noise = fed_graph(model, path, outputs)
        self._session = open_session(fed, path, "cpu", threads)
        self._random = np.random.SFC64()

    def feed(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return each output by name for inputs by name, all of the same number of rows, 1 or more."""
        noise = self._drawn(len(next(iter(inputs.values()))))
        return dict(zip(self._outputs, self._session.run(self._outputs, {**inputs, **noise}), strict=True))

    def _drawn(self, count: int) -> dict[str, np.ndarray]:
        """Return noise for so many images by the input's name."""
        sizes = [count * prod(shape) for shape in self._noise.values()]
        ends = np.cumsum([0, *sizes])
        values = standard_normal(self._random, int(ends[-1]))
        places = zip(self._noise.items(), ends[:-1], ends[1:], strict=True)
        return {name: values[start:end].reshape(count, *shape) for (name, shape), start, end in places}


def fed_graph(
    model: onnx.ModelProto, path: Path, outputs: Sequence[str]
) -> tuple[onnx.ModelProto, dict[str, tuple[int, ...]]]:
    """Return a graph whose noise is fed to it, and the shapes of that noise for one image by the input's name.

    The runtime is told these shapes, by which it lays out what noise is added to. Raises as ``row_shapes`` does.
    """
    fed, draws = with_noise_fed(model)
    all_rows = row_shapes(model, path, outputs, draws) if draws else {}
    rows = {draw.name: all_rows[draw.name][0] for draw in draws}
    for value in fed.graph.input:
        if value.name in rows:
            shape: list[str | int | None] = ["N", *rows[value.name]]
            value.CopyFrom(onnx.helper.make_tensor_value_info(value.name, onnx.TensorProto.FLOAT, shape))
    return fed, rows


def standard_normal(random: np.random.BitGenerator, count: int) -> np.ndarray:
    """Return (count,) independent float32 values that are standard normal but for being one of ``LEVELS``."""
    words = np.frombuffer(random.random_raw(-(-count // 4)), np.uint16)[:count]
    # Every index is in range, and what need not be checked is taken in a third of the time.
    values: np.ndarray = np.take(_quantiles(), words >> (16 - BITS), mode="clip")
    return values


@cache
def _quantiles() -> np.ndarray:
    """Return (LEVELS,) ascending quantiles, scaled to the variance 1 that the cut tails would leave short."""
    half = np.array([NormalDist().inv_cdf((level + 0.5) / LEVELS) for level in range(LEVELS // 2, LEVELS)])
    values = np.concatenate([-half[::-1], half])
    scaled: np.ndarray = (values / values.std()).astype(np.float32)
    return scaled
