"""One version in service: its graph, its queue, its mode."""

import asyncio
import logging
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Self, get_args

import numpy as np

from model_store import Fetched
from service.batching import Batcher, BatcherClosed, QueueFull
from service.cores import opened_in_cores
from service.correcting import CorrectingEngine
from service.engines import Answers, Engine, GraphUnloadable, outputs_of
from service.engines.opening import Source, open_source
from service.metrics import Metrics, ModelMetrics
from service.p_values import CALIBRATION, CalibrationScores
from service.settings import Settings
from service.verdicts import Decision, Verdict, blank, decide, failed_rows

logger = logging.getLogger("portcullis")

GRAPH = "model.onnx"

CORRECTION = "correction.onnx"
"""The second graph of a version that answers alerted images anew."""


class DefenseFailed(RuntimeError):
    """A defense gave no usable answer, and the bare one is not to be given in its place."""

    def __init__(self, model: str, images: int) -> None:
        self.model = model
        super().__init__(f"The defense of model {model!r} failed on {images} of the images; no answer is given.")


@dataclass(frozen=True, slots=True, eq=False)
class Judged:
    """The decision on some rows of a batch; none where a row of the batch failed, and each request needs its own.

    ``answers`` are those to the whole batch. On the rows of ``failed``, (N,) bool, the defense failed, and the answer
    is the bare classifier's where that is to be given.
    """

    answers: Answers
    failed: np.ndarray
    decision: Decision | None
    rows: slice

    def __getitem__(self, rows: slice) -> "Judged":
        return Judged(self.answers, self.failed, None if self.decision is None else self.decision[rows], rows)


class ServedModel:
    """Answer for one version of a model.

    Opens an engine with what the mode and the disclosure need, and runs it in every size of batch that it prepares for;
    raises ``GraphUnloadable``, ``VersionUnsuitable``, ``DeviceUnavailable`` and ``EngineUnavailable``, and
    ``CalibrationUnreadable``. ``outputs`` are those that are computed, and ``p_value`` where the version holds the
    scores of its calibration images.
    """

    def __init__(self, fetched: Fetched, settings: Settings, metrics: Metrics) -> None:
        self.manifest = fetched.manifest
        self.digest = fetched.digest
        self.name = fetched.manifest.name
        self.version = fetched.manifest.version
        self.mode = settings.mode_of(self.name)
        self._metrics = metrics
        self.metrics = ModelMetrics(metrics, self.name, str(self.version), get_args(Verdict))
        held = CALIBRATION in fetched.manifest.files
        self._calibration = CalibrationScores.load(fetched.folder / CALIBRATION) if held else None
        path = fetched.folder / GRAPH
        present = outputs_of(path)
        self.defended = "purified" in present
        wanted = [name for name in _wanted(self.mode, settings) if name in present]
        source, self._engine, lanes = opened_in_cores(
            settings,
            lambda chosen: open_source(fetched, path, path.with_name(CORRECTION), chosen),
            lambda source: self._opened(source, wanted),
            self.manifest.input.shape,
        )
        self._bare = (
            source.open(("undefended_logits",))
            if self.defended and (self.mode == "shadow" or settings.on_defense_error == "open")
            else None
        )
        if "alert" in wanted and fetched.manifest.threshold is None:
            raise GraphUnloadable(path, "it raises alerts, but its manifest holds no threshold.")
        self.outputs = frozenset([*wanted, "p_value"] if held and "score" in wanted else wanted)
        self._try_out(path)
        self._batcher = Batcher(
            self.name,
            self._judge,
            instead=self._judge_bare,
            max_batch=settings.max_batch,
            capacity=settings.queue_images,
            longest_wait=settings.batch_wait_seconds,
            metrics=metrics,
            lanes=lanes,
        )
        self._info = (self.name, str(self.version), self.manifest.kind, self.mode, self.digest)

    def _opened(self, source: Source, outputs: list[str]) -> Engine:
        """Open the version, and what corrects alerted images where it holds that and a client is told their answer."""
        if CORRECTION not in self.manifest.files or self.mode != "flag":
            return source.open(tuple(outputs))
        engine = CorrectingEngine(source, outputs, failed=self.metrics.defense_errors.inc)
        engine.try_out(self.manifest.input.shape, len(self.manifest.labels))
        return engine

    def _try_out(self, path: Path) -> None:
        """Run every engine once in each size that it prepares for, so that no request waits for a preparation."""
        shape, classes = self.manifest.input.shape, len(self.manifest.labels)
        engines = [(self._engine, "logits"), *([(self._bare, "undefended_logits")] if self._bare else [])]
        for engine, name, size in [(each, name, size) for each, name in engines for size in each.warm_up_sizes]:
            try:
                logits = engine.run(np.zeros((size, *shape), np.float32))[name]
            except Exception as error:  # the runtimes' own exceptions share no narrower ancestor
                raise GraphUnloadable(path, str(error).strip()) from error
            if logits.shape != (size, classes):
                expected = f"expected logits of shape {(size, classes)} for its labels"
                raise GraphUnloadable(path, f"{expected}, got {logits.shape}.")

    @property
    def platform(self) -> str:
        """What computes the answers to images, as the Open Inference Protocol names platforms."""
        return self._engine.platform

    def start(self) -> Self:
        """Start to take images; call within a running event loop."""
        self._batcher.start()
        self._metrics.model_info.labels(*self._info).set(1)
        return self

    async def stop(self) -> None:
        """Answer what was taken, and end."""
        await self._batcher.stop()
        self._metrics.model_info.remove(*self._info)

    def check_room(self, images: int) -> None:
        """Raise ``QueueFull`` or ``BatcherClosed`` where so many images would not be taken now."""
        self._batcher.check_room(images)

    def coming(self) -> AbstractContextManager[None]:
        """Say that a request for this model is being decoded within the block."""
        return self._batcher.coming()

    async def decide(self, images: np.ndarray, deadline: float = float("inf")) -> Decision:
        """Return the decision on images (N, C, H, W), uint8 or float32 in [0, 1].

        Raises ``QueueFull``, ``BatcherClosed``, ``TimeoutError`` when the images still wait at ``deadline``, a time of
        ``time.monotonic``, and ``DefenseFailed`` when the defense fails and is to fail closed.
        """
        try:
            pieces = await self._batcher.submit(images, deadline)
        except (QueueFull, BatcherClosed, TimeoutError, asyncio.CancelledError):
            raise
        except Exception as error:
            self.metrics.defense_errors.inc(len(images))
            logger.exception("The defense of %s@%d raised an error.", self.name, self.version)
            raise DefenseFailed(self.name, len(images)) from error
        if len(pieces) == 1 and pieces[0].decision is not None:
            return pieces[0].decision
        answers = _joined([piece.answers[piece.rows] for piece in pieces])
        failed = np.concatenate([piece.failed[piece.rows] for piece in pieces])
        if failed.any():
            self.metrics.defense_errors.inc(int(failed.sum()))
            if self._bare is None or not np.isfinite(answers.logits[failed]).all():
                raise DefenseFailed(self.name, int(failed.sum()))
        return self._decision(answers, failed)

    def _judge(self, images: np.ndarray) -> Judged:
        """Answer a whole batch and decide on it at once, which costs little more than for one image."""
        answers = self._engine.predict(images)
        failed = failed_rows(answers)
        if not failed.any():
            return Judged(answers, failed, self._decision(answers, failed), slice(len(failed)))
        logger.error("%s@%d gave values that are not finite.", self.name, self.version)
        if self._bare is not None:
            answers = _with_bare(answers, failed, self._bare.run(images[failed])["undefended_logits"])
        return Judged(answers, failed, None, slice(len(failed)))

    def _judge_bare(self, images: np.ndarray, error: Exception) -> Judged:
        """Give the bare answer to images that the defense failed on, where it is to be given, else raise the error."""
        if self._bare is None:
            raise error
        logger.error("The defense of %s@%d raised an error.", self.name, self.version, exc_info=error)
        bare, failed = self._bare.run(images)["undefended_logits"], np.ones(len(images), bool)
        answers = _with_bare(_zeros(self.outputs, images, bare.shape[1]), failed, bare)
        return Judged(answers, failed, None, slice(len(failed)))

    def _decision(self, answers: Answers, bare: np.ndarray) -> Decision:
        """Decide on answers of which the rows of ``bare``, (N,) bool, are the bare classifier's."""
        scored = self._calibration is not None and answers.scores is not None
        return decide(
            answers,
            self.mode,
            self.manifest.labels,
            p_values=self._calibration.p_values(answers.scores) if scored else None,  # type: ignore[union-attr, arg-type]
            undefended=bare if self.defended else np.ones(len(answers.logits), bool),
        )


def _zeros(outputs: frozenset[str], images: np.ndarray, classes: int) -> Answers:
    """Return answers of zeros to images (N, C, H, W), with the outputs that a version computes."""
    count, *shape = images.shape
    zeros = {
        "logits": np.zeros((count, classes), np.float32),
        "score": np.zeros(count, np.float32),
        "alert": np.zeros(count, bool),
        "undefended_logits": np.zeros((count, classes), np.float32),
        "purified": np.zeros((count, *shape), np.float32),
    }
    return Answers.of({name: values for name, values in zeros.items() if name in outputs})


def _with_bare(answers: Answers, failed: np.ndarray, bare: np.ndarray) -> Answers:
    """Return answers with the bare classifier's on the failed rows, (N,) bool: alert, score and purified image zero.

    ``bare`` (M, K) are its logits on these rows.
    """
    logits = answers.logits.copy()
    logits[failed] = bare
    undefended = answers.undefended_logits
    if undefended is not None:
        undefended = undefended.copy()
        undefended[failed] = bare
    others = (answers.scores, answers.alerts, answers.purified)
    scores, alerts, purified = (None if values is None else blank(values, failed) for values in others)
    return Answers(logits, scores, alerts, undefended, purified)


def _wanted(mode: str, settings: Settings) -> list[str]:
    wanted = ["logits", "score", "alert"]
    if mode == "shadow" or settings.undefended_answer:
        wanted.append("undefended_logits")
    if settings.disclosure == "all":
        wanted.append("purified")
    return wanted


def _joined(pieces: list[Answers]) -> Answers:
    if len(pieces) == 1:
        return pieces[0]
    columns = zip(*(piece.columns for piece in pieces), strict=True)
    return Answers(*(None if column[0] is None else np.concatenate(column) for column in columns))  # type: ignore[arg-type]
