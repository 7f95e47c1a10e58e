"""A version of two graphs: what the first one alerts the second one answers anew."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from service.engine import FIELDS, Answers, Device, Engine, GraphUnloadable

logger = logging.getLogger("portcullis")

NEEDED = ("alert", "purified", "undefended_logits")
"""The outputs of the first graph that the second one works from."""


class CorrectingEngine:
    """Run a graph on batches of images, and a second one on those images alone that the first one alerts.

    ``outputs`` are names of ``service.engine.FIELDS``. The second graph takes ``purified`` and ``undefended_logits``
    and gives ``logits`` and, where the purified image is asked for, ``corrected``. Where it fails the alert stands with
    the first one's answer, and ``failed`` is called with how many images that is. Safe to call from several threads.
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
        failed: Callable[[int], None],
    ) -> None:
        self._outputs = tuple(outputs)
        self._correction = correction
        self._failed = failed
        self._first = Engine(
            path, list(dict.fromkeys([*outputs, *NEEDED])), device=device, threads=threads, noise=noise
        )
        answered = ["logits", "corrected"] if "purified" in outputs else ["logits"]
        self._second = Engine(correction, answered, device=device, threads=threads, noise=noise)

    def try_out(self, shape: tuple[int, ...], classes: int) -> None:
        """Answer one image of a shape (C, H, W) anew, alerted or not; raises ``GraphUnloadable``."""
        image, logits = np.zeros((1, *shape), np.float32), np.zeros((1, classes), np.float32)
        try:
            corrected = self._second.feed(purified=image, undefended_logits=logits)
        except Exception as error:  # the runtime's own exceptions share no narrower ancestor
            raise GraphUnloadable(self._correction, str(error).strip()) from error
        expected = {"logits": logits.shape, "corrected": image.shape}
        for name, values in corrected.items():
            if values.shape != expected[name]:
                raise GraphUnloadable(
                    self._correction, f"expected {name} of shape {expected[name]}, got {values.shape}."
                )

    def predict(self, images: np.ndarray) -> Answers:
        """Return the answers for images (N, C, H, W) float32 in [0, 1]."""
        values = self._first.run(images)
        rows = np.flatnonzero(values["alert"])
        if len(rows):
            self._correct(values, rows)
        return Answers(**{FIELDS[name]: values[name] for name in self._outputs})

    def _correct(self, values: dict[str, np.ndarray], rows: np.ndarray) -> None:
        """Put the second graph's answers in place of the first one's on the alerted rows."""
        try:
            corrected = self._second.feed(
                purified=values["purified"][rows], undefended_logits=values["undefended_logits"][rows]
            )
        except Exception:  # the runtime's own exceptions share no narrower ancestor
            logger.exception("%s failed on alerted images; they keep their purified answer.", self._correction.name)
            self._failed(len(rows))
            return
        finite = np.isfinite(corrected["logits"]).all(1)
        if not finite.all():
            logger.error("%s gave values that are not finite on alerted images.", self._correction.name)
            self._failed(int((~finite).sum()))
        values["logits"][rows[finite]] = corrected["logits"][finite]
        if "corrected" in corrected:
            values["purified"][rows[finite]] = corrected["corrected"][finite]
