"""Reading what a user declares of a classifier."""

from pathlib import Path

import onnx
from torch import nn

from model_store import Normalisation


class DeclarationUnreadable(ValueError):
    """An option of `register` does not say what it should."""


def read_shape(text: str | None) -> tuple[int, int, int] | None:
    """Return (C, H, W) from text such as 3x32x32; raises ``DeclarationUnreadable``."""
    if text is None:
        return None
    sides = text.lower().split("x")
    if len(sides) != 3 or not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise DeclarationUnreadable(f"Expected an input shape such as 3x32x32, got {text!r}.")
    channels, height, width = (int(side) for side in sides)
    return channels, height, width


def read_normalisation(mean: str | None, std: str | None) -> Normalisation | None:
    """Return the normalisation from texts such as 0.5,0.5,0.5; raises ``DeclarationUnreadable``."""
    if mean is None and std is None:
        return None
    if mean is None or std is None:
        raise DeclarationUnreadable("A normalisation needs both --mean and --std.")
    try:
        return Normalisation(
            mean=tuple(float(value) for value in mean.split(",")), std=tuple(float(value) for value in std.split(","))
        )
    except ValueError as error:
        raise DeclarationUnreadable(
            "Expected one number per channel, such as 0.485,0.456,0.406, and above 0 for --std, "
            f"got {mean!r} and {std!r}."
        ) from error


def read_labels(text: str | None) -> tuple[str, ...]:
    """Return the labels from text with commas, or from a file with one a line; raises ``DeclarationUnreadable``."""
    if text is None:
        return ()
    parts = Path(text).read_text().splitlines() if Path(text).is_file() else text.split(",")
    labels = tuple(part.strip() for part in parts if part.strip())
    if len(set(labels)) != len(labels):
        raise DeclarationUnreadable("Every label must differ from the others.")
    return labels


def read_source(
    *, onnx_file: Path | None, arch: str | None, weights: Path | None, classes: int
) -> nn.Module | onnx.ModelProto:
    """Return the graph of an ONNX file, or the module of an architecture with its weights, in evaluation mode.

    Raises ``DeclarationUnreadable``, and what building the architecture and loading its weights raise.
    """
    if (onnx_file is None) == (arch is None):
        raise DeclarationUnreadable("Expected either --onnx FILE or --arch NAME with --weights FILE.")
    if onnx_file is not None:
        return _read_onnx(onnx_file)
    from defenses.architectures import build, load_state

    if weights is None:
        raise DeclarationUnreadable("An architecture alone has no weights; expected --weights FILE.")
    assert arch is not None
    module = build(arch, classes)
    load_state(module, weights)
    return module.eval()


def _read_onnx(path: Path) -> onnx.ModelProto:
    if not path.is_file():
        raise DeclarationUnreadable(f"There is no file {path}.")
    try:
        return onnx.load(path)
    except Exception as error:  # protobuf's DecodeError and onnx's own share no narrower ancestor
        raise DeclarationUnreadable(f"{path} is not an ONNX file: {error}.") from error
