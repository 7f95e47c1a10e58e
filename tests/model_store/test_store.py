"""The contract of the store, on every backend."""

import hashlib
import os
import re
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from model_store import (
    AliasConflict,
    ArtifactNotFound,
    Draft,
    NameInvalid,
    PayloadRefused,
    Store,
    StoreError,
    parse_reference,
)

BAD_NAMES = ["", "..", "../m", "/m", "m/1", "M", "-m", ".m", "m m", "m\n", "mö", "m" * 64]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_empty_store_has_no_models(store: Store) -> None:
    assert store.models() == []
    assert store.versions("m") == []
    assert store.aliases("m") == {}
    assert store.verify() == []
    assert store.prune_abandoned("m") == 0


def test_what_was_published_is_fetched_byte_for_byte(store: Store, draft: Draft, payload: Path) -> None:
    before = datetime.now(UTC)
    published = store.publish("cifar10", draft, payload)
    fetched = store.fetch("cifar10", 1)

    assert fetched.manifest == published == store.manifest("cifar10", 1)
    assert Draft.model_validate(published.model_dump(include=set(Draft.model_fields))) == draft
    assert (published.name, published.version) == ("cifar10", 1)
    assert before <= published.created <= datetime.now(UTC)
    kept = contents(fetched.folder)
    document = kept.pop("manifest.json")
    line = kept.pop("manifest.json.sha256")
    assert kept == contents(payload)
    assert {file: record.size for file, record in published.files.items()} == {f: len(c) for f, c in kept.items()}
    assert all(published.files[file].sha256 == hashlib.sha256(content).hexdigest() for file, content in kept.items())
    assert fetched.digest == store.digest("cifar10", 1) == hashlib.sha256(document).hexdigest()
    assert line.decode() == f"{fetched.digest}  manifest.json\n"
    assert store.verify() == []


def test_each_publication_is_the_next_version_and_leaves_the_others_alone(
    store: Store, draft: Draft, payload: Path
) -> None:
    first = store.publish("m", draft, payload)
    digest = store.digest("m", 1)
    (payload / "report.html").write_text("<p>better</p>")
    second = store.publish("m", draft, payload)
    store.publish("other", draft, payload)

    assert store.models() == ["m", "other"]
    assert store.versions("m") == [1, 2]
    assert store.latest("m") == second.version == 2
    assert store.manifest("m", 1) == first
    assert store.digest("m", 1) == digest != store.digest("m", 2)
    assert (store.fetch("m", 1).folder / "report.html").read_text() == "<p>0.91</p>"


def test_versions_are_ordered_as_numbers(store: Store, draft: Draft, payload: Path) -> None:
    for _ in range(11):
        store.publish("m", draft, payload)
    assert store.versions("m") == list(range(1, 12))
    assert store.latest("m") == 11


def test_a_version_does_not_depend_on_the_folder_it_came_from(store: Store, draft: Draft, payload: Path) -> None:
    store.publish("m", draft, payload)
    (payload / "model.onnx").write_bytes(b"overwritten by the next fit")
    shutil.rmtree(payload / "checkpoint")
    assert store.verify() == []


def test_published_files_are_read_only(store: Store, draft: Draft, payload: Path) -> None:
    store.publish("m", draft, payload)
    files = [path for path in store.fetch("m", 1).folder.rglob("*") if path.is_file()]
    assert len(files) == 7
    assert all(path.stat().st_mode & 0o222 == 0 for path in files)


def test_no_alias_is_set_by_publishing(store: Store, draft: Draft, payload: Path) -> None:
    store.publish("m", draft, payload)
    assert store.aliases("m") == {}
    with pytest.raises(ArtifactNotFound, match=r"^Model 'm' has no alias 'serving'; its aliases are none\.$"):
        store.fetch("m")


def test_a_version_is_found_by_number_by_digits_and_by_alias(store: Store, draft: Draft, payload: Path) -> None:
    for _ in range(3):
        store.publish("m", draft, payload)
    store.set_alias("m", "serving", 2)
    store.set_alias("m", "candidate", 3)
    found = {ref: store.fetch("m", ref).manifest.version for ref in (None, "serving", "candidate", 1, "1", "03")}
    assert found == {None: 2, "serving": 2, "candidate": 3, 1: 1, "1": 1, "03": 3}
    assert store.manifest("m").version == 2


@pytest.mark.parametrize(
    ("name", "ref", "sentence"),
    [
        ("absent", None, "There is no model 'absent' in the store."),
        ("absent", 1, "There is no model 'absent' in the store."),
        ("m", 2, "Model 'm' has no version 2; its latest version is 1."),
        ("m", "2", "Model 'm' has no version 2; its latest version is 1."),
        ("m", 0, "Model 'm' has no version 0; its latest version is 1."),
        ("m", "canary", "Model 'm' has no alias 'canary'; its aliases are serving."),
    ],
)
def test_what_is_not_there_is_named(
    store: Store, draft: Draft, payload: Path, name: str, ref: int | str | None, sentence: str
) -> None:
    store.publish("m", draft, payload)
    store.set_alias("m", "serving", 1)
    for find in (store.fetch, store.manifest):
        with pytest.raises(ArtifactNotFound) as caught:
            find(name, ref)
        assert str(caught.value) == sentence
        assert isinstance(caught.value, KeyError)
        assert isinstance(caught.value, StoreError)
        assert caught.value.name == name


def test_the_latest_version_of_an_unknown_model_is_not_found(store: Store) -> None:
    for find in (store.latest, store.verify):
        with pytest.raises(ArtifactNotFound, match="no model 'absent'"):
            find("absent")


def test_reading_writes_nothing(store: Store, root: Path, draft: Draft, payload: Path) -> None:
    store.verify()
    assert not root.exists()
    store.publish("m", draft, payload)
    store.set_alias("m", "serving", 1)
    before = {path: path.stat().st_mtime_ns for path in [root, *root.rglob("*")]}
    store.fetch("m")
    store.verify()
    assert {path: path.stat().st_mtime_ns for path in [root, *root.rglob("*")]} == before


class TestNames:
    @pytest.mark.parametrize("name", BAD_NAMES)
    def test_a_bad_name_is_refused_by_every_method(self, store: Store, draft: Draft, payload: Path, name: str) -> None:
        calls: list[Callable[[], object]] = [
            lambda: store.publish(name, draft, payload),
            lambda: store.fetch(name, 1),
            lambda: store.manifest(name),
            lambda: store.digest(name, 1),
            lambda: store.versions(name),
            lambda: store.latest(name),
            lambda: store.aliases(name),
            lambda: store.set_alias(name, "serving", 1),
            lambda: store.verify(name),
            lambda: store.prune_abandoned(name),
        ]
        for call in calls:
            with pytest.raises(NameInvalid, match="a model's name begins with") as caught:
                call()
            assert isinstance(caught.value, ValueError)
        assert store.models() == []

    @pytest.mark.parametrize("name", ["m", "0", "resnet-18_v1.5", "m" * 63])
    def test_a_good_name_is_published(self, store: Store, draft: Draft, payload: Path, name: str) -> None:
        store.publish(name, draft, payload)
        assert store.models() == [name]

    @pytest.mark.parametrize("alias", ["", "Serving", "../x", "3", "9" * 30, "٣", "a b"])
    def test_a_bad_alias_is_refused(self, store: Store, draft: Draft, payload: Path, alias: str) -> None:
        store.publish("m", draft, payload)
        with pytest.raises(NameInvalid):
            store.set_alias("m", alias, 1)
        assert store.aliases("m") == {}

    @pytest.mark.parametrize(
        ("text", "parts"),
        [
            ("resnet-18", ("resnet-18", None)),
            ("m@3", ("m", 3)),
            ("m@serving", ("m", "serving")),
            ("7@7", ("7", 7)),
        ],
    )
    def test_a_reference_is_split(self, text: str, parts: tuple[str, int | str | None]) -> None:
        assert parse_reference(text) == parts

    @pytest.mark.parametrize("text", ["", "@", "m@", "@3", "m@3@4", "m@-1", "m@1.5 ", "M@3", "m@" + "9" * 30, "m@٣"])
    def test_what_is_no_reference_is_refused(self, text: str) -> None:
        with pytest.raises(NameInvalid):
            parse_reference(text)


class TestPayload:
    @pytest.mark.parametrize(
        "file",
        [
            "model.pt",
            "model.pkl",
            "checkpoint/weights.npz",
            "code.py",
            "model.onnx.bak",
            "README",
            "model.ONNX",
            "manifest.json",
            ".secret.json",
            "checkpoint/.cache/x.json",
            "with space.json",
        ],
    )
    def test_a_file_of_another_kind_is_refused_by_name(
        self, store: Store, root: Path, draft: Draft, payload: Path, file: str
    ) -> None:
        (payload / file).parent.mkdir(exist_ok=True)
        (payload / file).write_bytes(b"x")
        with pytest.raises(PayloadRefused, match=re.escape(repr(file))) as caught:
            store.publish("m", draft, payload)
        assert caught.value.file == file
        assert not root.exists()

    def test_a_link_is_refused_whether_to_a_file_or_a_folder(
        self, store: Store, root: Path, draft: Draft, payload: Path
    ) -> None:
        for name, target in {"linked.onnx": "model.onnx", "linked.json": "checkpoint", "broken.json": "absent"}.items():
            (payload / name).symlink_to(target)
            with pytest.raises(PayloadRefused, match="only regular files"):
                store.publish("m", draft, payload)
            (payload / name).unlink()
        assert not root.exists()

    def test_a_pipe_is_refused(self, store: Store, root: Path, draft: Draft, payload: Path) -> None:
        os.mkfifo(payload / "pipe.json")
        with pytest.raises(PayloadRefused, match="only regular files"):
            store.publish("m", draft, payload)
        assert not root.exists()

    def test_a_folder_without_files_is_refused(self, store: Store, root: Path, draft: Draft, tmp_path: Path) -> None:
        (tmp_path / "empty" / "checkpoint").mkdir(parents=True)
        with pytest.raises(PayloadRefused, match=r"empty cannot be published: it holds no files\.$"):
            store.publish("m", draft, tmp_path / "empty")
        with pytest.raises(PayloadRefused, match="it is not a folder"):
            store.publish("m", draft, tmp_path / "absent")
        assert not root.exists()

    def test_a_draft_that_became_invalid_publishes_nothing(self, store: Store, draft: Draft, payload: Path) -> None:
        draft.metrics["clean_accuracy"] = float("nan")
        with pytest.raises(ValueError, match="finite number"):
            store.publish("m", draft, payload)
        assert store.models() == []
        assert store.prune_abandoned("m") == 0


class TestAliases:
    @pytest.fixture(autouse=True)
    def _published(self, store: Store, draft: Draft, payload: Path) -> None:
        for _ in range(3):
            store.publish("m", draft, payload)

    def test_an_alias_moves_and_leaves_the_others_alone(self, store: Store) -> None:
        store.set_alias("m", "serving", 1)
        store.set_alias("m", "candidate", 3)
        store.set_alias("m", "serving", 2)
        assert store.aliases("m") == {"candidate": 3, "serving": 2}
        assert store.verify() == []

    def test_an_alias_moves_only_from_where_the_caller_saw_it(self, store: Store) -> None:
        store.set_alias("m", "serving", 1, expected=None)
        store.set_alias("m", "serving", 2, expected=1)
        for stale, sentence in {1: "to point to version 1, but it points to version 2", None: "not to exist"}.items():
            with pytest.raises(AliasConflict, match=sentence) as caught:
                store.set_alias("m", "serving", 3, expected=stale)
            assert (caught.value.expected, caught.value.found) == (stale, 2)
        with pytest.raises(AliasConflict, match="to point to version 1, but it does not exist"):
            store.set_alias("m", "candidate", 3, expected=1)
        assert store.aliases("m") == {"serving": 2}

    def test_an_alias_never_points_to_a_version_that_does_not_exist(self, store: Store) -> None:
        store.set_alias("m", "serving", 1)
        with pytest.raises(ArtifactNotFound, match="no version 4"):
            store.set_alias("m", "serving", 4)
        with pytest.raises(ArtifactNotFound, match="no model 'absent'"):
            store.set_alias("absent", "serving", 1)
        assert store.aliases("m") == {"serving": 1}
