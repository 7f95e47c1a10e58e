"""The servers that are compared, each in the settings that are tried, and how an image is sent to each."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from loadtest.connections import Message
from loadtest.messages import binary_message, png_message
from loadtest.serving import Running, gateway

CORES = 2


@dataclass(frozen=True)
class Contender:
    """A server in one of its settings.

    ``message`` makes a request of an image uint8 (C, H, W), its pixels as they are where it is ``raw`` and a PNG
    otherwise; ``open`` runs the server. Two settings that differ in the message alone have the same ``process``: the
    server is started once for both.
    """

    server: str
    process: str
    body: str
    message: Callable[[np.ndarray], Message]
    open: Callable[[], AbstractContextManager[Running]]
    raw: bool = False

    @property
    def setting(self) -> str:
        """How the server is run and asked."""
        return f"{self.body}, {self.process}"

    @property
    def name(self) -> str:
        """The server and its setting."""
        return f"{self.server}, {self.setting}"

    @property
    def started(self) -> str:
        """The server and how it is run, which contenders may share."""
        return f"{self.server}, {self.process}"


def counted(number: int, noun: str) -> str:
    """Return a number of things, such as ``1 thread``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def gateways(store: Path, server: str, model: str, version: int, **settings: object) -> list[Contender]:
    """Return the gateway with one version of a model, by PNG and binary tensor, in each of its ways to use the cores.

    ``server`` is what it is called in the tables, ``settings`` are further ones of the gateway.
    """
    routes: dict[str, Callable[[np.ndarray], Message]] = {
        "PNG": partial(png_message, path=f"/v1/models/{model}/predict"),
        "binary tensor": partial(binary_message, path=f"/v2/models/{model}/infer", outputs=("probabilities", "label")),
    }
    return [
        Contender(
            server,
            f"{counted(lanes, 'lane')} of {counted(threads, 'thread')}",
            body,
            message,
            partial(gateway, store, models=f"{model}@{version}", threads=threads, lanes=lanes, **settings),
            raw=body == "binary tensor",
        )
        for lanes, threads in ((1, 1), (1, CORES), (CORES, 1))
        for body, message in routes.items()
    ]
