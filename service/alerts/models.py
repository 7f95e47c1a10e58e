"""What an alert is: on its way to the log, in the log, and in a page of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Annotated, Final, Literal

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, FiniteFloat

from service.alerts.errors import MediaTypeUnsupported
from service.alerts.ids import check_alert_id

INPUT_SUFFIXES: Final[Mapping[str, str]] = MappingProxyType(
    {"image/png": ".png", "image/jpeg": ".jpg", "image/webp": ".webp", "application/x-npy": ".npy"}
)

Mode = Literal["flag", "enforce", "shadow"]


def _storable(text: str) -> str:
    # A text that the database can never take would hold up every alert behind it, so it is refused at the door.
    if "\0" in text:
        raise ValueError("a text of an alert must not hold the character NUL")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("a text of an alert must be valid Unicode, without lone surrogates")
    return text


def _supported(media_type: str) -> str:
    input_suffix(media_type)
    return media_type


def _in_utc(moment: datetime) -> datetime:
    try:
        return moment.astimezone(UTC)
    except OverflowError as error:
        raise ValueError("a moment must lie within the years 1 to 9999 in UTC") from error


# Indexed texts have an end: PostgreSQL refuses an index entry above about 2700 bytes.
Text = Annotated[str, Field(max_length=512), AfterValidator(_storable)]
Moment = Annotated[AwareDatetime, AfterValidator(_in_utc)]
Count = Annotated[int, Field(ge=0, lt=2**31)]
PValue = Annotated[FiniteFloat, Field(gt=0, le=1)]


def input_suffix(media_type: str) -> str:
    """Return the file suffix of a kept input, such as ".png". Raises MediaTypeUnsupported."""
    try:
        return INPUT_SUFFIXES[media_type]
    except KeyError:
        raise MediaTypeUnsupported(media_type, tuple(INPUT_SUFFIXES)) from None


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Alert(_Frozen):
    """One alerted image.

    Every value is checked here, since a value that the database refuses could never be written:
    pydantic.ValidationError (a ValueError) is raised for a score or threshold that is not finite, a p-value outside
    (0, 1], a naive time, a negative or oversized integer, a text above 512 characters or with NUL or lone surrogates,
    an unknown media type.
    """

    id: Annotated[str, AfterValidator(check_alert_id)]
    created: Moment
    model: Text
    version: Count
    request_id: Text
    index: Count = Field(description="Which image of the request, from 0.")
    client: Text
    class_index: Count = Field(description="The defended classifier's answer, even where the mode hides it.")
    label: Text
    undefended_class_index: Count | None = Field(default=None, description="The bare classifier's answer, if known.")
    score: FiniteFloat
    threshold: FiniteFloat
    p_value: PValue | None = Field(default=None, description="Of the score, where the version can tell.")
    mode: Mode
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$", description="Of the input as received.")]
    media_type: Annotated[str, AfterValidator(_supported)]
    image_kept: bool = Field(default=False, description="Whether the input was stored; it may have been pruned since.")
    status: Text = "new"
    seq: int | None = Field(default=None, description="Its place in the order of writing; None until it is written.")


@dataclass(frozen=True)
class PendingAlert:
    """An alert on its way to the log, with its input exactly as it was received (a tensor as .npy)."""

    alert: Alert
    image: bytes = field(repr=False)


class AlertFilter(_Frozen):
    """Which alerts to read: those that match everything given. `since` is included, `until` is not."""

    model: Text | None = None
    version: Count | None = None
    label: Text | None = None
    client: Text | None = None
    request_id: Text | None = None
    status: Text | None = None
    since: Moment | None = None
    until: Moment | None = None
    minimum_score: FiniteFloat | None = None
    maximum_p_value: PValue | None = None


class AlertPage(_Frozen):
    """Alerts, newest first. `next_cursor` is the `after` of the page that follows, None on the last page."""

    alerts: tuple[Alert, ...]
    next_cursor: int | None
