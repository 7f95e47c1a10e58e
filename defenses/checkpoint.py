"""Fitted parts in safetensors files that say themselves what they hold. Never pickle."""

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_model, save_model
from torch import nn

from defenses.classifier import Classifier
from defenses.coophance.inspector import Inspector, InspectorConfig
from defenses.coophance.regulator import Regulator, RegulatorConfig
from defenses.protected import ProtectedClassifier

REGULATOR = "regulator.safetensors"
INSPECTOR = "inspector.safetensors"


class CheckpointUnreadable(ValueError):
    """A checkpoint file does not hold what its name promises."""

    def __init__(self, path: Path, reason: str) -> None:
        self.path = path
        super().__init__(f"{path} is not a checkpoint that can be loaded: {reason}.")


def save_regulator(regulator: Regulator, folder: Path) -> None:
    """Write a Regulator's weights, statistics and configuration into ``folder``."""
    _save(regulator, regulator.config.as_json(), folder / REGULATOR)


def load_regulator(folder: Path) -> Regulator:
    """Read the Regulator from ``folder``, in evaluation mode; raises ``CheckpointUnreadable``."""
    path = folder / REGULATOR
    regulator = Regulator(RegulatorConfig.from_json(_config(path)))
    _load(regulator, path)
    return regulator


def save_protected(protected: ProtectedClassifier, folder: Path) -> None:
    """Write the Regulator and the Inspector of a CoopHANCE defense into ``folder``; the classifier stays outside."""
    if not isinstance(protected.purifier, Regulator) or not isinstance(protected.detector, Inspector):
        raise TypeError("A CoopHANCE checkpoint holds a Regulator and an Inspector.")
    folder.mkdir(parents=True, exist_ok=True)
    save_regulator(protected.purifier, folder)
    threshold = protected.threshold.tolist()
    _save(protected.detector, {**protected.detector.config.as_json(), "threshold": threshold}, folder / INSPECTOR)


def load_protected(classifier: Classifier, folder: Path) -> ProtectedClassifier:
    """Put ``classifier`` behind the defense kept in ``folder``, in evaluation mode; raises ``CheckpointUnreadable``."""
    path = folder / INSPECTOR
    values = _config(path)
    threshold = values.pop("threshold")
    inspector = Inspector(InspectorConfig.from_json(values))
    _load(inspector, path)
    return ProtectedClassifier(classifier, load_regulator(folder), inspector, threshold).eval()


def _save(module: nn.Module, config: dict[str, Any], path: Path) -> None:
    save_model(module, str(path), metadata={"config": json.dumps(config)})


def _config(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except Exception as error:
        raise CheckpointUnreadable(path, str(error)) from error
    if "config" not in metadata:
        raise CheckpointUnreadable(path, "it has no configuration in its metadata")
    values: dict[str, Any] = json.loads(metadata["config"])
    return values


def _load(module: nn.Module, path: Path) -> None:
    try:
        load_model(module, path)
    except RuntimeError as error:
        raise CheckpointUnreadable(path, str(error)) from error
    module.eval()
