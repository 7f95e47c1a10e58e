"""What happens to one request's images: answer, decide, record."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from time import perf_counter
from typing import Self

import numpy as np

from service.alerts import Alert, AlertLog, AlertWriter, PendingAlert, Vault, new_alert_id
from service.metrics import Metrics
from service.repository import Repository
from service.served import ServedModel
from service.settings import Settings
from service.verdicts import Decision, decide


@dataclass(frozen=True)
class Caller:
    """Say who asks: the request's id and the client's address."""

    request_id: str
    client: str

    def known_as(self, request_id: str) -> Self:
        """Return the caller under the id that its message bears, as far as that is fit to be kept and sent back."""
        fit = "".join(character for character in request_id[:128] if character.isascii() and character.isprintable())
        return replace(self, request_id=fit or self.request_id)


@dataclass(frozen=True)
class ReceivedInput:
    """An input exactly as received, kept in case it is alerted."""

    data: bytes
    media_type: str


Received = Callable[[], ReceivedInput]
"""How to get at one image's input as it was received; only called when it is alerted."""


class RequestTimedOut(TimeoutError):
    """A request took longer than it may."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"The request was given up after {seconds:g} s.")


@dataclass(frozen=True)
class Gateway:
    """The parts of a running gateway."""

    settings: Settings
    metrics: Metrics
    repository: Repository
    log: AlertLog
    vault: Vault
    writer: AlertWriter

    @asynccontextmanager
    async def request(self, model: ServedModel) -> AsyncIterator[None]:
        """Time and count one inference request; raises ``RequestTimedOut`` in its block when it takes too long."""
        start, outcome = perf_counter(), "ok"
        try:
            async with asyncio.timeout(self.settings.request_seconds):
                yield
        except TimeoutError as error:
            outcome = RequestTimedOut.__name__
            raise RequestTimedOut(self.settings.request_seconds) from error
        except BaseException as error:
            outcome = type(error).__name__
            raise
        finally:
            self.metrics.requests.labels(model.name, str(model.version), outcome).inc()
            self.metrics.request_seconds.labels(model.name).observe(perf_counter() - start)

    async def predict(
        self, model: ServedModel, images: np.ndarray, received: Sequence[Received], caller: Caller
    ) -> Decision:
        """Return the decision on images (N, C, H, W) in [0, 1], with its alerts accepted by the writer.

        Raises what ``ServedModel.answer`` raises, and ``AlertQueueFull``: an answer that tells of an alert is only
        given once that alert is in the writer's hands.
        """
        answers, undefended = await model.answer(images)
        ids = [new_alert_id() for _ in images]
        decision = decide(
            answers,
            model.mode,
            model.manifest.labels,
            p_values=model.p_values(answers),
            undefended=undefended,
            alert_ids=ids,
        )
        await self._record(model, decision, ids, received, caller)
        self._count(model, decision)
        return decision

    async def _record(
        self, model: ServedModel, decision: Decision, ids: Sequence[str], received: Sequence[Received], caller: Caller
    ) -> None:
        rows = np.flatnonzero(decision.alerted).tolist()
        if not rows:
            return
        now = datetime.now(UTC)

        def pend() -> list[PendingAlert]:
            return [_pending(model, decision, ids[row], row, received[row](), caller, now) for row in rows]

        await self.writer.submit(await asyncio.to_thread(pend), self.settings.alert_wait_seconds)

    def _count(self, model: ServedModel, decision: Decision) -> None:
        metrics = self.metrics
        for verdict in decision.verdicts:
            metrics.predictions.labels(model.name, verdict).inc()
        if decision.scores is not None:
            for score, verdict in zip(decision.scores.tolist(), decision.verdicts, strict=True):
                if verdict != "undefended":
                    metrics.scores.labels(model.name).observe(score)
        for index in decision.protected_class[decision.alerted].tolist():
            metrics.alerts.labels(model.name, model.manifest.labels[index]).inc()
        if decision.undefended_class_index is not None:
            changed = int((decision.undefended_class_index != decision.protected_class).sum())
            metrics.label_changes.labels(model.name).inc(changed)


def _pending(
    model: ServedModel, decision: Decision, id: str, row: int, kept: ReceivedInput, caller: Caller, now: datetime
) -> PendingAlert:
    scores, p_values, bare = decision.scores, decision.p_values, decision.undefended_class_index
    predicted = int(decision.protected_class[row])
    threshold = model.manifest.threshold_of(predicted)
    assert scores is not None, "an alert has a score"
    assert threshold is not None, "an alert has a threshold"
    alert = Alert(
        id=id,
        created=now,
        model=model.name,
        version=model.version,
        request_id=caller.request_id,
        index=row,
        client=caller.client,
        class_index=predicted,
        label=model.manifest.labels[predicted],
        undefended_class_index=None if bare is None else int(bare[row]),
        score=float(scores[row]),
        threshold=threshold,
        p_value=None if p_values is None else float(p_values[row]),
        mode=model.mode,
        sha256=hashlib.sha256(kept.data).hexdigest(),
        media_type=kept.media_type,
    )
    return PendingAlert(alert, kept.data)
