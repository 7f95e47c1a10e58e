"""What happens to one request's images: answer, decide, record."""

import asyncio
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Self

import numpy as np
from starlette.types import Receive

from service.alerts import Alert, AlertLog, AlertWriter, PendingAlert, Vault, new_alert_id
from service.body_limit import BodyBudget
from service.deadlines import TimedRequest
from service.decoding import Decoder
from service.departures import Departures
from service.metrics import Metrics
from service.repository import Repository
from service.served import ServedModel
from service.settings import Settings
from service.verdicts import Decision

SMALL_INPUTS = 2**16
"""Alerted inputs of at most so many values in all are hashed and packed on the event loop, larger ones off it."""

AlertIds = tuple[str | None, ...]
"""The alerts of N images by id; None where there is none, or the client is not told."""


@dataclass(frozen=True)
class Caller:
    """Say who asks: the request's id, the client's address, and the connection to hear from it."""

    request_id: str
    client: str
    receive: Receive

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


@dataclass(frozen=True)
class Gateway:
    """The parts of a running gateway."""

    settings: Settings
    metrics: Metrics
    repository: Repository
    log: AlertLog
    vault: Vault
    writer: AlertWriter
    decoder: Decoder
    departures: Departures
    bodies: BodyBudget

    def request(self, model: ServedModel) -> TimedRequest:
        """Time, count and bound one inference request."""
        return TimedRequest(model.metrics, self.settings.request_seconds)

    @contextmanager
    def decoding(self, model: ServedModel, caller: Caller) -> Iterator[None]:
        """Let a request be decoded in a thread within the block: company that a batch of the model may wait for.

        Raises ``ClientDisconnect`` in the block when the client goes.
        """
        with model.coming(), self.departures.stay(caller.receive):
            yield

    async def predict(
        self, model: ServedModel, images: np.ndarray, received: Sequence[Received], caller: Caller, deadline: float
    ) -> tuple[Decision, AlertIds]:
        """Return the decision on images and its alerts' ids, accepted by the writer.

        Images are (N, C, H, W), uint8 or float32 in [0, 1].

        Raises what ``ServedModel.decide`` raises, ``ClientDisconnect``, and ``AlertQueueFull``: an answer that tells of
        an alert is only given once that alert is in the writer's hands.
        """
        with self.departures.stay(caller.receive):
            decision = await model.decide(images, deadline)
        ids: AlertIds = (None,) * len(images)
        if decision.alerted.any():
            ids = await self._record(model, decision, received, caller)
        self._count(model, decision)
        return decision, ids

    async def _record(
        self, model: ServedModel, decision: Decision, received: Sequence[Received], caller: Caller
    ) -> AlertIds:
        """Hand every alert to the writer; return the ids, one place a row, of those that the client is told of."""
        ids = {row: new_alert_id() for row in np.flatnonzero(decision.alerted).tolist()}
        now = datetime.now(UTC)

        def pend() -> list[PendingAlert]:
            return [_pending(model, decision, id, row, received[row](), caller, now) for row, id in ids.items()]

        size = len(ids) * math.prod(model.manifest.input.shape)
        pending = pend() if size <= SMALL_INPUTS else await asyncio.to_thread(pend)
        await self.writer.submit(pending, self.settings.alert_wait_seconds)
        return tuple(ids.get(row) if told else None for row, told in enumerate(decision.told.tolist()))

    def _count(self, model: ServedModel, decision: Decision) -> None:
        metrics = model.metrics
        for verdict in decision.verdicts:
            metrics.predictions[verdict].inc()
        if decision.scores is not None:
            for score, verdict in zip(decision.scores.tolist(), decision.verdicts, strict=True):
                if verdict != "undefended":
                    metrics.scores.observe(score)
        if decision.alerted.any():
            for index in decision.protected_class[decision.alerted].tolist():
                self.metrics.alerts.labels(model.name, model.manifest.labels[index]).inc()
        if decision.undefended_class_index is not None:
            changed = int((decision.undefended_class_index != decision.protected_class).sum())
            metrics.label_changes.inc(changed)


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
