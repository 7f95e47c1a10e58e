"""One version in service: its graph, its queue, its mode."""

import asyncio
import logging
from pathlib import Path
from typing import Self

import numpy as np

from model_store import Fetched
from service.batching import Batcher, BatcherClosed, QueueFull
from service.correcting import CorrectingEngine
from service.engine import Answers, Engine, GraphUnloadable, outputs_of
from service.metrics import Metrics
from service.p_values import CALIBRATION, CalibrationScores
from service.settings import Settings
from service.verdicts import blank, failed_rows

logger = logging.getLogger("portcullis")

GRAPH = "model.onnx"

CORRECTION = "correction.onnx"
"""The second graph of a version that answers alerted images anew."""


class DefenseFailed(RuntimeError):
    """A defense gave no usable answer, and the bare one is not to be given in its place."""

    def __init__(self, model: str, images: int) -> None:
        self.model = model
        super().__init__(f"The defense of model {model!r} failed on {images} of the images; no answer is given.")


class ServedModel:
    """Answer for one version of a model.

    Opens the version's graph with what the mode and the disclosure need; raises the engine's ``GraphUnloadable`` and
    ``DeviceUnavailable``, and ``CalibrationUnreadable``. ``outputs`` are those of the graph that are computed, and
    ``p_value`` where the version holds the scores of its calibration images.
    """

    def __init__(self, fetched: Fetched, settings: Settings, metrics: Metrics) -> None:
        self.manifest = fetched.manifest
        self.digest = fetched.digest
        self.name = fetched.manifest.name
        self.version = fetched.manifest.version
        self.mode = settings.mode_of(self.name)
        self._metrics = metrics
        held = CALIBRATION in fetched.manifest.files
        self._calibration = CalibrationScores.load(fetched.folder / CALIBRATION) if held else None
        path = fetched.folder / GRAPH
        present = outputs_of(path)
        self.defended = "purified" in present
        wanted = [name for name in _wanted(self.mode, settings) if name in present]
        self._engine = self._opened(path, wanted, settings)
        self._bare = (
            Engine(path, ["undefended_logits"], device=settings.device, threads=settings.threads)
            if self.defended and (self.mode == "shadow" or settings.on_defense_error == "open")
            else None
        )
        if "alert" in wanted and fetched.manifest.threshold is None:
            raise GraphUnloadable(path, "it raises alerts, but its manifest holds no threshold.")
        self.outputs = frozenset([*wanted, "p_value"] if held and "score" in wanted else wanted)
        self._try_out(path)
        self._batcher = Batcher(
            self.name,
            self._engine.predict,
            max_batch=settings.max_batch,
            capacity=settings.queue_images,
            metrics=metrics,
        )
        self._info = (self.name, str(self.version), self.manifest.kind, self.mode, self.digest)

    def _opened(self, path: Path, outputs: list[str], settings: Settings) -> Engine | CorrectingEngine:
        """Open the version's graph, or both where it has a second one."""
        if CORRECTION not in self.manifest.files:
            return Engine(path, outputs, device=settings.device, threads=settings.threads, noise=settings.noise)
        return CorrectingEngine(
            path,
            path.with_name(CORRECTION),
            outputs,
            device=settings.device,
            threads=settings.threads,
            noise=settings.noise,
            failed=self._metrics.defense_errors.labels(self.name).inc,
        )

    def _try_out(self, path: Path) -> None:
        if isinstance(self._engine, CorrectingEngine):
            self._engine.try_out(self.manifest.input.shape, len(self.manifest.labels))
        try:
            answers = self._engine.predict(np.zeros((1, *self.manifest.input.shape), np.float32))
        except Exception as error:  # the runtime's own exceptions share no narrower ancestor
            raise GraphUnloadable(path, str(error).strip()) from error
        expected = (1, len(self.manifest.labels))
        if answers.logits.shape != expected:
            raise GraphUnloadable(
                path, f"expected logits of shape {expected} for its labels, got {answers.logits.shape}."
            )

    def start(self) -> Self:
        """Start to take images; call within a running event loop."""
        self._batcher.start()
        self._metrics.model_info.labels(*self._info).set(1)
        self._metrics.defense_errors.labels(self.name)  # shown as 0 until the first
        return self

    async def stop(self) -> None:
        """Answer what was taken, and end."""
        await self._batcher.stop()
        self._metrics.model_info.remove(*self._info)

    async def answer(self, images: np.ndarray) -> tuple[Answers, np.ndarray]:
        """Return the answers for images (N, C, H, W) in [0, 1], and (N,) which rows only the bare classifier answered.

        Raises ``QueueFull``, ``BatcherClosed``, and ``DefenseFailed`` when the defense fails and is to fail closed.
        """
        nobody = np.zeros(len(images), bool)
        try:
            answers = _joined(await self._batcher.submit(images))
        except (QueueFull, BatcherClosed, asyncio.CancelledError):
            raise
        except Exception:
            logger.exception("The defense of %s@%d raised an error.", self.name, self.version)
            return await self._instead(images, None, ~nobody)
        failed = failed_rows(answers)
        if failed.any():
            logger.error("%s@%d gave values that are not finite.", self.name, self.version)
            return await self._instead(images, answers, failed)
        return answers, nobody if self.defended else ~nobody

    def p_values(self, answers: Answers) -> np.ndarray | None:
        """Return the p-values (N,) of the answers' scores, or None where the version has none to offer."""
        if self._calibration is None or answers.scores is None:
            return None
        return self._calibration.p_values(answers.scores)

    async def _instead(
        self, images: np.ndarray, answers: Answers | None, failed: np.ndarray
    ) -> tuple[Answers, np.ndarray]:
        """Give the bare answer on the failed rows, score and purified image zero, or fail closed."""
        self._metrics.defense_errors.labels(self.name).inc(int(failed.sum()))
        if self._bare is None:
            raise DefenseFailed(self.name, int(failed.sum()))
        try:
            bare = (await asyncio.to_thread(self._bare.run, images))["undefended_logits"]
        except Exception as error:  # the runtime's own exceptions share no narrower ancestor
            raise DefenseFailed(self.name, int(failed.sum())) from error
        if not np.isfinite(bare[failed]).all():
            raise DefenseFailed(self.name, int(failed.sum()))
        if answers is None:
            scores = np.zeros(len(images), np.float32) if "score" in self.outputs else None
            purified = np.zeros_like(images) if "purified" in self.outputs else None
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
