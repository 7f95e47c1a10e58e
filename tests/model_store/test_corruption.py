"""Whatever happens to a published file, it is refused by name, and the other versions stay usable."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from model_store import ArtifactCorrupt, ArtifactNotFound, Draft, Problem, Store


@pytest.fixture
def store(root: Path, draft: Draft, payload: Path) -> Store:
    """A local store with three sound versions, of which version 2 is going to be damaged."""
    store = Store.open(root)
    for _ in range(3):
        store.publish("m", draft, payload)
    store.set_alias("m", "serving", 1)
    return store


def rewrite(path: Path, change: Callable[[bytes], bytes]) -> None:
    content = change(path.read_bytes())
    path.unlink()
    path.write_bytes(content)


def flip_a_bit(version: Path) -> None:
    rewrite(version / "model.onnx.data", lambda content: content[:3000] + bytes([content[3000] ^ 1]) + content[3001:])


def truncate(version: Path) -> None:
    rewrite(version / "checkpoint" / "regulator.safetensors", lambda content: content[:-1])


def lengthen(version: Path) -> None:
    rewrite(version / "report.html", lambda content: content + b"\n")


def empty(version: Path) -> None:
    rewrite(version / "model.onnx", lambda _: b"")


def remove(version: Path) -> None:
    (version / "checkpoint" / "config.json").unlink()


def add(version: Path) -> None:
    (version / "checkpoint" / "extra.pkl").write_bytes(b"x")


def add_a_link(version: Path) -> None:
    (version / "link").symlink_to("/etc")


def replace_by_a_link(version: Path) -> None:
    shutil.move(version / "model.onnx", version.parent / "moved.onnx")
    (version / "model.onnx").symlink_to(version.parent / "moved.onnx")


def replace_by_a_folder(version: Path) -> None:
    (version / "model.onnx").unlink()
    (version / "model.onnx").mkdir()


def edit_manifest(version: Path) -> None:
    rewrite(version / "manifest.json", lambda content: content.replace(b'"threshold": 0.75', b'"threshold": 9.75'))


def remove_manifest(version: Path) -> None:
    (version / "manifest.json").unlink()


def remove_manifest_digest(version: Path) -> None:
    (version / "manifest.json.sha256").unlink()


def garble_manifest_digest(version: Path) -> None:
    rewrite(version / "manifest.json.sha256", lambda content: b"\xff" + content[1:])


def seal(version: Path, content: bytes) -> None:
    digest = hashlib.sha256(content).hexdigest()
    rewrite(version / "manifest.json", lambda _: content)
    rewrite(version / "manifest.json.sha256", lambda _: f"{digest}  manifest.json\n".encode())


def garble_manifest_and_seal_it(version: Path) -> None:
    seal(version, b"\x00\xffnot json")


def drop_a_field_and_seal_it(version: Path) -> None:
    fields = json.loads((version / "manifest.json").read_bytes())
    del fields["input"]["shape"]
    seal(version, json.dumps(fields).encode())


def put_another_version_in_its_place(version: Path) -> None:
    shutil.rmtree(version)
    shutil.copytree(version.parent / "3", version)


DAMAGES: list[tuple[Callable[[Path], None], str, str]] = [
    (flip_a_bit, "model.onnx.data", r"should be of the SHA-256 '[0-9a-f]{64}', but is of '[0-9a-f]{64}'"),
    (truncate, "checkpoint/regulator.safetensors", "should be 3501 bytes long, but is 3500 bytes long"),
    (lengthen, "report.html", "should be 11 bytes long, but is 12 bytes long"),
    (empty, "model.onnx", "should be 4096 bytes long, but is 0 bytes long"),
    (remove, "checkpoint/config.json", "should be a file, but is missing"),
    (add, "checkpoint/extra.pkl", "should be absent, since the manifest does not list it, but is present"),
    (add_a_link, "link", "should be a regular file, but is a link"),
    (replace_by_a_link, "model.onnx", "should be a regular file, but is a link"),
    (replace_by_a_folder, "model.onnx", "should be a file, but is missing"),
    (edit_manifest, "manifest.json", r"as manifest.json.sha256 says, but is of '[0-9a-f]{64}'"),
    (remove_manifest, "manifest.json", "should be a file, but is missing"),
    (remove_manifest_digest, "manifest.json.sha256", "should be a file, but is missing"),
    (garble_manifest_digest, "manifest.json.sha256", "should be a line of a SHA-256 and 'manifest.json'"),
    (garble_manifest_and_seal_it, "manifest.json", "should be a manifest of schema version 1, but is invalid"),
    (drop_a_field_and_seal_it, "manifest.json", "invalid at 'input.shape': Field required"),
    (put_another_version_in_its_place, "manifest.json", "but is that of model 'm' version 3"),
]


@pytest.mark.parametrize(("damage", "file", "sentence"), DAMAGES, ids=[damage.__name__ for damage, _, _ in DAMAGES])
def test_a_damaged_version_is_refused_by_name(
    store: Store, root: Path, damage: Callable[[Path], None], file: str, sentence: str
) -> None:
    damage(root / "m" / "2")
    with pytest.raises(ArtifactCorrupt, match=sentence) as caught:
        store.fetch("m", 2)
    error = caught.value
    assert str(error).startswith(f"Model 'm' version 2 is corrupt: {file!r} should be ")
    assert (error.name, error.version, error.file) == ("m", 2, file)
    assert error.expected in str(error)
    assert error.found in str(error)
    assert isinstance(error, ValueError)
    assert store.verify() == store.verify("m") == [Problem("m", 2, file, str(error))]
    assert [store.fetch("m", ref).manifest.version for ref in (1, 3, None)] == [1, 3, 1]


@pytest.mark.parametrize("damage", [edit_manifest, garble_manifest_and_seal_it, put_another_version_in_its_place])
def test_a_damaged_manifest_is_not_shown(store: Store, root: Path, damage: Callable[[Path], None]) -> None:
    damage(root / "m" / "2")
    for read in (store.manifest, store.digest):
        with pytest.raises(ArtifactCorrupt):
            read("m", 2)


def test_every_damaged_file_is_listed(store: Store, root: Path) -> None:
    for damage in (flip_a_bit, truncate, remove, add):
        damage(root / "m" / "2")
    remove_manifest(root / "m" / "3")
    assert [(problem.version, problem.file) for problem in store.verify()] == [
        (2, "checkpoint/extra.pkl"),
        (2, "checkpoint/config.json"),
        (2, "checkpoint/regulator.safetensors"),
        (2, "model.onnx.data"),
        (3, "manifest.json"),
    ]


def test_a_damaged_version_keeps_its_number(store: Store, root: Path, draft: Draft, payload: Path) -> None:
    remove_manifest(root / "m" / "3")
    assert store.publish("m", draft, payload).version == 4
    assert store.versions("m") == [1, 2, 3, 4]


def test_an_alias_that_points_nowhere_is_listed_and_not_followed(store: Store, root: Path) -> None:
    shutil.rmtree(root / "m" / "1")
    message = "Alias 'serving' of model 'm' points to version 1, which does not exist."
    assert store.verify() == [Problem("m", 1, "aliases.json", message)]
    with pytest.raises(ArtifactNotFound, match="no version 1"):
        store.fetch("m")


@pytest.mark.parametrize("content", [b"", b"\xff", b"[1]", b'{"serving": "1"}', b'{"serving": 0}', b'{"serving": 1'])
def test_garbled_aliases_are_refused_and_kept(store: Store, root: Path, content: bytes) -> None:
    aliases = root / "m" / "aliases.json"
    aliases.write_bytes(content)
    calls: list[Callable[[], object]] = [
        lambda: store.fetch("m"),
        lambda: store.aliases("m"),
        lambda: store.set_alias("m", "serving", 2),
    ]
    for call in calls:
        with pytest.raises(ArtifactCorrupt, match=r"^Model 'm' is corrupt: 'aliases\.json' should be a JSON object"):
            call()
    assert [(problem.version, problem.file) for problem in store.verify()] == [(None, "aliases.json")]
    assert aliases.read_bytes() == content
    assert store.fetch("m", 1).manifest.version == 1
