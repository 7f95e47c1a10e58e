"""What can go wrong with alerts.

AlertError
  AlertNotFound          no alert has this id (KeyError)
  ImageNotKept           the input of this alert is not on disk (FileNotFoundError)
  AlertIdInvalid         not an id made by `new_alert_id` (ValueError)
  MediaTypeUnsupported   an input of this kind is not kept (ValueError)
  PageInvalid            a cursor or a page size out of range (ValueError)
  DatabaseUnsuitable     the database's URL cannot hold an alert log (ValueError)
  AlertLogUnavailable    the database does not answer, or refuses (ConnectionError)
  AlertQueueFull         no room for new alerts in the time given (asyncio.QueueFull)
  AlertWriterStopped     the writer accepts nothing: not started, or stopping (RuntimeError)
  AlertsNotWritten       the writer's deadline came before its queue was empty (RuntimeError)
"""

import asyncio


class AlertError(Exception):
    """The root of this package's errors; its text is one full sentence."""

    def __str__(self) -> str:
        return str(self.args[0])


class AlertNotFound(AlertError, KeyError):
    """No alert has this id."""

    def __init__(self, alert_id: str) -> None:
        super().__init__(f"There is no alert with the id {alert_id!r}.")
        self.alert_id = alert_id


class ImageNotKept(AlertError, FileNotFoundError):
    """The input of this alert was never kept, or has been pruned since."""

    def __init__(self, alert_id: str) -> None:
        super().__init__(f"The input of the alert {alert_id!r} is not kept: it was never stored, or has been pruned.")
        self.alert_id = alert_id


class AlertIdInvalid(AlertError, ValueError):
    """An alert's id must be a canonical UUID of version 7."""

    def __init__(self, alert_id: str) -> None:
        super().__init__(f"An alert's id is a UUID of version 7 in lower case with hyphens, not {alert_id!r}.")
        self.alert_id = alert_id


class MediaTypeUnsupported(AlertError, ValueError):
    """Inputs of this media type are not kept."""

    def __init__(self, media_type: str, supported: tuple[str, ...]) -> None:
        super().__init__(f"An alert's input is kept as one of {', '.join(supported)}, not as {media_type!r}.")
        self.media_type = media_type
        self.supported = supported


class PageInvalid(AlertError, ValueError):
    """A page of alerts was asked for with a cursor or a size out of range."""

    def __init__(self, name: str, value: int, lowest: int) -> None:
        super().__init__(f"A page of alerts needs {name} from {lowest} to 2**63 - 1, not {value}.")
        self.name = name
        self.value = value


class DatabaseUnsuitable(AlertError, ValueError):
    """This database's URL cannot hold an alert log."""

    def __init__(self, database_url: str, reason: str) -> None:
        super().__init__(f"The alert log cannot live in {database_url}: {reason}.")
        self.database_url = database_url
        self.reason = reason


class AlertLogUnavailable(AlertError, ConnectionError):
    """The alert log's database does not answer, or refuses what is asked."""

    def __init__(self, action: str, reason: str) -> None:
        super().__init__(f"The alert log could not be {action}: {reason.rstrip('.')}.")
        self.action = action
        self.reason = reason


class AlertQueueFull(AlertError, asyncio.QueueFull):
    """The writer had no room for these alerts within the time given; none of them was accepted."""

    def __init__(self, count: int, depth: int, capacity: int, timeout: float) -> None:
        super().__init__(
            f"No room for {count} more alerts within {timeout:g} s: {depth} are waiting to be written, "
            f"and the queue holds {capacity} alerts and a bounded number of bytes."
        )
        self.count = count
        self.depth = depth
        self.capacity = capacity
        self.timeout = timeout


class AlertWriterStopped(AlertError, RuntimeError):
    """The writer accepts no alerts: it was not started, or it is stopping or has stopped."""

    def __init__(self) -> None:
        super().__init__("The alert writer accepts alerts only between its start and its stop.")


class AlertsNotWritten(AlertError, RuntimeError):
    """The writer stopped before everything it had accepted was written."""

    def __init__(self, count: int, timeout: float) -> None:
        super().__init__(f"{count} accepted alerts were not confirmed as written within {timeout:g} s of stopping.")
        self.count = count
        self.timeout = timeout
