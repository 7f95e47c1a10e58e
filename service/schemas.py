"""The JSON that the gateway's own routes answer."""

from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Literal

from pydantic import BaseModel, Field

from service.alerts import AlertFilter
from service.settings import Mode
from service.verdicts import Verdict


class ErrorBody(BaseModel):
    """The body of every error."""

    error: str


@dataclass
class Prediction:
    """One image's answer; what the gateway does not disclose, or withholds under ``enforce``, is null."""

    label: str | None
    class_index: int | None
    probabilities: list[float] | None
    verdict: Verdict
    alert_id: str | None
    score: float | None
    p_value: float | None
    undefended_label: str | None


@dataclass
class Predictions:
    """The answers to one request's images, in order."""

    model: str
    version: str
    predictions: list[Prediction]


class ModelInfo(BaseModel):
    """What is in service, how it is protected, and what it was measured to do.

    ``default`` marks the version that a call without one gets. ``threshold`` is one for all, or one for each label that
    the protected classifier may answer.
    """

    name: str
    version: str
    default: bool
    kind: str
    mode: Mode
    defended: bool
    threshold: float | tuple[float, ...] | None
    false_positive_rate_budget: float | None
    false_positive_rate_realised: float | None
    metrics: dict[str, float]
    input_shape: tuple[int, int, int]
    labels: tuple[str, ...]
    digest: str
    created: datetime


class Models(BaseModel):
    """Everything in service."""

    models: list[ModelInfo]


class RepositoryEntry(BaseModel):
    """One model in the repository index."""

    name: str
    version: str
    state: Literal["READY", "UNAVAILABLE"]
    reason: str


class AlertQuery(AlertFilter):
    """Which alerts to list, and which page of them."""

    after: Annotated[int | None, Field(ge=0, lt=2**63, description="The `next` of the page before.")] = None
    limit: Annotated[int, Field(ge=1, le=1000)] = 100


class AlertRow(BaseModel):
    """One alert as operators see it."""

    id: str
    seq: int
    created: datetime
    model: str
    version: int
    request_id: str
    index: int
    client: str
    class_index: int
    label: str
    undefended_class_index: int | None
    score: float
    threshold: float
    p_value: float | None
    mode: Mode
    sha256: str
    media_type: str
    image_kept: bool
    status: str


class AlertRows(BaseModel):
    """A page of alerts, newest first; ``next`` is the cursor of the following page, null on the last."""

    alerts: list[AlertRow]
    next: int | None
