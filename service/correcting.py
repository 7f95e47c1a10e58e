"""A version that answers twice: what the first answer alerts is answered anew."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from service.engines import Answers, GraphUnloadable
from service.engines.opening import Source

logger = logging.getLogger("portcullis")

NEEDED = ("alert", "purified", "undefended_logits")
"""The outputs of the first answer that the correction works from."""


class CorrectingEngine:
    """Compute outputs as an ``Engine`` does, and answer those images anew that are alerted.

    ``outputs`` are names of ``service.engines.FIELDS``. The correction takes ``purified`` and ``undefended_logits`` and
    gives ``logits`` and, where the purified image is asked for, ``corrected``. Where it fails the alert stands with the
    first answer, and ``failed`` is called with how many images that is. Safe to call from several threads. Raises what
    the source does.
    """

    def __init__(self, source: Source, outputs: Sequence[str], *, failed: Callable[[int], None]) -> None:
        self._outputs = tuple(outputs)
        self._failed = failed
        self._first = source.open(tuple(dict.fromkeys([*outputs, *NEEDED])))
        self._correction = source.open_correction(purified="purified" in outputs)
        self.platform, self.arithmetic = self._first.platform, self._first.arithmetic
        self.warm_up_sizes, self.lanes = self._first.warm_up_sizes, self._first.lanes

    def try_out(self, shape: tuple[int, ...], classes: int) -> None:
        """Correct images of a shape (C, H, W) in every size that is prepared for; raises ``GraphUnloadable``."""
        path = Path(self._correction.name)
        for size in self._correction.warm_up_sizes:
            images, logits = np.zeros((size, *shape), np.float32), np.zeros((size, classes), np.float32)
            try:
                corrected = self._correction.correct(images, logits)
            except Exception as error:  # the runtimes' own exceptions share no narrower ancestor
                raise GraphUnloadable(path, str(error).strip()) from error
            expected = {"logits": logits.shape, "corrected": images.shape}
            for name, values in corrected.items():
                if values.shape != expected[name]:
                    raise GraphUnloadable(path, f"expected {name} of shape {expected[name]}, got {values.shape}.")

    def predict(self, images: np.ndarray) -> Answers:
        """Return the answers for images."""
        return Answers.of(self.run(images))

    def run(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Return each output by name for images."""
        values = self._first.run(images)
        rows = np.flatnonzero(values["alert"])
        if len(rows):
            self._correct(values, rows)
        return {name: values[name] for name in self._outputs}

    def _correct(self, values: dict[str, np.ndarray], rows: np.ndarray) -> None:
        """Put the correction's answers in place of the first ones on the alerted rows."""
        try:
            corrected = self._correction.correct(values["purified"][rows], values["undefended_logits"][rows])
        except Exception:  # the runtimes' own exceptions share no narrower ancestor
            logger.exception("%s failed on alerted images; they keep their purified answer.", self._correction.name)
            self._failed(len(rows))
            return
        finite = np.logical_and.reduce(
            [np.isfinite(answers.reshape(len(rows), -1)).all(1) for answers in corrected.values()]
        )
        if not finite.all():
            logger.error("%s gave values that are not finite on alerted images.", self._correction.name)
            self._failed(int((~finite).sum()))
        values["logits"][rows[finite]] = corrected["logits"][finite]
        if "corrected" in corrected:
            values["purified"][rows[finite]] = corrected["corrected"][finite]
