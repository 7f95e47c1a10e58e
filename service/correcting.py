"""A version of two graphs: what the first one alerts the second one answers anew."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from service.engine import FIELDS, Answers, Device, Engine

NEEDED = ("alert", "purified", "undefended_logits")
"""The outputs of the first graph that the second one works from."""


class CorrectingEngine:
    """Run a graph on batches of images, and a second one on those images alone that the first one alerts.

    ``outputs`` are names of ``service.engine.FIELDS``. The second graph takes ``purified`` and ``undefended_logits``
    and gives ``logits`` and, where the purified image is asked for, ``corrected``. Safe to call from several threads.
    Raises as ``Engine`` does.
    """

    def __init__(
        self,
        path: Path,
        correction: Path,
        outputs: Sequence[str],
        *,
        device: Device = "cpu",
        threads: int = 0,
        noise: bool = True,
    ) -> None:
        self._outputs = tuple(outputs)
        self._first = Engine(
            path, list(dict.fromkeys([*outputs, *NEEDED])), device=device, threads=threads, noise=noise
        )
        answered = ["logits", "corrected"] if "purified" in outputs else ["logits"]
        self._second = Engine(correction, answered, device=device, threads=threads, noise=noise)

    def try_out(self, shape: tuple[int, ...], classes: int) -> None:
        """Answer one image of a shape (C, H, W) anew, alerted or not; raises what the runtime raises."""
        nothing = np.zeros((1, classes), np.float32)
        self._second.feed(purified=np.zeros((1, *shape), np.float32), undefended_logits=nothing)

    def predict(self, images: np.ndarray) -> Answers:
        """Return the answers for images (N, C, H, W) float32 in [0, 1]."""
        values = self._first.run(images)
        rows = np.flatnonzero(values["alert"])
        if len(rows):
            corrected = self._second.feed(
                purified=values["purified"][rows], undefended_logits=values["undefended_logits"][rows]
            )
            values["logits"][rows] = corrected["logits"]
            if "corrected" in corrected:
                values["purified"][rows] = corrected["corrected"]
        return Answers(**{FIELDS[name]: values[name] for name in self._outputs})
