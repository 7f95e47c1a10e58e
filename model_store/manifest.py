"""What is recorded about a model: the draft its publisher writes and the manifest that the store completes."""

import json
import re
from datetime import UTC, datetime
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, JsonValue, model_validator

MANIFEST_FILE = "manifest.json"

_PATH = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)*")
_CHANNELS = {"RGB": 3, "L": 1}


def check_path(path: str) -> str:
    """Return a payload path, or raise ValueError: relative, with '/', of plain names that do not begin with '.'."""
    if not _PATH.fullmatch(path):
        raise ValueError(
            f"the path {path!r} should be relative, joined by '/', of names made of ASCII letters, digits, "
            "'.', '_' and '-' that begin with a letter, a digit or '_'"
        )
    if path == MANIFEST_FILE:
        raise ValueError(f"the name {MANIFEST_FILE!r} is the store's own")
    return path


Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Rate = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
VersionNumber = Annotated[int, Field(ge=1)]
PayloadPath = Annotated[str, AfterValidator(check_path)]
UtcDatetime = Annotated[AwareDatetime, AfterValidator(lambda moment: moment.astimezone(UTC))]


class Record(BaseModel):
    """Part of a manifest: immutable, no unknown field, no number that JSON cannot hold (NaN, infinity)."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class FileRecord(Record):
    """Size in bytes and SHA-256 of one published file."""

    sha256: Sha256
    size: Count


class Parent(Record):
    """The classifier a defense was fitted for; `digest` is the SHA-256 of that version's manifest."""

    name: str
    version: VersionNumber
    digest: Sha256


class Normalisation(Record):
    """Per-channel mean and standard deviation, in the range of the input. Part of the graph, recorded to be known."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if any(value <= 0 for value in self.std):
            raise ValueError(f"every standard deviation should be above 0, but they are {self.std}")
        return self


class InputSpec(Record):
    """What one image is to the model: shape (C, H, W), range of its values, image mode and how it is resized."""

    shape: tuple[int, int, int]
    dtype: str = "float32"
    range: tuple[float, float] = (0.0, 1.0)
    normalisation: Normalisation | None = None
    mode: Literal["RGB", "L"]
    resize: Literal["bilinear", "bicubic"] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if min(self.shape) < 1:
            raise ValueError(f"the shape (C, H, W) should be of sizes of at least 1, but it is {self.shape}")
        channels = self.shape[0]
        if channels != _CHANNELS[self.mode]:
            raise ValueError(
                f"mode {self.mode!r} has {_CHANNELS[self.mode]} channel(s), but the shape {self.shape} has {channels}"
            )
        if self.range[0] >= self.range[1]:
            raise ValueError(f"the range should be a lower and a higher value, but it is {self.range}")
        if self.normalisation and {len(self.normalisation.mean), len(self.normalisation.std)} != {channels}:
            raise ValueError(
                f"the normalisation should have {channels} mean(s) and standard deviation(s), but it has "
                f"{len(self.normalisation.mean)} and {len(self.normalisation.std)}"
            )
        return self


class FalsePositiveRate(Record):
    """The rate of clean images that may be alerted, and the one measured on images kept apart."""

    budget: Rate
    calibrated_on: Count
    realised: Rate | None
    evaluated_on: Count | None


class DataRecord(Record):
    """The data a model was fitted on: name, digest, seed of the split, images per split."""

    name: str
    digest: str
    split_seed: int
    counts: dict[str, Count]


class AttackRecord(Record):
    """An attack whose examples a defense was fitted on; `success_rate` is against the undefended classifier."""

    name: str
    parameters: dict[str, float | int | str | bool]
    examples: Count
    success_rate: Rate | None


Thresholds = Annotated[tuple[float, ...], Field(min_length=1)]
Label = Annotated[str, Field(min_length=1, max_length=512)]
"""A class's name; alerts keep it in a column with an end."""


class Draft(Record):
    """What a publisher says about a model; the store adds name, version, time and files.

    `layers` maps a role to a layer's name, `labels` are in the order of the logits, and `threshold` is the score
    above which an image is alerted: one for all, or one for each label that the protected classifier may answer (None:
    the defense has no detector).
    """

    kind: Literal["classifier", "regulator", "coophance", "nip", "baseline"]
    input: InputSpec
    labels: tuple[Label, ...]
    layers: dict[str, str] = {}
    parent: Parent | None = None
    threshold: float | Thresholds | None = None
    false_positive_rate: FalsePositiveRate | None = None
    data: DataRecord | None = None
    attacks: tuple[AttackRecord, ...] = ()
    metrics: dict[str, float] = {}
    options: dict[str, JsonValue] = {}
    libraries: dict[str, str] = {}
    seed: int | None = None
    command: str = ""

    @model_validator(mode="after")
    def _check_labels(self) -> Self:
        if not self.labels and self.kind != "regulator":
            raise ValueError(f"a model of kind {self.kind!r} should have at least one label, but it has none")
        return self

    @model_validator(mode="after")
    def _check_threshold(self) -> Self:
        if isinstance(self.threshold, tuple) and len(self.threshold) != len(self.labels):
            raise ValueError(
                f"a threshold for each label should be {len(self.labels)} numbers, but they are {len(self.threshold)}"
            )
        return self

    def threshold_of(self, class_index: int) -> float | None:
        """Return the score above which an image is alerted that is given this class, from 0."""
        return self.threshold[class_index] if isinstance(self.threshold, tuple) else self.threshold


class Manifest(Draft):
    """Everything known about one published version; `files` maps each payload path to its size and digest."""

    schema_version: Literal[1] = 1
    name: str
    version: VersionNumber
    created: UtcDatetime
    files: Annotated[dict[PayloadPath, FileRecord], Field(min_length=1)]

    @classmethod
    def of(cls, draft: Draft, name: str, version: int, created: datetime, files: dict[str, FileRecord]) -> Self:
        """Complete a draft, validating all of it again, since the dictionaries of a draft can change."""
        own = {"name": name, "version": version, "created": created, "files": files}
        return cls.model_validate(draft.model_dump() | own)

    def to_json(self) -> bytes:
        """Write the manifest as indented JSON in UTF-8, identity first; equal manifests give equal bytes."""
        fields = self.model_dump(mode="json")
        identity = {field: fields[field] for field in ("schema_version", "kind", "name", "version", "created")}
        return json.dumps(identity | fields, indent=2, ensure_ascii=False, allow_nan=False).encode() + b"\n"
