"""Fitted parts in safetensors files that say themselves what they hold. Never pickle."""

import json
import math
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_model, save_model
from torch import nn

from defenses.baselines.methods import BaselineConfig, config_of
from defenses.classifier import Classifier
from defenses.coophance.inspector import Inspector, InspectorConfig
from defenses.coophance.regulator import Regulator, RegulatorConfig
from defenses.corrector import Corrector
from defenses.detector import Detector, NoDetector
from defenses.judge import AlertedAnswer, Judge, PurifiedAnswer
from defenses.nip.correction import CorrectionConfig, InverseCorrection
from defenses.nip.head import head_behind
from defenses.nip.inverse_perturbation import InversePerturbation, InversePerturbationConfig
from defenses.nip.response import Pushing, ResponseConfig, ResponseJudge
from defenses.protected import ProtectedClassifier
from defenses.purifier import Purifier

REGULATOR = "regulator.safetensors"
INVERSE_PERTURBATION = "inverse_perturbation.safetensors"
INSPECTOR = "inspector.safetensors"
RESPONSE = "response.safetensors"
BASELINE = "baseline.safetensors"
CORRECTION = "correction.json"


class CheckpointUnreadable(ValueError):
    """A checkpoint file does not hold what its name promises."""

    def __init__(self, path: Path, reason: str) -> None:
        self.path = path
        super().__init__(f"{path} is not a checkpoint that can be loaded: {reason}.")


class ClassifierMismatch(ValueError):
    """A NIP defense was made for another classifier; ``fitted`` and ``found`` are what differs."""

    def __init__(self, path: Path, what: str, fitted: object, found: object) -> None:
        self.path = path
        self.fitted = fitted
        self.found = found
        super().__init__(f"The defense in {path} was made for {what} {fitted}, but the classifier has {found}.")


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

    They are a Regulator and an Inspector (CoopHANCE), these with a correction, a push and what is concluded from it, or
    an inverse perturbation with an Inspector or without a detector (NIP), or those of a baseline. Raises ``TypeError``
    for other parts.
    """
    parts = (protected.purifier, protected.detector, protected.corrector, protected.judge)
    match parts:
        case Regulator() as regulator, Inspector(), corrector, judge if _go_together(corrector, judge):
            folder.mkdir(parents=True, exist_ok=True)
            save_regulator(regulator, folder)
        case InversePerturbation() as purifier, Inspector() | NoDetector() as detector, None, PurifiedAnswer():
            folder.mkdir(parents=True, exist_ok=True)
            inspected = isinstance(detector, Inspector)
            _save(purifier, {**purifier.config.as_json(), "inspected": inspected}, folder / INVERSE_PERTURBATION)
        case Pushing() as pushing, NoDetector(), None, ResponseJudge() as judge:
            folder.mkdir(parents=True, exist_ok=True)
            _save(_response(pushing, judge), pushing.config.as_json(), folder / RESPONSE)
        case Purifier(), Detector(), None, PurifiedAnswer() if held := _baseline_config(protected):
            folder.mkdir(parents=True, exist_ok=True)
            threshold = None if isinstance(protected.detector, NoDetector) else float(protected.threshold)
            values = {**held.as_json(), "threshold": threshold}
            _save(_baseline(protected.purifier, protected.detector), values, folder / BASELINE)
        case _:
            names = ", ".join(type(part).__name__ for part in parts)
            raise TypeError(f"Expected the parts of a defense that can be kept, got {names}.")
    if isinstance(protected.detector, Inspector):
        config = {**protected.detector.config.as_json(), "threshold": protected.threshold.tolist()}
        _save(protected.detector, config, folder / INSPECTOR)
    if isinstance(protected.corrector, InverseCorrection):
        (folder / CORRECTION).write_text(json.dumps(protected.corrector.config.as_json()))


def load_protected(classifier: Classifier, folder: Path) -> ProtectedClassifier:
    """Put ``classifier`` behind the defense kept in ``folder``, in evaluation mode.

    Raises ``CheckpointUnreadable``, and of a defense that was made for another classifier ``ClassifierMismatch`` and
    ``LayerNotFound``.
    """
    if (folder / RESPONSE).exists():
        pushing, judge = _load_response(classifier, folder / RESPONSE)
        return ProtectedClassifier(classifier, pushing, NoDetector(), judge=judge).eval()
    if (folder / BASELINE).exists():
        return _load_baseline(classifier, folder / BASELINE)
    if not (folder / INVERSE_PERTURBATION).exists():
        if not (folder / REGULATOR).exists():
            held = f"{REGULATOR}, {INVERSE_PERTURBATION}, {RESPONSE} and {BASELINE}"
            raise CheckpointUnreadable(folder, f"it holds none of {held}")
        inspector, threshold = _load_inspector(folder / INSPECTOR)
        regulator = load_regulator(folder)
        if not (folder / CORRECTION).exists():
            return ProtectedClassifier(classifier, regulator, inspector, threshold).eval()
        corrector = _load_correction(classifier, folder / CORRECTION)
        return ProtectedClassifier(
            classifier, regulator, inspector, threshold, judge=AlertedAnswer(), corrector=corrector
        ).eval()
    purifier, inspected = _load_inverse_perturbation(classifier, folder / INVERSE_PERTURBATION)
    if not inspected:
        return ProtectedClassifier(classifier, purifier, NoDetector()).eval()
    return ProtectedClassifier(classifier, purifier, *_load_inspector(folder / INSPECTOR)).eval()


def _go_together(corrector: Corrector | None, judge: Judge) -> bool:
    """Say whether a judge answers alerted images alone where they are corrected, and all where they are not."""
    return isinstance(judge, PurifiedAnswer if corrector is None else AlertedAnswer)


def _response(pushing: Pushing, judge: ResponseJudge) -> nn.Module:
    return nn.ModuleDict({"push": pushing, "judge": judge})


def _load_response(classifier: Classifier, path: Path) -> tuple[Pushing, ResponseJudge]:
    try:
        config = ResponseConfig.from_json(_config(path))
    except (KeyError, TypeError) as error:
        raise CheckpointUnreadable(path, f"its configuration is not that of a response: {error}") from error
    _check_fits(path, classifier, config.image_shape, config.classes)
    if config.layer is not None:
        classifier.resolve_layer(config.layer)
    pushing, judge = Pushing(config), ResponseJudge(config.classes)
    _load(_response(pushing, judge), path)
    if not all(values.isfinite().all() for values in (*pushing.buffers(), *judge.buffers())):
        raise CheckpointUnreadable(path, "its values are not finite")
    return pushing.eval(), judge.eval()


def _baseline_config(protected: ProtectedClassifier) -> BaselineConfig | None:
    return config_of(protected.purifier, protected.detector, protected.classifier.image_shape)


def _baseline(purifier: Purifier, detector: Detector) -> nn.Module:
    return nn.ModuleDict({"purifier": purifier, "detector": detector})


def _load_baseline(classifier: Classifier, path: Path) -> ProtectedClassifier:
    values = _config(path)
    try:
        threshold = values.pop("threshold")
        config = BaselineConfig.from_json(values)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointUnreadable(path, f"its configuration is not that of a baseline: {error}") from error
    _check_fits(path, classifier, config.image_shape, classifier.classes)
    for watch in config.watched:
        if (found := classifier.resolve_layer(watch.name).shape) != watch.shape:
            raise ClassifierMismatch(path, f"the layer {watch.name!r} of shape", watch.shape, found)
    purifier, detector = config.parts()
    parts = _baseline(purifier, detector)
    _load(parts, path)
    if not all(values.isfinite().all() for values in parts.state_dict().values()):
        raise CheckpointUnreadable(path, "its values are not finite")
    return ProtectedClassifier(classifier, purifier, detector, math.inf if threshold is None else threshold).eval()


def _load_correction(classifier: Classifier, path: Path) -> InverseCorrection:
    try:
        config = CorrectionConfig.from_json(json.loads(path.read_text()))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointUnreadable(path, f"its configuration is not that of a correction: {error}") from error
    layer = classifier.resolve_layer(config.layer)
    _check_fits(path, classifier, classifier.image_shape, config.classes)
    if layer.shape != config.shape:
        raise ClassifierMismatch(path, f"the layer {config.layer!r} of shape", config.shape, layer.shape)
    return InverseCorrection(config, classifier, head_behind(classifier, layer)).eval()


def _check_fits(path: Path, classifier: Classifier, image_shape: tuple[int, ...], classes: int) -> None:
    for what, fitted, found in (
        ("images of shape", image_shape, classifier.image_shape),
        ("so many classes:", classes, classifier.classes),
    ):
        if fitted != found:
            raise ClassifierMismatch(path, what, fitted, found)


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
    if config.shape != layer.shape:
        raise ClassifierMismatch(path, f"the layer {config.layer!r} of shape", config.shape, layer.shape)
    _check_fits(path, classifier, config.image_shape, config.classes)
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
