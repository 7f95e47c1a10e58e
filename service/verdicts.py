"""From what a graph computed to what a client is told, by the model's mode."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from service.engines import Answers
from service.settings import Mode

Verdict = Literal["accepted", "alert", "undefended"]


@dataclass(frozen=True)
class Decision:
    """What N images get, row by row, and which of them are on record as alerts.

    ``alerted`` (N,) bool are the rows to record, also in shadow mode, where no client is told. ``protected_class``
    (N,) int64 is the protected answer whatever the client is told. In ``logits``, ``probabilities`` and ``purified``
    the rows withheld by ``enforce`` are zero, their ``class_index`` is -1 and their label None. ``p_values`` (N,) are
    zero, which no p-value is, where nothing defended. ``told`` (N,) bool are the alerted rows whose client is told.
    """

    verdicts: tuple[Verdict, ...]
    labels: tuple[str | None, ...]
    class_index: np.ndarray
    logits: np.ndarray
    probabilities: np.ndarray
    alerted: np.ndarray
    told: np.ndarray
    protected_class: np.ndarray
    scores: np.ndarray | None
    p_values: np.ndarray | None
    undefended_class_index: np.ndarray | None
    purified: np.ndarray | None

    def __getitem__(self, rows: slice) -> "Decision":
        return Decision(*(None if column is None else column[rows] for column in self._columns))  # type: ignore[arg-type]

    @property
    def _columns(self) -> tuple[Any, ...]:
        """The fields in order."""
        return (
            *(self.verdicts, self.labels, self.class_index, self.logits, self.probabilities),
            *(self.alerted, self.told, self.protected_class),
            *(self.scores, self.p_values, self.undefended_class_index, self.purified),
        )


def failed_rows(answers: Answers) -> np.ndarray:
    """Return (N,) which rows hold a number that is not finite: there the defense itself failed."""
    told = (answers.logits, answers.undefended_logits, answers.scores, answers.purified)
    failed = np.zeros(len(answers.logits), bool)
    for values in told:
        if values is not None:
            failed |= ~np.isfinite(values.reshape(len(values), -1)).all(1)
    return failed


def decide(
    answers: Answers,
    mode: Mode,
    labels: Sequence[str],
    *,
    p_values: np.ndarray | None,
    undefended: np.ndarray,
) -> Decision:
    """Turn answers into a decision.

    ``p_values`` (N,) are those of the answers' scores, if known. ``undefended`` (N,) bool marks the rows that hold the
    bare classifier's answer because nothing defends them.
    """
    alerts = np.zeros(len(answers.logits), bool) if answers.alerts is None else answers.alerts & ~undefended
    bare = answers.undefended_logits
    shadow = mode == "shadow" and bare is not None
    logits = bare if shadow and bare is not None else answers.logits
    told = alerts & (not shadow)
    withheld = told & (mode == "enforce")
    class_index = np.where(withheld, -1, logits.argmax(1)).astype(np.int64)
    return Decision(
        verdicts=tuple(
            "undefended" if bare_only else "alert" if alert else "accepted"
            for bare_only, alert in zip(undefended.tolist(), told.tolist(), strict=True)
        ),
        labels=tuple(None if index < 0 else labels[index] for index in class_index.tolist()),
        class_index=class_index,
        logits=blank(logits, withheld),
        probabilities=blank(_softmax(logits), withheld),
        alerted=alerts,
        told=told,
        protected_class=answers.logits.argmax(1).astype(np.int64),
        scores=answers.scores,
        p_values=None if p_values is None else blank(p_values, undefended),
        undefended_class_index=None if bare is None else bare.argmax(1).astype(np.int64),
        purified=None if answers.purified is None else blank(answers.purified, withheld),
    )


def _softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits - logits.max(1, keepdims=True))
    probabilities: np.ndarray = exponentials / exponentials.sum(1, keepdims=True)
    return probabilities


def blank(values: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return values (N, ...) with the given rows, (N,) bool, zero."""
    if rows.any():
        values = values.copy()
        values[rows] = 0
    return values
