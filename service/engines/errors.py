"""What may keep a version from being computed."""

from collections.abc import Sequence
from pathlib import Path


class GraphUnloadable(ValueError):
    """A graph cannot be run."""

    def __init__(self, path: Path, reason: str) -> None:
        self.path = path
        super().__init__(f"{path.name} cannot be run: {reason}")


class VersionUnsuitable(ValueError):
    """A version cannot be run by the engine that was asked for."""

    def __init__(self, version: str, engine: str, reason: str) -> None:
        self.version = version
        self.engine = engine
        super().__init__(f"Asked to run {version} with the engine {engine}, but {reason.rstrip('.')}.")


class DeviceUnavailable(RuntimeError):
    """The device that was asked for is not there, and no other is taken in its place."""

    def __init__(self, device: str, providers: Sequence[str]) -> None:
        self.device = device
        super().__init__(f"Asked to run on {device}, but ONNX Runtime offers only {', '.join(providers)}.")


class EngineUnavailable(RuntimeError):
    """The engine that was asked for cannot run here, and no other is taken in its place."""

    def __init__(self, engine: str, reason: str) -> None:
        self.engine = engine
        super().__init__(f"Asked for the engine {engine}, but {reason}.")
