"""What the Dockerfile builds: what goes in, as whom it runs, and what it is told."""

import re
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

from service.version import VERSION

IMAGES = ("serve", "fit")


def copied(instructions) -> list[str]:
    """The paths that COPY takes from the project."""
    words = [argument.split() for instruction, argument in instructions if instruction == "COPY"]
    return [word for line in words for word in line[:-1] if not word.startswith("--")]


def test_the_gateway_is_what_a_build_without_a_target_gives(stages):
    assert list(stages)[-1] == "serve"


def test_every_stage_stands_on_the_slim_python_or_on_another_stage(stages):
    assert {instructions[0][1] for instructions in stages.values()} - set(stages) == {"python:3.11-slim"}


def test_everything_copied_exists_and_reaches_the_build(stages, root):
    patterns = [line for line in (root / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert patterns[0] == "*"
    sources = [source for instructions in stages.values() for source in copied(instructions)]
    assert len(sources) >= 5
    for source in sources:
        assert (root / source).exists(), source
        assert f"!{source}" in patterns, source


def test_nothing_but_what_is_copied_reaches_the_build(stages, root):
    sources = {source for instructions in stages.values() for source in copied(instructions)}
    patterns = (root / ".dockerignore").read_text().splitlines()
    assert {pattern[1:] for pattern in patterns if pattern.startswith("!")} == sources


def test_every_package_of_the_distribution_is_copied(stages, root):
    include = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]["include"]
    packages = {
        path.parent.name for path in root.glob("*/__init__.py") if any(fnmatch(path.parent.name, p) for p in include)
    }
    assert {"service", "defenses", "model_store"} <= packages
    assert packages <= set(copied(stages["wheels"]))


def test_the_serving_image_installs_no_extra(stages):
    chain = stages["serve"] + stages["runtime"] + stages["wheels"]
    commands = " ".join(argument for instruction, argument in chain if instruction == "RUN")
    assert "pip wheel --wheel-dir /wheels . " in commands
    assert not re.search(r"\[\w+\]", commands)


def test_the_fitting_image_adds_the_extra_that_fits(stages):
    assert any("'.[fit]'" in argument for _, argument in stages["fit-wheels"])


@pytest.mark.parametrize("name", IMAGES)
def test_nothing_is_compiled_or_fetched_in_what_is_shipped(stages, name):
    for instruction, argument in stages["runtime"] + stages[name]:
        assert not (instruction == "RUN" and re.search(r"\b(apt-get|apt|gcc|git|curl)\b", argument))
        if "pip install" in argument:
            assert "--no-index" in argument


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_runs_as_a_numbered_user_that_is_not_root(image, name):
    user, group = image(name)["USER"].split(":")
    assert int(user) > 0
    assert int(group) > 0


@pytest.mark.parametrize("name", IMAGES)
def test_the_user_exists_and_owns_the_folders_that_are_mounted(stages, image, name):
    commands = " ".join(argument for instruction, argument in stages["runtime"] if instruction == "RUN")
    user, group = image(name)["USER"].split(":")
    assert f"groupadd --gid {group} portcullis" in commands
    assert f"useradd --uid {user} --gid {group}" in commands
    assert "--owner portcullis --group portcullis /data /store" in commands


def test_the_gateway_image_starts_the_gateway_with_no_shell_between(image):
    described = image("serve")
    assert described["ENTRYPOINT"] == ["portcullis"]
    assert described["CMD"] == ["serve"]


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_carries_its_title_description_and_version(image, name):
    labels = image(name)["LABEL"]
    prefix = "org.opencontainers.image."
    assert labels[f"{prefix}version"] == VERSION
    assert labels[f"{prefix}title"]
    assert labels[f"{prefix}description"]


def test_the_gateway_image_writes_to_data_alone_and_listens_to_all_on_the_exposed_port(image, settings_of):
    described = image("serve")
    settings = settings_of(described["ENV"])
    assert settings.database == "sqlite+aiosqlite:////data/alerts.db"
    assert settings.inputs == Path("/data/inputs")
    assert settings.store == Path("/store")
    assert described["WORKDIR"] == "/data"
    assert (settings.host, settings.port) == ("0.0.0.0", int(described["EXPOSE"]))


def test_a_gateway_that_listens_to_all_tells_no_scores_by_default(image, settings_of):
    assert settings_of(image("serve")["ENV"]).disclosure == "label"
