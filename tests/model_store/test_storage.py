"""The contract of a storage, on every backend, and what is particular to a local folder."""

from pathlib import Path

import pytest

from model_store import Draft, Storage, StorageFailed, Store


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class TestStaging:
    """What the store relies on: versions appear whole, once, and aliases change only from a known state."""

    def test_a_version_number_is_given_once(self, storage: Storage, store: Store, draft: Draft, payload: Path) -> None:
        store.publish("m", draft, payload)
        published = contents(storage.folder("m", 1))
        with storage.stage("m", payload, ["report.html"]) as staging:
            assert staging.files["report.html"].size == len("<p>0.91</p>")
            with pytest.raises(FileExistsError, match="already has a version 1"):
                staging.commit(1, {"manifest.json": b"{}"})
            assert storage.versions("m") == [1]
            staging.commit(2, {"manifest.json": b"{}"})
        assert storage.versions("m") == [1, 2]
        assert contents(storage.folder("m", 1)) == published
        assert contents(storage.folder("m", 2)) == {"manifest.json": b"{}", "report.html": b"<p>0.91</p>"}

    def test_what_is_not_committed_is_dropped(self, storage: Storage, payload: Path) -> None:
        with storage.stage("m", payload, ["report.html"]):
            assert storage.models() == []
        assert storage.models() == []
        assert storage.prune("m") == 0

    def test_a_slow_publisher_is_not_pruned_and_gets_the_next_free_number(
        self, storage: Storage, store: Store, draft: Draft, payload: Path
    ) -> None:
        with storage.stage("m", payload, ["report.html"]) as slow:
            assert store.publish("m", draft, payload).version == 1
            assert store.prune_abandoned("m") == 0
            assert store.publish("m", draft, payload).version == 2
            slow.commit(3, {"manifest.json": b"{}"})
        assert storage.read("m", 3, "report.html") == b"<p>0.91</p>"

    def test_a_file_that_is_not_there_reads_as_none(
        self, storage: Storage, store: Store, draft: Draft, payload: Path
    ) -> None:
        store.publish("m", draft, payload)
        assert storage.read("m", 1, "report.html") == b"<p>0.91</p>"
        assert storage.read("m", 1, "absent.json") is None
        assert storage.read("m", 2, "report.html") is None
        assert storage.read_aliases("m") is None

    def test_aliases_are_written_only_over_the_state_that_was_read(
        self, storage: Storage, store: Store, draft: Draft, payload: Path
    ) -> None:
        store.publish("m", draft, payload)
        assert not storage.write_aliases("m", b"{}", "some etag")
        assert storage.write_aliases("m", b'{"a": 1}', None)
        assert not storage.write_aliases("m", b"{}", None)
        first = storage.read_aliases("m")
        assert first is not None
        assert first[0] == b'{"a": 1}'
        assert storage.write_aliases("m", b'{"a": 2}', first[1])
        assert not storage.write_aliases("m", b'{"a": 3}', first[1])
        second = storage.read_aliases("m")
        assert second is not None
        assert second[0] == b'{"a": 2}'


class TestLocalFolder:
    """What is particular to a folder: its layout, and strangers in it."""

    def test_the_layout_is_a_model_repository(self, root: Path, draft: Draft, payload: Path) -> None:
        store = Store.open(root)
        store.publish("m", draft, payload)
        store.set_alias("m", "serving", 1)
        assert {path.name for path in (root / "m").iterdir() if not path.name.startswith(".")} == {"1", "aliases.json"}
        assert (root / "m" / "aliases.json").read_text() == '{\n  "serving": 1\n}\n'
        assert store.fetch("m").folder == root / "m" / "1"

    def test_strangers_in_the_folder_are_no_models_and_no_versions(
        self, root: Path, draft: Draft, payload: Path
    ) -> None:
        store = Store.open(root)
        store.publish("m", draft, payload)
        for stranger in ("Upper/1", "m/notes", "m/02", "m/0", "empty", "lost+found"):
            (root / stranger).mkdir(parents=True)
        (root / "readme.txt").write_text("x")
        (root / "m" / "3").write_text("x")
        assert store.models() == ["m"]
        assert store.versions("m") == [1]
        assert store.versions("readme.txt") == []
        assert store.aliases("readme.txt") == {}
        assert [store.publish("m", draft, payload).version for _ in range(2)] == [2, 4]
        assert (root / "m" / "3").read_text() == "x"

    def test_a_root_that_cannot_be_a_folder_is_told(self, tmp_path: Path, draft: Draft, payload: Path) -> None:
        (tmp_path / "file").write_text("x")
        with pytest.raises(StorageFailed, match="Model 'm' could not be published: Not a directory") as caught:
            Store.open(tmp_path / "file").publish("m", draft, payload)
        assert isinstance(caught.value, OSError)
        assert caught.value.errno == 20
