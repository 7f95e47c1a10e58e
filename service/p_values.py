"""How unusual a score is: conformal p-values from the scores of the benign images that a version was calibrated on."""

import json
import reprlib
from pathlib import Path
from typing import Annotated, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

CALIBRATION = "calibration.json"
"""The file of a version that holds the scores of its calibration images."""


class CalibrationUnreadable(ValueError):
    """A file does not hold the scores of calibration images."""

    def __init__(self, path: Path, reason: str) -> None:
        self.path = path
        super().__init__(f"{path.name} cannot be used: {reason}.")


class _Content(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    images: int
    scores: Annotated[list[float], Field(min_length=1)]


class CalibrationScores:
    """Hold the scores of benign images that nothing was fitted on, (n,), given in any order and kept ``ascending``.

    Raises ``ValueError`` when there are none, or one is not finite.
    """

    def __init__(self, scores: np.ndarray) -> None:
        if scores.ndim != 1 or not len(scores):
            raise ValueError(f"Expected the scores of at least one calibration image, (n,), got {scores.shape}.")
        if not np.isfinite(scores).all():
            raise ValueError("Every calibration score must be finite.")
        self.ascending = np.sort(scores.astype(np.float64))

    def __len__(self) -> int:
        return len(self.ascending)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what ``write_scores`` wrote; raises ``CalibrationUnreadable``."""
        try:
            content = _Content.model_validate_json(path.read_bytes())
        except ValidationError as error:
            raise CalibrationUnreadable(path, _told(error)) from error
        except OSError as error:
            raise CalibrationUnreadable(path, error.strerror or str(error)) from error
        scores = np.array(content.scores)
        if len(scores) != content.images:
            raise CalibrationUnreadable(path, f"expected the scores of {content.images} images, got {len(scores)}")
        falls = np.flatnonzero(np.diff(scores) < 0)
        if len(falls):
            before, after = scores[falls[0]], scores[falls[0] + 1]
            raise CalibrationUnreadable(path, f"expected ascending scores, got {after:g} after {before:g}")
        return cls(scores)

    def p_values(self, scores: np.ndarray) -> np.ndarray:
        """Return (N,) float64 how likely a benign image has a score as high as each of ``scores`` (N,), at most.

        It is (1 + how many of the n calibration scores are not below) / (n + 1), as ``defenses.calibration.p_values``:
        for a further benign image the probability that it comes out at most p is at most p, for every p.
        """
        not_below = len(self) - np.searchsorted(self.ascending, scores)
        p_values: np.ndarray = (1 + not_below) / (len(self) + 1)
        return p_values


def write_scores(scores: np.ndarray, path: Path) -> None:
    """Write the scores of a version's calibration images, (n,) in any order, for the gateway to answer p-values by.

    Raises ``ValueError`` when there are none, or one is not finite.
    """
    calibration = CalibrationScores(scores)
    path.write_text(json.dumps({"images": len(calibration), "scores": calibration.ascending.tolist()}))


def _told(error: ValidationError) -> str:
    fault = error.errors()[0]
    where = ".".join(str(part) for part in fault["loc"]) or "the file"
    return f"{where}: {fault['msg']}, got {reprlib.repr(fault['input'])}"
