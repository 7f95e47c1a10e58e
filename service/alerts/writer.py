"""The alert writer: a bounded queue between the request's path and the log."""

import asyncio
import errno
import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Final, TypeVar

from service.alerts.errors import AlertLogUnavailable, AlertQueueFull, AlertsNotWritten, AlertWriterStopped
from service.alerts.log import AlertLog
from service.alerts.models import Alert, PendingAlert
from service.alerts.vault import Vault

_LOGGER = logging.getLogger(__name__)

_DISK_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})
# Seconds between the attempts to store an input; after the last one its alert is written without it.
_DISK_PAUSES: Final = (0.1, 0.5)
# Seconds between the attempts to write to the log: doubled from the first to the last, for as long as it takes.
_FIRST_LOG_PAUSE: Final = 0.1
_LAST_LOG_PAUSE: Final = 5.0
_PRUNE_SECONDS: Final = 60.0

_News = TypeVar("_News")


class AlertWriter:
    """Writes accepted alerts in the background, in order: first the inputs to the vault, then the rows to the log.

    `capacity` bounds the alerts that wait to be written, `capacity_bytes` the inputs they hold in memory. An alert
    leaves the queue when the log has it: a log that fails is tried again until it takes the batch. An input that the
    disk does not take costs its alert nothing but `image_kept`.
    `on_written` is told how many alerts each batch brought into the log, `on_error` each failure of the log or the
    disk; both are called on the event loop.
    """

    def __init__(
        self,
        log: AlertLog,
        vault: Vault,
        capacity: int,
        batch_size: int = 64,
        capacity_bytes: int = 256 * 2**20,
        on_written: Callable[[int], None] | None = None,
        on_error: Callable[[Exception], None] | None = None,
    ) -> None:
        self._log = log
        self._vault = vault
        self._capacity = capacity
        self._capacity_bytes = capacity_bytes
        self._batch_size = batch_size
        self._on_written = on_written
        self._on_error = on_error
        self._queue: deque[PendingAlert] = deque()
        self._queue_bytes = 0
        self._turn = asyncio.Lock()
        self._room = asyncio.Event()
        self._arrived = asyncio.Event()
        self._stopping = False
        self._drain_task: asyncio.Task[None] | None = None
        self._prune_task: asyncio.Task[None] | None = None

    @property
    def depth(self) -> int:
        """How many accepted alerts are not in the log yet."""
        return len(self._queue)

    async def start(self) -> None:
        """Start writing, and pruning the vault: now, every minute, and after every batch."""
        if self._drain_task is not None:
            raise RuntimeError("An alert writer starts once, and this one has been started before.")
        self._drain_task = asyncio.create_task(self._drain(), name="alert-writer")
        self._prune_task = asyncio.create_task(self._prune_periodically(), name="alert-pruner")

    async def submit(self, pending: Sequence[PendingAlert], timeout: float) -> None:  # noqa: ASYNC109
        """Hand over alerts, all or none, waiting up to `timeout` seconds for room; first come, first served.

        More alerts than the queue could ever hold are accepted once it is empty. Raises AlertQueueFull after the
        timeout, AlertWriterStopped before the start and after the stop.
        """
        if not pending:
            return
        size = sum(len(one.image) for one in pending)
        try:
            async with asyncio.timeout(timeout), self._turn:
                await self._wait_for_room(len(pending), size)
                self._queue.extend(pending)
                self._queue_bytes += size
                self._arrived.set()
        except TimeoutError:
            raise AlertQueueFull(len(pending), self.depth, self._capacity, timeout) from None

    async def stop(self, timeout: float = 30.0) -> None:  # noqa: ASYNC109
        """Accept nothing more and write everything that was accepted.

        Raises AlertsNotWritten after `timeout` seconds, once the statement under way has ended: on a locked SQLite file
        that is up to 5 s later.
        """
        self._stopping = True
        self._arrived.set()
        self._room.set()
        if self._drain_task is None or self._prune_task is None:
            return
        await asyncio.wait({self._drain_task}, timeout=timeout)
        for task in (self._drain_task, self._prune_task):
            task.cancel()
        await asyncio.gather(self._drain_task, self._prune_task, return_exceptions=True)
        if self._queue:
            _LOGGER.error(
                "%d alerts not written: %s", self.depth, ", ".join(pending.alert.id for pending in self._queue)
            )
            raise AlertsNotWritten(self.depth, timeout)

    async def _wait_for_room(self, count: int, size: int) -> None:
        while True:
            if self._stopping or self._drain_task is None or self._drain_task.done():
                raise AlertWriterStopped
            fits = self.depth + count <= self._capacity and self._queue_bytes + size <= self._capacity_bytes
            if fits or not self._queue:
                return
            self._room.clear()
            await self._room.wait()

    async def _drain(self) -> None:
        while batch := await self._next_batch():
            await self._write(batch)
            for pending in batch:
                self._queue.popleft()
                self._queue_bytes -= len(pending.image)
            self._room.set()
            _tell(self._on_written, len(batch))
            await self._prune()

    async def _next_batch(self) -> list[PendingAlert]:
        while not self._queue and not self._stopping:
            self._arrived.clear()
            await self._arrived.wait()
        return list(islice(self._queue, self._batch_size))

    async def _write(self, batch: Sequence[PendingAlert]) -> None:
        alerts: list[Alert] = []
        pause = _FIRST_LOG_PAUSE
        while True:
            try:
                if not alerts:
                    outcomes = await self._store_inputs(batch)
                    alerts = [_with_outcome(pending.alert, outcomes) for pending in batch]
                await self._log.add(alerts)
                return
            except Exception as error:  # whatever it was, these alerts are accepted and must not be lost
                trace = None if isinstance(error, AlertLogUnavailable) else error
                message = "%d alerts are not written yet, next attempt in %g s: %s"
                _LOGGER.warning(message, self.depth, pause, error, exc_info=trace)
                _tell(self._on_error, error)
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LAST_LOG_PAUSE)

    async def _store_inputs(self, batch: Sequence[PendingAlert]) -> dict[str, bool | OSError]:
        """Store the inputs of a batch, trying again where that may help; return by id what became of each."""
        outcomes: dict[str, bool | OSError] = {}
        waiting = batch
        for pause in (0.0, *_DISK_PAUSES):
            await asyncio.sleep(pause)
            outcomes |= await asyncio.to_thread(self._store_each, waiting)
            waiting = [pending for pending in waiting if _may_pass(outcomes[pending.alert.id])]
            if not waiting:
                break
        lost = {alert_id: outcome for alert_id, outcome in outcomes.items() if isinstance(outcome, OSError)}
        for alert_id, error in lost.items():
            _LOGGER.error("The input of the alert %s is not kept: %s", alert_id, error)
            _tell(self._on_error, error)
        return outcomes

    def _store_each(self, batch: Sequence[PendingAlert]) -> dict[str, bool | OSError]:
        return {pending.alert.id: self._store(pending.alert, pending.image) for pending in batch}

    def _store(self, alert: Alert, image: bytes) -> bool | OSError:
        try:
            return self._vault.store(alert.id, alert.created, alert.media_type, image)
        except OSError as error:
            return error

    async def _prune_periodically(self) -> None:
        while True:
            await self._prune()
            await asyncio.sleep(_PRUNE_SECONDS)

    async def _prune(self) -> None:
        try:
            await asyncio.to_thread(self._vault.prune)
        except Exception as error:  # a vault that cannot be pruned must not hold up the log
            _LOGGER.warning("The kept inputs could not be pruned: %s", error)
            _tell(self._on_error, error)


def _may_pass(outcome: bool | OSError) -> bool:
    return isinstance(outcome, OSError) and outcome.errno not in _DISK_FULL


def _with_outcome(alert: Alert, outcomes: Mapping[str, bool | OSError]) -> Alert:
    return alert.model_copy(update={"image_kept": outcomes[alert.id] is True})


def _tell(listener: Callable[[_News], None] | None, news: _News) -> None:
    # What watches the writer must not be able to stop it.
    if listener is None:
        return
    try:
        listener(news)
    except Exception:
        _LOGGER.exception("A listener of the alert writer failed.")
