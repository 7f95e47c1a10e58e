"""The alert log: one row per alerted image, and the image as it was received, written off the request's own time."""

from service.alerts.errors import (
    AlertError,
    AlertIdInvalid,
    AlertLogUnavailable,
    AlertNotFound,
    AlertQueueFull,
    AlertsNotWritten,
    AlertWriterStopped,
    DatabaseUnsuitable,
    ImageNotKept,
    MediaTypeUnsupported,
    PageInvalid,
)
from service.alerts.ids import new_alert_id
from service.alerts.log import AlertLog
from service.alerts.models import Alert, AlertFilter, AlertPage, PendingAlert
from service.alerts.vault import Vault
from service.alerts.writer import AlertWriter

__all__ = [
    "Alert",
    "AlertError",
    "AlertFilter",
    "AlertIdInvalid",
    "AlertLog",
    "AlertLogUnavailable",
    "AlertNotFound",
    "AlertPage",
    "AlertQueueFull",
    "AlertWriter",
    "AlertWriterStopped",
    "AlertsNotWritten",
    "DatabaseUnsuitable",
    "ImageNotKept",
    "MediaTypeUnsupported",
    "PageInvalid",
    "PendingAlert",
    "Vault",
    "new_alert_id",
]
