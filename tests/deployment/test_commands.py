"""Every command line and every setting that the deployment and its document name is one that exists."""

import re
import shlex

import pytest
from typer.main import get_command

from service.cli import app
from service.settings import Settings

PLACES = ("docker", "k8s", "docs/deployment.md")
WHERE_OURS_BEGINS = re.compile(r"(?:^|\s)(?:portcullis|portcullis(?:-fit)?:\S+|run .*?\bcli)\s+(?=[a-z-])(.+)")


def check_accepted(words: list[str]) -> None:
    """Fail unless the command line takes these arguments; nothing is run."""
    command, rest = get_command(app), list(words)
    while hasattr(command, "commands"):
        assert rest, f"{shlex.join(words)} names no command"
        if rest == ["--help"]:
            return
        command = command.commands[rest.pop(0)]
    command.make_context(command.name, rest)


def commands_of_the_document(text: str) -> list[list[str]]:
    """The arguments that the indented lines of a document give to the command line, in a container or not."""
    lines = re.findall(r"^    (.+)$", re.sub(r"\\\n\s*", " ", text), re.MULTILINE)
    lines = [line for line in lines if not line.startswith("docker build")]
    return [shlex.split(found[1]) for line in lines if (found := WHERE_OURS_BEGINS.search(line))]


@pytest.fixture
def files(root):
    """The text of every file of the deployment."""
    paths = [root / place for place in PLACES]
    return {
        path: path.read_text()
        for place in paths
        for path in ([place] if place.is_file() else sorted(place.rglob("*")))
        if path.is_file() and path.suffix != ".pyc"
    }


@pytest.mark.parametrize("name", ["serve", "fit"])
def test_an_images_command_is_accepted(image, name):
    described = image(name)
    assert described["ENTRYPOINT"] == ["portcullis"]
    check_accepted(described["CMD"])


def test_every_pods_arguments_are_accepted(pod):
    (container,) = pod["containers"]
    assert "command" not in container
    check_accepted(container["args"])


def test_every_command_in_the_document_is_accepted(root):
    found = commands_of_the_document((root / "docs" / "deployment.md").read_text())
    assert {words[0] for words in found} == {"register", "fit", "alerts"}
    for words in found:
        check_accepted(words)


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("deploy", "'deploy'"),
        ("fit nap my-classifier --data digits", "'nap'"),
        ("fit coophance my-classifier", "Missing parameter: data"),
        ("serve --workers 2", "No such option: --workers"),
    ],
)
def test_a_command_that_does_not_exist_would_be_refused(line, fault):
    with pytest.raises(Exception, match=fault):
        check_accepted(shlex.split(line))


def test_every_setting_named_anywhere_exists(files):
    named = {name.lower() for text in files.values() for name in re.findall(r"PORTCULLIS_([A-Z][A-Z_]*[A-Z])", text)}
    assert len(named) >= 8
    assert named <= Settings.model_fields.keys()


def test_services_that_the_document_calls_are_those_of_compose(root, compose):
    text = re.sub(r"\\\n\s*", " ", (root / "docs" / "deployment.md").read_text())
    for line in re.findall(r"^    (docker compose .+)$", text, re.MULTILINE):
        assert (root / line.split()[3]).is_file(), line
        called = [service for service in compose["services"] if re.search(rf"\s{service}\b", line)]
        assert called or " up " in line, line


def test_kustomizations_and_names_in_the_document_exist(root, gateway_manifests):
    text = (root / "docs" / "deployment.md").read_text()
    folders = re.findall(r"kubectl apply -k (\S+)", text)
    assert len(folders) == 3
    for folder in folders:
        assert (root / folder / "kustomization.yaml").is_file()
    (deployment,) = gateway_manifests["Deployment"]
    assert set(re.findall(r"deployment/(\S+)", text)) == {deployment["metadata"]["name"]}


def test_no_file_of_the_deployment_names_a_registry(files, compose):
    images = [service["image"] for service in compose["services"].values()]
    images += re.findall(r"^FROM (\S+)", "\n".join(files.values()), re.MULTILINE)
    images += re.findall(r"image: (\S+)", "\n".join(files.values()))
    assert len(images) >= 8
    for image in images:
        head, slash, _ = image.partition("/")
        assert not (slash and re.search(r"[.:]|localhost", head)), image
