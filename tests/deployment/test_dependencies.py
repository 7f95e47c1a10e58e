"""What installing the package pulls in: a serving machine gets no torch."""

import tomllib
from importlib.metadata import PackageNotFoundError, requires

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

FITTING = {
    "adversarial-robustness-toolbox",
    "filelock",
    "foolbox",
    "jinja2",
    "matplotlib",
    "onnxscript",
    "pyautoattack",
    "safetensors",
    "scikit-learn",
    "scipy",
    "torch",
    "torchvision",
}


@pytest.fixture
def project(root):
    """The project's own declarations."""
    return tomllib.loads((root / "pyproject.toml").read_text())["project"]


def closure(declared: list[str]) -> set[str]:
    """Names of all packages that these requirements bring to this machine, directly or not."""
    found: set[tuple[str, str]] = set()
    waiting = [(requirement, "") for requirement in map(Requirement, declared)]
    while waiting:
        requirement, extra = waiting.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        for wanted in ("", *requirement.extras):
            if (name, wanted) not in found:
                found.add((name, wanted))
                waiting += [(Requirement(line), wanted) for line in requires_of(name)]
    return {name for name, _ in found}


def requires_of(name: str) -> list[str]:
    try:
        return requires(name) or []
    except PackageNotFoundError as error:
        raise AssertionError(f"{name} is required but not installed, so what it brings is unknown.") from error


def test_serving_brings_none_of_what_fitting_needs(project):
    found = closure(project["dependencies"])
    assert found.isdisjoint(FITTING)
    assert {"starlette", "numpy", "pydantic-core"} <= found


def test_fitting_brings_torch(project):
    assert "torch" in closure(project["dependencies"] + project["optional-dependencies"]["fit"])


def test_what_counts_as_fitting_is_what_the_extras_of_fitting_name(project):
    extras = project["optional-dependencies"]
    assert {canonicalize_name(Requirement(line).name) for line in extras["fit"] + extras["torchvision"]} == FITTING
