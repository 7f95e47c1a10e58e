"""What is asked of an engine, and what it says."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, Self

import numpy as np

Device = Literal["cpu", "cuda"]

Arithmetic = Literal["fp32", "tf32", "bf16", "fp16"]
"""What convolutions and products multiply in: a precision, or float32 with a mantissa of ten bits."""


@dataclass(frozen=True)
class Answers:
    """What a version says of N images; what was not computed is None.

    ``logits`` and ``undefended_logits`` are (N, K), ``scores`` (N,), ``alerts`` (N,) bool, ``purified`` (N, C, H, W).
    """

    logits: np.ndarray
    scores: np.ndarray | None = None
    alerts: np.ndarray | None = None
    undefended_logits: np.ndarray | None = None
    purified: np.ndarray | None = None

    @classmethod
    def of(cls, values: Mapping[str, np.ndarray]) -> Self:
        """Return the answers that an engine's outputs by name are; ``logits`` must be among them."""
        return cls(**{FIELDS[name]: column for name, column in values.items()})

    def __getitem__(self, rows: slice) -> "Answers":
        return Answers(*(None if column is None else column[rows] for column in self.columns))  # type: ignore[arg-type]

    @property
    def columns(self) -> tuple[np.ndarray | None, ...]:
        """The fields in order."""
        return (self.logits, self.scores, self.alerts, self.undefended_logits, self.purified)


FIELDS = {
    "logits": "logits",
    "score": "scores",
    "alert": "alerts",
    "undefended_logits": "undefended_logits",
    "purified": "purified",
}
"""The outputs that an engine can be asked for, and the answers' fields they fill."""


class Engine(Protocol):
    """Compute outputs of one version, named when it was opened; safe to call from several threads.

    Images are (N, C, H, W), N any number above 0, either float32 in [0, 1] or uint8, which stand for themselves
    divided by 255. ``platform`` says what runs the version and in which format it was read, as the Open Inference
    Protocol names platforms: ``<project>_<format>``. ``arithmetic`` is what it multiplies in. ``warm_up_sizes`` are the
    sizes of batch to be run once before the first is answered: whatever is prepared for a size is prepared then.
    ``lanes`` are how many batches are worth being computed at once: of several the copies run beside each other's
    computation.
    """

    @property
    def platform(self) -> str: ...

    @property
    def arithmetic(self) -> Arithmetic: ...

    @property
    def warm_up_sizes(self) -> tuple[int, ...]: ...

    @property
    def lanes(self) -> int: ...

    def run(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Return each output by name."""

    def predict(self, images: np.ndarray) -> Answers:
        """Return the outputs as answers; ``logits`` must be among them."""


class Correction(Protocol):
    """Answer alerted images anew, as the second graph of a version does.

    ``purified`` is (M, C, H, W) float32 in [0, 1] and ``undefended_logits`` (M, K). What comes back are ``logits``
    (M, K) and, where it was asked for, ``corrected`` (M, C, H, W). ``name`` is what a log calls it.
    """

    @property
    def name(self) -> str: ...

    @property
    def warm_up_sizes(self) -> tuple[int, ...]: ...

    def correct(self, purified: np.ndarray, undefended_logits: np.ndarray) -> dict[str, np.ndarray]:
        """Return each output by name."""
