"""Which engine computes a version, and how it is opened."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from model_store import Fetched
from service.engines.answers import Correction, Engine
from service.engines.errors import EngineUnavailable, VersionUnsuitable
from service.engines.onnx_engine import OnnxEngine
from service.engines.onnx_session import check_device
from service.settings import Settings

logger = logging.getLogger("portcullis")

OWN_PRECISION = ("auto", "fp32")
"""The precisions that a graph is run in as it is."""


class Source(Protocol):
    """Open engines for one version.

    Raises ``GraphUnloadable`` or ``VersionUnsuitable`` where that cannot be done, and ``DeviceUnavailable``.
    """

    def open(self, outputs: tuple[str, ...]) -> Engine:
        """Open an engine for outputs that are names of ``FIELDS``."""

    def open_correction(self, *, purified: bool) -> Correction:
        """Open what answers alerted images anew, with the images that it made of them where ``purified`` says so."""


@dataclass(frozen=True)
class OnnxSource:
    """Open engines on ONNX Runtime for a version's graphs, as a ``Source`` does."""

    graph: Path
    correction: Path
    settings: Settings

    def open(self, outputs: tuple[str, ...]) -> OnnxEngine:
        """Open the version's graph."""
        return self._opened(self.graph, outputs)

    def open_correction(self, *, purified: bool) -> OnnxEngine:
        """Open the version's second graph."""
        return self._opened(self.correction, ("logits", "corrected") if purified else ("logits",))

    def _opened(self, path: Path, outputs: tuple[str, ...]) -> OnnxEngine:
        settings = self.settings
        return OnnxEngine(
            path,
            outputs,
            device=settings.device,
            threads=settings.threads,
            noise=settings.noise,
            max_batch=settings.max_batch,
            exact=settings.precision == "fp32",
        )


@dataclass(frozen=True)
class Preferred:
    """Open engines with the first of two sources, and with the second where that turns out not to suit the version."""

    first: Source
    second: Source

    def open(self, outputs: tuple[str, ...]) -> Engine:
        try:
            return self.first.open(outputs)
        except VersionUnsuitable as error:
            logger.info("ONNX Runtime runs it: %s", error)
            return self.second.open(outputs)

    def open_correction(self, *, purified: bool) -> Correction:
        try:
            return self.first.open_correction(purified=purified)
        except VersionUnsuitable as error:
            logger.info("ONNX Runtime corrects: %s", error)
            return self.second.open_correction(purified=purified)


def open_source(fetched: Fetched, graph: Path, correction: Path, settings: Settings) -> Source:
    """Return what opens engines for a version whose graphs lie at these paths.

    ``auto`` is ONNX Runtime on the processor. On a GPU it is torch, where torch is installed, finds the GPU and can run
    the version; else ONNX Runtime, and the log says why. Raises ``VersionUnsuitable`` for a version that the engine
    asked for cannot run, and ``EngineUnavailable``.
    """
    onnx = OnnxSource(graph, correction, settings)
    if settings.engine == "torch" or (settings.engine == "auto" and settings.device == "cuda"):
        try:
            torch = _torch_source(fetched, settings)
            return torch if settings.engine == "torch" else Preferred(torch, onnx)
        except (EngineUnavailable, VersionUnsuitable) as error:
            if settings.engine == "torch":
                raise
            logger.info("ONNX Runtime runs %s@%d: %s", fetched.manifest.name, fetched.manifest.version, error)
    if settings.precision not in OWN_PRECISION:
        version = f"{fetched.manifest.name}@{fetched.manifest.version}"
        raise VersionUnsuitable(version, "onnx", f"it computes a graph as it is and not in {settings.precision}")
    return onnx


def check_engine(settings: Settings) -> None:
    """Raise unless some engine that the settings allow can run here, before any version is loaded.

    Raises ``EngineUnavailable`` where torch was asked for and is not installed or finds no GPU, and for a precision
    that is torch's alone; ``DeviceUnavailable`` where ONNX Runtime finds no GPU.
    """
    if settings.engine == "torch" or (settings.engine == "auto" and settings.device == "cuda"):
        try:
            _check_torch(settings)
        except EngineUnavailable:
            if settings.engine == "torch":
                raise
        else:
            return
    if settings.precision not in OWN_PRECISION:
        raise EngineUnavailable("onnx", f"it computes a graph as it is and not in {settings.precision}")
    check_device(settings.device)


def _check_torch(settings: Settings) -> None:
    try:
        from service.engines.torch_opening import torch_device
    except ModuleNotFoundError as error:
        raise _not_installed(error) from error
    torch_device(settings.device)


def _torch_source(fetched: Fetched, settings: Settings) -> Source:
    try:
        from service.engines.torch_opening import TorchSource
    except ModuleNotFoundError as error:
        raise _not_installed(error) from error
    return TorchSource(fetched, settings)


def _not_installed(error: ModuleNotFoundError) -> EngineUnavailable:
    return EngineUnavailable("torch", f"{error.name} is not installed: pip install 'portcullis[fit]'")
