"""What a manifest accepts, and that it survives being written and read."""

import json
import math
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from pydantic import ValidationError

from model_store import Draft, FileRecord, InputSpec, Manifest

CREATED = datetime(2026, 11, 20, 13, 30, 0, 250000, timezone(timedelta(hours=2)))
FILES = {"model.onnx": FileRecord(sha256="0f" * 32, size=12)}


def test_a_manifest_reads_back_equal_and_writes_the_same_bytes(draft: Draft) -> None:
    manifest = Manifest.of(draft, "cifar10", 3, CREATED, FILES)
    again = Manifest.model_validate_json(manifest.to_json())
    assert again == manifest
    assert again.to_json() == manifest.to_json()
    parameters = again.attacks[0].parameters
    assert [type(parameters[key]) for key in ("epsilon", "steps", "random", "norm")] == [float, int, bool, str]


def test_a_manifest_is_indented_json_that_begins_with_its_identity(draft: Draft) -> None:
    content = Manifest.of(draft, "cifar10", 3, CREATED, FILES).to_json()
    fields = json.loads(content)
    assert list(fields)[:5] == ["schema_version", "kind", "name", "version", "created"]
    assert fields["created"] == "2026-11-20T11:30:00.250000Z"
    assert fields["files"] == {"model.onnx": {"sha256": "0f" * 32, "size": 12}}
    assert content.startswith(b'{\n  "schema_version": 1,\n')


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["threshold", "metrics", "options"])
def test_a_number_that_json_cannot_hold_is_refused(draft: Draft, place: str, number: float) -> None:
    values: dict[str, Any] = {"threshold": number, "metrics": {"loss": number}, "options": {"noise": [{"sd": number}]}}
    with pytest.raises(ValidationError, match="finite number"):
        Draft.model_validate(draft.model_dump() | {place: values[place]})


def test_a_number_put_into_a_draft_after_its_validation_is_refused_too(draft: Draft) -> None:
    draft.metrics["loss"] = math.nan
    with pytest.raises(ValidationError, match="finite number"):
        Manifest.of(draft, "cifar10", 3, CREATED, FILES)


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd.json",
        "../model.onnx",
        "a/../b.onnx",
        "a//b.onnx",
        "a\\b.onnx",
        ".hidden.json",
        "a/",
        "",
        "mö.onnx",
        "manifest.json",
        "two\nlines.json",
    ],
)
def test_a_path_that_is_not_plain_and_relative_is_refused(draft: Draft, path: str) -> None:
    with pytest.raises(ValidationError, match=r"should be relative|the store's own"):
        Manifest.of(draft, "cifar10", 3, CREATED, {path: FILES["model.onnx"]})


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"mode": "L"}, r"mode 'L' has 1 channel\(s\), but the shape \(3, 8, 8\) has 3"),
        ({"shape": (1, 8, 8)}, r"mode 'RGB' has 3 channel\(s\), but the shape \(1, 8, 8\) has 1"),
        ({"shape": (3, 0, 8)}, "sizes of at least 1"),
        ({"range": (1.0, 0.0)}, "a lower and a higher value"),
        ({"normalisation": {"mean": (0.5,), "std": (0.5,) * 3}}, "should have 3 mean"),
        ({"normalisation": {"mean": (0.5,) * 3, "std": (0.5, 0.5, 0.0)}}, "above 0"),
    ],
)
def test_an_input_that_contradicts_itself_is_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        InputSpec.model_validate({"shape": (3, 8, 8), "mode": "RGB"} | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"colour": 1},
        {"kind": "svm"},
        {"labels": ()},
        {"schema_version": 2},
        {"version": 0},
        {"files": {}},
        {"created": "2026-11-20T12:00:00"},
        {"parent": {"name": "m", "version": 1, "digest": "ABC"}},
    ],
)
def test_an_unknown_field_or_a_value_out_of_its_range_is_refused(draft: Draft, changes: dict[str, Any]) -> None:
    fields = Manifest.of(draft, "cifar10", 3, CREATED, FILES).model_dump()
    with pytest.raises(ValidationError):
        Manifest.model_validate(fields | changes)


@pytest.mark.parametrize("threshold", [None, -1.5, (0.5, -2.0, 0.0, 1e-9)])
def test_a_threshold_is_none_or_one_or_one_for_each_label(draft: Draft, threshold: float | tuple[float, ...]) -> None:
    values = draft.model_dump() | {"threshold": list(threshold) if isinstance(threshold, tuple) else threshold}
    manifest = Manifest.of(Draft.model_validate(values), "cifar10", 3, CREATED, FILES)
    again = Manifest.model_validate_json(manifest.to_json())
    assert again == manifest
    assert again.threshold == threshold
    expected = threshold if isinstance(threshold, tuple) else (threshold,) * 4
    assert tuple(again.threshold_of(index) for index in range(4)) == expected


@pytest.mark.parametrize(
    ("threshold", "sentence"),
    [
        ((0.5,) * 3, "a threshold for each label should be 4 numbers, but they are 3"),
        ((0.5,) * 5, "a threshold for each label should be 4 numbers, but they are 5"),
        ((), "at least 1 item"),
        ((0.5, 0.5, math.nan, 0.5), "finite number"),
        ((0.5, 0.5, None, 0.5), "valid number"),
        ([[0.5] * 4], "valid number"),
        ({"plane": 0.5}, "valid number"),
    ],
)
def test_thresholds_that_fit_no_labels_or_are_no_numbers_are_refused(
    draft: Draft, threshold: Any, sentence: str
) -> None:
    with pytest.raises(ValidationError, match=sentence):
        Draft.model_validate(draft.model_dump() | {"threshold": threshold})


def test_a_regulator_has_no_thresholds(draft: Draft) -> None:
    with pytest.raises(ValidationError, match="at least 1 item"):
        Draft.model_validate(draft.model_dump() | {"kind": "regulator", "labels": (), "threshold": ()})


def test_a_regulator_needs_no_labels(draft: Draft) -> None:
    regulator = Draft.model_validate(draft.model_dump() | {"kind": "regulator", "labels": ()})
    assert regulator.labels == ()


def test_a_manifest_cannot_be_changed(draft: Draft) -> None:
    manifest = Manifest.of(draft, "cifar10", 3, datetime.now(UTC), FILES)
    with pytest.raises(ValidationError, match="frozen"):
        manifest.version = 4  # type: ignore[misc]
