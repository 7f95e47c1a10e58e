"""The deployment's own files, read: images, compose, manifests, and the settings that they make."""

import json
import os
import re
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.alerts.database import _SQLITE_BUSY_MILLISECONDS
from service.server import DRAIN_SECONDS
from service.settings import Settings

ROOT = Path(__file__).parents[2]
FOLDERS = ("base", "fit", "register")

Stages = dict[str, list[tuple[str, str]]]


@pytest.fixture(scope="session")
def root() -> Path:
    """The folder of the whole project, which a build gets as its context."""
    return ROOT


@pytest.fixture(scope="session")
def stages() -> Stages:
    """The Dockerfile's stages by name, each as its instructions in order, FROM first."""
    text = (ROOT / "docker" / "Dockerfile").read_text()
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    found: Stages = {}
    for line in re.sub(r"\\\n\s*", " ", "\n".join(lines)).splitlines():
        instruction, argument = line.split(maxsplit=1)
        if instruction == "FROM":
            argument, name = argument.split(" AS ")
            stage = found[name] = []
        stage.append((instruction, argument))
    return found


@pytest.fixture(scope="session")
def image(stages: Stages) -> Callable[[str], dict[str, Any]]:
    """Tell what an image of a stage is: environment, labels, user, command; with what it takes from its base."""

    def describe(stage: str) -> dict[str, Any]:
        (_, below), *instructions = stages[stage]
        described: dict[str, Any] = describe(below) if below in stages else {"ENV": {}, "LABEL": {}}
        for instruction, argument in instructions:
            if instruction in ("ENV", "LABEL"):
                described[instruction] = described[instruction] | pairs(shlex.split(argument))
            elif instruction in ("ENTRYPOINT", "CMD"):
                described[instruction] = json.loads(argument)
            elif instruction == "HEALTHCHECK":
                described[instruction] = json.loads(argument.partition(" CMD ")[2])
            elif instruction in ("USER", "EXPOSE", "WORKDIR"):
                described[instruction] = argument
        return described

    return describe


@pytest.fixture(scope="session")
def compose() -> dict[str, Any]:
    """The compose file."""
    read: dict[str, Any] = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())
    return read


@pytest.fixture(params=FOLDERS)
def folder(request: pytest.FixtureRequest) -> Path:
    """The folder of each kustomization."""
    return ROOT / "k8s" / str(request.param)


@pytest.fixture
def pod(folder: Path) -> dict[str, Any]:
    """The pod of each kustomization's Deployment or Job."""
    (found,) = [
        manifest["spec"]["template"]["spec"] for manifest in resources(folder) if "template" in manifest["spec"]
    ]
    spec: dict[str, Any] = found
    return spec


@pytest.fixture
def gateway_manifests() -> dict[str, list[dict[str, Any]]]:
    """The gateway's manifests by kind, as they are written."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for manifest in resources(ROOT / "k8s" / "base"):
        kinds.setdefault(manifest["kind"], []).append(manifest)
    return kinds


@pytest.fixture
def gateway_config() -> dict[str, str]:
    """The gateway's ConfigMap."""
    kustomization = yaml.safe_load((ROOT / "k8s" / "base" / "kustomization.yaml").read_text())
    return pairs(kustomization["configMapGenerator"][0]["literals"])


@pytest.fixture
def settings_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[Mapping[str, str]], Settings]:
    """Read the settings from these variables alone; one that is no setting fails the test."""

    def read(environment: Mapping[str, str]) -> Settings:
        for name in [name for name in os.environ if name.startswith("PORTCULLIS_")]:
            monkeypatch.delenv(name)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        given = {name.removeprefix("PORTCULLIS_").lower() for name in environment if name.startswith("PORTCULLIS_")}
        assert given <= set(Settings.model_fields)
        return Settings()

    return read


@pytest.fixture(scope="session")
def manifests_of() -> Callable[[Path], list[dict[str, Any]]]:
    """Read every manifest that a kustomization lists."""
    return resources


@pytest.fixture(scope="session")
def longest_stop() -> Callable[[Settings], float]:
    """Tell how many seconds a stop takes at most: what is on its way, requests, alerts that wait, SQLite's lock."""
    return lambda settings: DRAIN_SECONDS + 2 * settings.shutdown_seconds + _SQLITE_BUSY_MILLISECONDS / 1000


def resources(folder: Path) -> list[dict[str, Any]]:
    """Read every manifest that a kustomization lists."""
    listed = yaml.safe_load((folder / "kustomization.yaml").read_text())["resources"]
    return [manifest for file in listed for manifest in yaml.safe_load_all((folder / file).read_text())]


def pairs(words: list[str]) -> dict[str, str]:
    """Split NAME=VALUE words."""
    return dict(word.split("=", 1) for word in words)
