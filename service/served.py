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

    ``answers`` are those to the whole batch.
    """

    answers: Answers
    decision: Decision | None
    rows: slice

    def __getitem__(self, rows: slice) -> "Judged":
        return Judged(self.answers, None if self.decision is None else self.decision[rows], rows)


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
        source = open_source(fetched, path, path.with_name(CORRECTION), settings)
        self._engine = self._opened(source, wanted)
        self._bare = (
            source.open(("undefended_logits",))
            if self.defended and (self.mode == "shadow" or settings.on_defense_error == "open")
            else None
        )
        self._bare_turn = asyncio.Semaphore()
        if "alert" in wanted and fetched.manifest.threshold is None:
            raise GraphUnloadable(path, "it raises alerts, but its manifest holds no threshold.")
        self.outputs = frozenset([*wanted, "p_value"] if held and "score" in wanted else wanted)
        self._try_out(path)
        self._batcher = Batcher(
            self.name,
            self._judge,
            max_batch=settings.max_batch,
            capacity=settings.queue_images,
            longest_wait=settings.batch_wait_seconds,
            metrics=metrics,
        )
        self._info = (self.name, str(self.version), self.manifest.kind, self.mode, self.digest)

    def _opened(self, source: Source, outputs: list[str]) -> Engine:
        """Open the version, and what corrects alerted images where it holds that."""
        if CORRECTION not in self.manifest.files:
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
        """Return the decision on images (N, C, H, W) in [0, 1].

        Raises ``QueueFull``, ``BatcherClosed``, ``TimeoutError`` when the images still wait at ``deadline``, a time of
        ``time.monotonic``, and ``DefenseFailed`` when the defense fails and is to fail closed.
        """
        try:
            pieces = await self._batcher.submit(images, deadline)
        except (QueueFull, BatcherClosed, TimeoutError, asyncio.CancelledError):
            raise
        except Exception:
            logger.exception("The defense of %s@%d raised an error.", self.name, self.version)
            return self._decision(*await self._instead(images, None, np.ones(len(images), bool)))
        if len(pieces) == 1 and pieces[0].decision is not None:
            return pieces[0].decision
        answers = _joined([piece.answers[piece.rows] for piece in pieces])
        failed = failed_rows(answers)
        if failed.any():
            logger.error("%s@%d gave values that are not finite.", self.name, self.version)
            return self._decision(*await self._instead(images, answers, failed))
        return self._decision(answers, failed)

    def _judge(self, images: np.ndarray) -> Judged:
        """Answer a whole batch and decide on it at once, which costs little more than for one image."""
        answers = self._engine.predict(images)
        failed = failed_rows(answers)
        return Judged(answers, None if failed.any() else self._decision(answers, failed), slice(len(failed)))

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

    async def _instead(
        self, images: np.ndarray, answers: Answers | None, failed: np.ndarray
    ) -> tuple[Answers, np.ndarray]:
        """Give the bare answer on the failed rows, score and purified image zero, or fail closed."""
        self.metrics.defense_errors.inc(int(failed.sum()))
        if self._bare is None:
            raise DefenseFailed(self.name, int(failed.sum()))
        try:
            # One at a time, as in the model's own thread: a defense that fails is no way past its queue.
            async with self._bare_turn:
                bare = (await asyncio.to_thread(self._bare.run, images))["undefended_logits"]
        except Exception as error:  # the runtime's own exceptions share no narrower ancestor
            raise DefenseFailed(self.name, int(failed.sum())) from error
        if not np.isfinite(bare[failed]).all():
            raise DefenseFailed(self.name, int(failed.sum()))
        if answers is None:
            scores = np.zeros(len(images), np.float32) if "score" in self.outputs else None
            purified = np.zeros(images.shape, np.float32) if "purified" in self.outputs else None
            return Answers(bare, scores, undefended_logits=bare, purified=purified), failed
        logits = np.where(failed[:, None], bare, answers.logits)
        scores = None if answers.scores is None else blank(answers.scores, failed)
        purified = None if answers.purified is None else blank(answers.purified, failed)
        return Answers(logits, scores, answers.alerts, bare, purified), failed


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
