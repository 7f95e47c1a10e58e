"""What the documents list is what there is: settings, routes, metrics, commands."""

import re
from pathlib import Path

import pytest
from pydantic.fields import FieldInfo
from typer.main import get_command

from service.app import create_app
from service.cli import app as cli
from service.metrics import Metrics
from service.settings import Settings

ROOT = Path(__file__).parents[1]
OPERATIONS = (ROOT / "docs" / "operations.md").read_text()
README = (ROOT / "README.md").read_text()


def rows(heading: str) -> list[list[str]]:
    """Return the cells of the table under a heading."""
    section = OPERATIONS.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def default_of(field: FieldInfo) -> str:
    value = field.default
    if value is None or value in ((), {}):
        return "unset"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        return f"`{','.join(str(part) for part in value)}`"
    return f"`{value}`"


def test_every_setting_is_documented_with_its_default_and_meaning():
    documented = {row[0]: (row[1], row[2]) for row in rows("Settings")}
    expected = {
        f"`PORTCULLIS_{name.upper()}`": (default_of(field), field.description)
        for name, field in Settings.model_fields.items()
    }
    assert documented == expected


def test_every_route_is_documented():
    documented = {tuple(row[0].strip("`").split(" ")) for row in rows("Routes")}
    paths = create_app(Settings()).openapi()["paths"]
    routes = {(method.upper(), path) for path, methods in paths.items() for method in methods}
    assert len(routes) > 15
    assert documented == {*routes, ("GET", "/docs")}


def test_every_metric_is_documented_with_its_labels():
    documented = {row[0].strip("`"): row[1] for row in rows("Metrics")}
    metrics = Metrics()
    exposed = {}
    for collector in list(metrics.registry._collector_to_names):
        labels = ", ".join(f"`{label}`" for label in collector._labelnames)
        suffix = "_total" if collector._type == "counter" else ""
        exposed[f"{collector._name}{suffix}"] = labels or "none"
    assert documented == exposed


def commands() -> list[tuple[str, str]]:
    found = []
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = re.sub(r"\\\n\s*", " ", path.read_text())
        found += [(path.name, line.strip()) for line in re.findall(r"^ *(?:\$ )?(portcullis .+)$", text, re.MULTILINE)]
    return found


@pytest.mark.parametrize(("document", "line"), commands())
def test_every_command_in_the_documents_is_one_that_the_command_line_takes(document, line):
    import shlex

    words = shlex.split(line, comments=True)[1:]
    command = get_command(cli)
    context = command.make_context("portcullis", [], resilient_parsing=True)
    while hasattr(command, "get_command"):
        name, command, words = command.resolve_command(context, words)
        assert command is not None, f"{document}: no command {name}"
    command.make_context(command.name, words)


def test_the_readmes_first_screen_holds_the_two_commands():
    first_screen = "\n".join(README.splitlines()[:25])
    assert "make demo" in first_screen
    assert "make test" in first_screen


@pytest.mark.parametrize(
    "path", ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
)
def test_every_link_to_a_file_leads_somewhere(path):
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", (ROOT / path).read_text()):
        assert ((ROOT / path).parent / target).exists(), target
