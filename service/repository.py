"""The versions in service, loaded from the model store."""

import asyncio
import logging
from dataclasses import dataclass

from model_store import Fetched, Store, StoreError, parse_reference
from service.engine import GraphUnloadable
from service.metrics import Metrics
from service.served import ServedModel
from service.settings import Settings

logger = logging.getLogger("portcullis")

MODELS = "models"
"""The folder of the store whose models are served; Regulators live beside it."""


class ModelNotFound(KeyError):
    """No such model, or no such version of it, is in service."""

    def __init__(self, name: str, version: str | None, served: list[str]) -> None:
        self.name = name
        self.version = version
        self.served = served
        super().__init__(name)

    def __str__(self) -> str:
        wanted = self.name if self.version is None else f"{self.name}, version {self.version},"
        return f"No model {wanted} is in service; there are: {', '.join(self.served) or 'none'}."


class ModelUnavailable(RuntimeError):
    """A model was asked for in service but is not loaded yet, or could not be."""

    def __init__(self, name: str, reason: str) -> None:
        self.name = name
        super().__init__(f"Model {name} is not available: {reason}")


@dataclass(frozen=True)
class State:
    """Say how a model that was asked for is doing, as the repository index tells it."""

    name: str
    version: str
    state: str
    reason: str


class Repository:
    """Hold the versions in service; a model that cannot be loaded does not keep the others out."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.ready = False
        self._settings = settings
        self._metrics = metrics
        self._store = Store.open(settings.store / MODELS)
        self._served: dict[str, dict[int, ServedModel]] = {}
        self._broken: dict[str, str] = {}

    async def load(self) -> None:
        """Load every model that the settings name, or every model of the store."""
        wanted = self._settings.models or tuple(await asyncio.to_thread(self._store.models))
        for reference in wanted:
            name = reference.partition("@")[0]
            try:
                served = await asyncio.to_thread(self._open, reference)
            except (StoreError, GraphUnloadable) as error:
                logger.error("Model %s is not served: %s", reference, error)
                self._broken[name] = str(error)
            else:
                versions = self._served.setdefault(name, {})
                if served.version not in versions:
                    versions[served.version] = served.start()
                    logger.info("Model %s, version %d, is in service (%s).", name, served.version, served.mode)
        self.ready = True

    async def stop(self) -> None:
        """Let every model answer what it took, and end."""
        await asyncio.gather(*(served.stop() for served in self.all()))

    def get(self, name: str, version: str | None = None) -> ServedModel:
        """Return a version in service, the first one loaded when none is named.

        Raises ``ModelNotFound``, and ``ModelUnavailable`` for a model that is not loaded yet or could not be.
        """
        versions = self._served.get(name, {})
        if version is None and versions:
            return next(iter(versions.values()))
        for number, served in versions.items():
            if str(number) == version:
                return served
        if name in self._broken and not versions:
            raise ModelUnavailable(name, self._broken[name])
        if not self.ready:
            raise ModelUnavailable(name, "the models are still being loaded.")
        raise ModelNotFound(name, version, sorted(self._served))

    def versions(self, name: str) -> list[str]:
        """Return the versions of a model that are in service."""
        return [str(version) for version in sorted(self._served.get(name, {}))]

    def all(self) -> list[ServedModel]:
        """Return everything in service, by name and version."""
        return [self._served[name][version] for name in sorted(self._served) for version in sorted(self._served[name])]

    def states(self) -> list[State]:
        """Return how every model that was asked for is doing."""
        ready = [State(served.name, str(served.version), "READY", "") for served in self.all()]
        return ready + [State(name, "", "UNAVAILABLE", reason) for name, reason in sorted(self._broken.items())]

    def _open(self, reference: str) -> ServedModel:
        fetched: Fetched = self._store.fetch(*parse_reference(reference))
        return ServedModel(fetched, self._settings, self._metrics)
