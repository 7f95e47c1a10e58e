"""A module's runs on a GPU, captured once for each size of batch and replayed."""

import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Lock

import numpy as np
import torch

from defenses.precision import full_precision
from service.engines.buckets import bucket_of
from service.engines.torch_buffers import Slot
from service.engines.torch_outputs import VersionOutputs

logger = logging.getLogger("portcullis")

IN_FLIGHT = 2
"""How many batches may be on their way at once: the copies of one run beside the computation of another."""

RUNS_BEFORE_CAPTURE = 3
"""How often a size is run before it is captured, so that libraries have chosen and set up what they need."""


@dataclass(frozen=True)
class _Lane:
    """A batch's buffers, the stream of its copies, and what was captured on these buffers, by size."""

    slot: Slot
    copies: torch.cuda.Stream
    graphs: Mapping[int, torch.cuda.CUDAGraph | None]


class CapturedRuns:
    """Run a module in a few sizes of batch on a GPU.

    A batch is filled up with zeros to the next of ``sizes`` and its answers are cut back; it may hold no more than the
    largest. Copies run on streams of their own; all computation on one, in turns. A module that cannot be captured, one
    that waits for the device in between, is run as it is, and the log says so. Safe to call from several threads, and
    of two that do the copies overlap with the other's computation.
    """

    def __init__(
        self, module: VersionOutputs, shape: tuple[int, int, int], sizes: tuple[int, ...], device: torch.device
    ) -> None:
        self._module = module
        self._sizes = sizes
        self._device = device
        self._computing = torch.cuda.Stream(device)
        self._turn = Lock()
        self._memory = torch.cuda.graph_pool_handle()
        self._free: SimpleQueue[_Lane] = SimpleQueue()
        with torch.inference_mode(), _fastest_exact():
            x = torch.zeros(1, *shape, device=device)
            examples = module(x.contiguous(memory_format=torch.channels_last))
            for _ in range(IN_FLIGHT):
                slot = Slot(shape, examples, sizes[-1], device)
                graphs = {size: self._captured(slot, size) for size in sizes}
                self._free.put(_Lane(slot, torch.cuda.Stream(device), graphs))

    def __call__(self, images: np.ndarray) -> list[np.ndarray]:
        """Return the module's outputs for images (N, C, H, W), uint8 or float32."""
        lane = self._free.get()
        try:
            return self._run(lane, images)
        finally:
            self._free.put(lane)

    @torch.inference_mode()
    def _run(self, lane: _Lane, images: np.ndarray) -> list[np.ndarray]:
        count, size = len(images), bucket_of(len(images), self._sizes)
        with torch.cuda.stream(lane.copies):
            lane.slot.send(images, size)
            sent = lane.copies.record_event()
        with self._turn, torch.cuda.stream(self._computing):
            self._computing.wait_event(sent)
            self._compute(lane, size)
            computed = self._computing.record_event()
        with torch.cuda.stream(lane.copies):
            lane.copies.wait_event(computed)
            lane.slot.fetch(count)
            lane.copies.record_event().synchronize()
        return lane.slot.answers(count)

    def _compute(self, lane: _Lane, size: int) -> None:
        graph = lane.graphs[size]
        if graph is None:
            with full_precision():
                lane.slot.keep(self._module(lane.slot.images[:size]))
        else:
            graph.replay()

    def _captured(self, slot: Slot, size: int) -> torch.cuda.CUDAGraph | None:
        """Return a size's run on a batch's buffers, or None where it cannot be captured.

        The generator of the noise is registered with the graph, so that each replay draws from where the last one left
        it. Nothing that a graph computes outlives its replay but what the buffers keep, so all graphs share one pool.
        """
        torch.cuda.synchronize(self._device)
        with torch.cuda.stream(self._computing):
            for _ in range(RUNS_BEFORE_CAPTURE):
                slot.keep(self._module(slot.images[:size]))
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(torch.cuda.default_generators[self._device.index or 0])
        try:
            # Another model may be loading: what its thread asks of the device is no part of this capture.
            with torch.cuda.graph(graph, self._memory, self._computing, capture_error_mode="thread_local"):
                slot.keep(self._module(slot.images[:size]))
        except RuntimeError as error:
            logger.warning("Batches of %d cannot be captured and are run as they are: %s", size, str(error).strip())
            torch.cuda.synchronize(self._device)
            return None
        return graph


def _fastest_exact() -> AbstractContextManager[None]:
    """Return a context in which convolutions are tried out for the fastest way, and float32 is not computed in TF32."""
    tried: AbstractContextManager[None] = torch.backends.cudnn.flags(
        enabled=True, benchmark=True, deterministic=False, allow_tf32=False
    )
    return tried
