"""A version's graph on ONNX Runtime, pruned to the outputs that are asked of it."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from service.engines.answers import Answers, Arithmetic, Device
from service.engines.errors import GraphUnloadable
from service.engines.onnx_bound import BoundGraph
from service.engines.onnx_fed import FedGraph
from service.engines.onnx_graph import fix_noise, pruned
from service.engines.onnx_session import open_session
from service.pixels import as_float

logger = logging.getLogger("portcullis")

PLATFORM = "onnxruntime_onnx"

Feed = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]


class OnnxEngine:
    """Compute a graph's outputs, as an ``Engine`` does, on the processor or a GPU.

    ``outputs`` are names of ``FIELDS``, or ``corrected``; the graph is pruned to them, since the runtime computes every
    output that a graph declares. ``max_batch`` is the largest batch that is computed at once on a GPU, where runs are
    captured for few sizes of batch and replayed (see ``BoundGraph``); a graph that cannot be captured is run as it is,
    and the log says why. With ``exact`` a GPU multiplies in float32 throughout, not in TF32. Raises
    ``GraphUnloadable`` for a graph that the runtime refuses and ``DeviceUnavailable`` when ``cuda`` is asked for and
    not given.
    """

    def __init__(
        self,
        path: Path,
        outputs: Sequence[str],
        *,
        device: Device = "cpu",
        threads: int = 0,
        noise: bool = True,
        max_batch: int = 32,
        exact: bool = False,
    ) -> None:
        try:
            model = pruned(path, outputs)
        except Exception as error:  # the errors of protobuf, the checker and the file system share no narrower ancestor
            raise GraphUnloadable(path, str(error).strip()) from error
        fix_noise(model, float(noise))
        self.name = path.name
        self.lanes = 1
        self.platform = PLATFORM
        self.arithmetic: Arithmetic = "tf32" if device == "cuda" and not exact else "fp32"
        self._outputs = list(outputs)
        self.warm_up_sizes: tuple[int, ...] = (1, max_batch) if max_batch > 1 else (1,)
        if device == "cpu":
            self._feed: Feed = FedGraph(model, path, self._outputs, threads=threads).feed
            return
        bound = _bound(model, path, self._outputs, device=device, threads=threads, max_batch=max_batch, exact=exact)
        if bound is not None:
            self._feed = bound.feed
            self.warm_up_sizes = bound.buckets
            return
        self._session = open_session(model, path, device, threads, exact=exact)
        self._feed = self._feed_session

    def predict(self, images: np.ndarray) -> Answers:
        """Return the answers for images; ``logits`` must be among the outputs."""
        return Answers.of(self.run(images))

    def run(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Return each output by name for images."""
        return self.feed(image=as_float(images))

    def correct(self, purified: np.ndarray, undefended_logits: np.ndarray) -> dict[str, np.ndarray]:
        """Return each output by name of a graph that corrects, as a ``Correction`` does."""
        return self.feed(purified=purified, undefended_logits=undefended_logits)

    def feed(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Return each output by name for inputs by name, all of the same number of rows."""
        return self._feed(inputs)

    def _feed_session(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return dict(zip(self._outputs, self._session.run(self._outputs, dict(inputs)), strict=True))


def _bound(model: onnx.ModelProto, path: Path, outputs: list[str], **options: Any) -> BoundGraph | None:
    """Return the graph with its runs captured, None where that cannot be done."""
    try:
        return BoundGraph(model, path, outputs, cuda_graphs=True, **options)
    except GraphUnloadable as error:
        logger.warning("It is run without CUDA graphs, since with them %s", error)
        return None
