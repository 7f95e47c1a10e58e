"""The versions in service, loaded from the model store."""

import asyncio
import logging
from dataclasses import dataclass

from model_store import SERVING, Fetched, Store, StoreError, parse_reference
from service.engines import DeviceUnavailable, EngineUnavailable, GraphUnloadable, VersionUnsuitable
from service.metrics import Metrics
from service.p_values import CalibrationUnreadable
from service.served import ServedModel
from service.settings import Settings

logger = logging.getLogger("portcullis")

MODELS = "models"
"""The folder of the store whose models are served; Regulators live beside it."""

REFUSED = (
    StoreError,
    GraphUnloadable,
    VersionUnsuitable,
    DeviceUnavailable,
    EngineUnavailable,
    CalibrationUnreadable,
)
"""What keeps one version from being served, and no other."""


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
    """Hold the versions in service; a version that cannot be loaded does not keep the others out."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.ready = False
        self._settings = settings
        self._metrics = metrics
        self._store = Store.open(settings.store / MODELS)
        self._served: dict[str, dict[str, ServedModel]] = {}
        self._defaults: dict[str, str] = {}
        self._broken: dict[str, State] = {}

    async def load(self) -> None:
        """Load every model that the settings name, or every model of the store."""
        wanted = self._settings.models or tuple(await asyncio.to_thread(self._store.models))
        for reference in wanted:
            await self._load(reference)
        for name in sorted(self._settings.modes.keys() - self._defaults.keys()):
            logger.warning("A mode is set for model %s, but no such model was asked for.", name)
        self.ready = bool(self._served) or not wanted

    async def stop(self) -> None:
        """Let every model answer what it took, and end."""
        await asyncio.gather(*(served.stop() for served in self.all()))

    def get(self, name: str, version: str | None = None) -> ServedModel:
        """Return a version in service; when none is named, the first one that was asked for.

        Raises ``ModelNotFound``, and ``ModelUnavailable`` for a version that is not loaded yet or could not be:
        another one, perhaps with another defense, is never given in its place.
        """
        wanted = self._defaults.get(name, "") if version is None else version
        served = self._served.get(name, {}).get(wanted)
        if served is not None:
            return served
        for state in self._broken.values():
            if (state.name, state.version) == (name, wanted):
                raise ModelUnavailable(name, state.reason)
        if not self.ready:
            raise ModelUnavailable(name, "the models are still being loaded.")
        raise ModelNotFound(name, version, sorted(self._served))

    def is_default(self, served: ServedModel) -> bool:
        """Say whether a version in service is what ``get`` returns of its model when none is named."""
        return self._defaults.get(served.name) == str(served.version)

    def versions(self, name: str) -> list[str]:
        """Return the versions of a model that are in service."""
        return sorted(self._served.get(name, {}), key=int)

    def all(self) -> list[ServedModel]:
        """Return everything in service, by name and version."""
        return [self._served[name][version] for name in sorted(self._served) for version in self.versions(name)]

    def states(self) -> list[State]:
        """Return how every version that was asked for is doing; without a number where an alias leads nowhere."""
        ready = [State(served.name, str(served.version), "READY", "") for served in self.all()]
        return ready + [self._broken[reference] for reference in sorted(self._broken)]

    async def _load(self, reference: str) -> None:
        name, _, ref = reference.partition("@")
        try:
            served = await asyncio.to_thread(self._open, reference)
        except REFUSED as error:
            logger.error("Model %s is not served: %s", reference, error)
            asked = await asyncio.to_thread(self._number, name, ref)
            self._broken[reference] = State(name, asked, "UNAVAILABLE", str(error))
            self._defaults.setdefault(name, asked)
            return
        version = str(served.version)
        self._defaults.setdefault(name, version)
        versions = self._served.setdefault(name, {})
        if version not in versions:
            versions[version] = served.start()
            logger.info("Model %s, version %s, is in service (%s).", name, version, served.mode)

    def _number(self, name: str, ref: str) -> str:
        """Return the number of the version that a reference means, "" where there is no telling."""
        if ref.isdecimal():
            return ref
        try:
            return str(self._store.aliases(name).get(ref or SERVING, ""))
        except StoreError:
            return ""

    def _open(self, reference: str) -> ServedModel:
        fetched: Fetched = self._store.fetch(*parse_reference(reference))
        return ServedModel(fetched, self._settings, self._metrics)
