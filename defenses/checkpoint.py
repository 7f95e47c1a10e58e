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
from defenses.detector import NoDetector
from defenses.nip.head import head_behind
from defenses.nip.inverse_perturbation import InversePerturbation, InversePerturbationConfig
from defenses.protected import ProtectedClassifier

REGULATOR = "regulator.safetensors"
INVERSE_PERTURBATION = "inverse_perturbation.safetensors"
INSPECTOR = "inspector.safetensors"


class CheckpointUnreadable(ValueError):
    """A checkpoint file does not hold what its name promises."""

    def __init__(self, path: Path, reason: str) -> None:
        self.path = path
        super().__init__(f"{path} is not a checkpoint that can be loaded: {reason}.")


class PoolMismatch(ValueError):
    """A pool of inverse perturbations was made for another classifier; ``fitted`` and ``found`` are what differs."""

    def __init__(self, path: Path, what: str, fitted: object, found: object) -> None:
        self.path = path
        self.fitted = fitted
        self.found = found
        super().__init__(f"The pool in {path} was made for {what} {fitted}, but the classifier has {found}.")


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
    """Write the parts of a defense into ``folder``; the classifier stays outside.

    They are a Regulator and an Inspector (CoopHANCE), or an inverse perturbation with an Inspector or without a
    detector (NIP). Raises ``TypeError`` for other parts.
    """
    purifier, detector = protected.purifier, protected.detector
    match purifier, detector:
        case (Regulator(), Inspector()) | (InversePerturbation(), Inspector() | NoDetector()):
            folder.mkdir(parents=True, exist_ok=True)
        case _:
            raise TypeError(
                "Expected a Regulator and an Inspector, or an InversePerturbation with an Inspector or NoDetector, "
                f"got {type(purifier).__name__} and {type(detector).__name__}."
            )
    if isinstance(purifier, Regulator):
        save_regulator(purifier, folder)
    else:
        assert isinstance(purifier, InversePerturbation)
        inspected = isinstance(detector, Inspector)
        _save(purifier, {**purifier.config.as_json(), "inspected": inspected}, folder / INVERSE_PERTURBATION)
    if isinstance(detector, Inspector):
        config = {**detector.config.as_json(), "threshold": protected.threshold.tolist()}
        _save(detector, config, folder / INSPECTOR)


def load_protected(classifier: Classifier, folder: Path) -> ProtectedClassifier:
    """Put ``classifier`` behind the defense kept in ``folder``, in evaluation mode.

    Raises ``CheckpointUnreadable``, and of an inverse perturbation ``PoolMismatch`` and ``LayerNotFound``.
    """
    if not (folder / INVERSE_PERTURBATION).exists():
        if not (folder / REGULATOR).exists():
            raise CheckpointUnreadable(folder, f"it holds neither {REGULATOR} nor {INVERSE_PERTURBATION}")
        inspector, threshold = _load_inspector(folder / INSPECTOR)
        return ProtectedClassifier(classifier, load_regulator(folder), inspector, threshold).eval()
    purifier, inspected = _load_inverse_perturbation(classifier, folder / INVERSE_PERTURBATION)
    if not inspected:
        return ProtectedClassifier(classifier, purifier, NoDetector()).eval()
    return ProtectedClassifier(classifier, purifier, *_load_inspector(folder / INSPECTOR)).eval()


def _load_inspector(path: Path) -> tuple[Inspector, float | list[float]]:
    values = _config(path)
    threshold = values.pop("threshold")
    inspector = Inspector(InspectorConfig.from_json(values))
    _load(inspector, path)
    return inspector, threshold


def _load_inverse_perturbation(classifier: Classifier, path: Path) -> tuple[InversePerturbation, bool]:
    """Return the inverse perturbation, its head that of the classifier, and whether an Inspector stands beside it."""
    values = _config(path)
    try:
        inspected = bool(values.pop("inspected"))
        config = InversePerturbationConfig.from_json(values)
    except (KeyError, TypeError) as error:
        raise CheckpointUnreadable(
            path, f"its configuration is not that of an inverse perturbation: {error}"
        ) from error
    layer = classifier.resolve_layer(config.layer)
    for what, fitted, found in (
        (f"the layer {config.layer!r} of shape", config.shape, layer.shape),
        ("images of shape", config.image_shape, classifier.image_shape),
        ("so many classes:", config.classes, classifier.classes),
    ):
        if fitted != found:
            raise PoolMismatch(path, what, fitted, found)
    purifier = InversePerturbation(config, head_behind(classifier, layer))
    _load(purifier, path)
    if not all(values.isfinite().all() for values in (purifier.pool.perturbations, purifier.pool.keys)):
        raise CheckpointUnreadable(path, "its candidates are not finite")
    return purifier, inspected


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
