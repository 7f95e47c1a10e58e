"""A published version, opened on torch."""

import logging

import torch

from defenses.classifier import Classifier
from defenses.protected import ProtectedClassifier
from model_store import Fetched, Store
from service.defended import DEFENSES, load_defended
from service.engines.answers import Device
from service.engines.errors import EngineUnavailable, VersionUnsuitable
from service.engines.torch_engine import TorchCorrection, TorchEngine
from service.engines.torch_outputs import Version
from service.engines.torch_precision import chosen_precision
from service.fit import CHECKPOINT
from service.repository import MODELS
from service.served import GRAPH
from service.settings import Settings

logger = logging.getLogger("portcullis")


class TorchSource:
    """Open engines on torch for one version, as a ``Source`` does; its weights are loaded once for all of them.

    Takes the settings' number of threads for the whole process, and a seed for the noise that nobody can guess. Raises
    ``EngineUnavailable`` without the device, and ``VersionUnsuitable`` for a version that holds no checkpoint or whose
    checkpoint or classifier torch cannot run.
    """

    def __init__(self, fetched: Fetched, settings: Settings) -> None:
        self._name = f"{fetched.manifest.name}@{fetched.manifest.version}"
        self._settings = settings
        self._device = torch_device(settings.device)
        if settings.threads:
            torch.set_num_threads(settings.threads)
        # Every process would begin with the same noise.
        torch.seed()
        try:
            self._version = _load(fetched, settings)
        except VersionUnsuitable:
            raise
        except Exception as error:  # a checkpoint's, a graph's and the store's errors share no narrower ancestor
            raise VersionUnsuitable(self._name, "torch", str(error)) from error
        self._reduced = chosen_precision(settings.precision, self._version, self._name, self._device)
        logger.info("torch computes %s on %s in %s.", self._name, self._device, self._reduced or torch.float32)

    def open(self, outputs: tuple[str, ...]) -> TorchEngine:
        """Open an engine for outputs that are names of ``FIELDS``; raises ``VersionUnsuitable``."""
        try:
            return TorchEngine(
                self._version,
                outputs,
                device=self._device,
                noise=self._settings.noise,
                reduced=self._reduced,
                max_batch=self._settings.max_batch,
            )
        except Exception as error:  # what torch raises on a layer that it cannot run shares no narrower ancestor
            raise VersionUnsuitable(self._name, "torch", str(error)) from error

    def open_correction(self, *, purified: bool) -> TorchCorrection:
        """Open what answers alerted images anew; raises ``VersionUnsuitable``."""
        if not isinstance(self._version, ProtectedClassifier) or self._version.corrector is None:
            raise VersionUnsuitable(self._name, "torch", "its checkpoint holds no correction.")
        return TorchCorrection(self._version, device=self._device, noise=self._settings.noise, purified=purified)


def torch_device(device: Device) -> torch.device:
    """Return the device; raises ``EngineUnavailable`` for a GPU that torch does not find."""
    if device == "cuda" and not torch.cuda.is_available():
        raise EngineUnavailable("torch", "torch finds no GPU here")
    return torch.device(device)


def _load(fetched: Fetched, settings: Settings) -> Version:
    """Return a version's classifier, behind its defense where it has one, in evaluation mode."""
    manifest = fetched.manifest
    if manifest.kind not in DEFENSES:
        return Classifier.load(fetched.folder / GRAPH).eval()
    if not any(name.startswith(f"{CHECKPOINT}/") for name in manifest.files):
        raise VersionUnsuitable(f"{manifest.name}@{manifest.version}", "torch", "it holds no checkpoint.")
    return load_defended(Store.open(settings.store / MODELS), manifest.name, manifest.version)[1]
