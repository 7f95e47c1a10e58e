"""The store of models: publish a version, point aliases at it, fetch it verified."""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from typing import Annotated, Final, Literal, Self

from pydantic import Field, TypeAdapter, ValidationError

from model_store.errors import (
    AliasConflict,
    ArtifactCorrupt,
    ArtifactNotFound,
    NameInvalid,
    StorageFailed,
    VersionExists,
)
from model_store.manifest import MANIFEST_FILE, Draft, Manifest
from model_store.payload import DIGEST_FILE, faults, list_payload
from model_store.storage import LocalStorage, Storage

SERVING: Final = "serving"

_ALIASES_FILE = "aliases.json"
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_NUMBER = re.compile(r"[0-9]{1,18}")
_DIGEST_LINE = re.compile(rb"[0-9a-f]{64}  manifest\.json\n")
_ALIASES: TypeAdapter[dict[str, int]] = TypeAdapter(dict[str, Annotated[int, Field(ge=1, strict=True)]])


class _Expectation(Enum):
    ANY = "any"


ANY: Final = _Expectation.ANY
"""What `Store.set_alias` expects when it does not matter where the alias pointed."""


@dataclass(frozen=True)
class Fetched:
    """A verified version: its manifest, the local folder with its files, and the SHA-256 of its manifest."""

    manifest: Manifest
    folder: Path
    digest: str


@dataclass(frozen=True)
class Problem:
    """Something that is wrong in the store; `version` and `file` are None where it is not about one."""

    name: str
    version: int | None
    file: str | None
    message: str


def parse_reference(text: str) -> tuple[str, int | str | None]:
    """Split "NAME", "NAME@3" or "NAME@serving" into the name and a version, an alias or None.

    Raises NameInvalid where the text is none of them.
    """
    name, separator, ref = text.partition("@")
    _check_name(name)
    if not separator:
        return name, None
    return name, _parse_ref(ref)


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise NameInvalid(
            name,
            "a model's name begins with a lower-case ASCII letter or a digit, goes on with those, '.', '_' or '-', "
            "and has at most 63 characters",
        )


def _parse_ref(ref: str) -> int | str:
    if _NUMBER.fullmatch(ref):
        return int(ref)
    if not _NAME.fullmatch(ref) or ref.isdigit():
        raise NameInvalid(
            ref,
            "a version is a number, and an alias begins with a lower-case ASCII letter or a digit, goes on with "
            "those, '.', '_' or '-', has at most 63 characters and is not a number",
        )
    return ref


def _digest_line(content: bytes) -> bytes:
    # The line that `sha256sum --check` reads, so that a version can be checked by hand.
    return f"{hashlib.sha256(content).hexdigest()}  {MANIFEST_FILE}\n".encode()


class Store:
    """Versioned, checksummed, immutable models, kept by a storage.

    A version is visible only when complete and never changes; aliases are what moves. Every method raises
    NameInvalid for a name that no model can have, and StorageFailed where the storage cannot be read or written.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    @classmethod
    def open(cls, root: Path) -> Self:
        """Open the store in a local folder; one that does not exist has no models and is created by publishing."""
        return cls(LocalStorage(root))

    def publish(self, name: str, draft: Draft, folder: Path) -> Manifest:
        """Copy all files of a folder into the next version of a model, and return its manifest.

        Nothing is visible before everything is on the disk. Raises PayloadRefused, before anything is written,
        unless all files are regular ones that end in .onnx, .onnx.data, .safetensors, .json or .html.
        """
        _check_name(name)
        files = list_payload(folder)
        created = datetime.now(UTC)
        self._storage.prune(name)
        with self._storage.stage(name, folder, files) as staging:
            version = self._newest(name) + 1
            while True:
                manifest = Manifest.of(draft, name, version, created, staging.files)
                content = manifest.to_json()
                try:
                    staging.commit(version, {DIGEST_FILE: _digest_line(content), MANIFEST_FILE: content})
                except VersionExists:
                    version = max(version, self._newest(name)) + 1
                else:
                    return manifest

    def _newest(self, name: str) -> int:
        return max(self._storage.versions(name), default=0)

    def prune_abandoned(self, name: str) -> int:
        """Remove what killed publishers of a model left behind, as publishing does; return how many there were."""
        _check_name(name)
        return self._storage.prune(name)

    def fetch(self, name: str, ref: int | str | None = None) -> Fetched:
        """Find a version by number or alias (None: the alias "serving") and verify every byte of it.

        Raises ArtifactNotFound, or ArtifactCorrupt for the first file that is not what was published.
        """
        version = self._version(name, ref)
        manifest, digest = self._read_manifest(name, version)
        folder = self._storage.folder(name, version)
        for fault in faults(manifest, folder):
            raise fault
        return Fetched(manifest, folder, digest)

    def manifest(self, name: str, ref: int | str | None = None) -> Manifest:
        """Read a version's manifest, verified, without its files. Raises ArtifactNotFound and ArtifactCorrupt."""
        return self._read_manifest(name, self._version(name, ref))[0]

    def digest(self, name: str, version: int) -> str:
        """Give the SHA-256 of a version's manifest, verified. Raises ArtifactNotFound and ArtifactCorrupt."""
        return self._read_manifest(name, self._version(name, version))[1]

    def models(self) -> list[str]:
        """List the names of all models, sorted."""
        return [name for name in self._storage.models() if _NAME.fullmatch(name)]

    def versions(self, name: str) -> list[int]:
        """List the versions of a model in ascending order; an unknown model has none."""
        _check_name(name)
        return self._storage.versions(name)

    def latest(self, name: str) -> int:
        """Give the highest version of a model, or raise ArtifactNotFound."""
        versions = self.versions(name)
        if not versions:
            raise ArtifactNotFound(name)
        return versions[-1]

    def aliases(self, name: str) -> dict[str, int]:
        """Map each alias of a model to its version; an unknown model has none. Raises ArtifactCorrupt."""
        return self._read_aliases(name)[0]

    def set_alias(
        self, name: str, alias: str, version: int, *, expected: int | Literal[_Expectation.ANY] | None = ANY
    ) -> None:
        """Point an alias at an existing version, atomically.

        Raises AliasConflict unless the alias points to the `expected` version at that moment (None: does not exist
        yet; ANY: wherever it points), ArtifactNotFound for a version that does not exist, and ArtifactCorrupt.
        """
        if isinstance(_parse_ref(alias), int):
            raise NameInvalid(alias, "an alias is not a number")
        self._version(name, version)
        while True:
            aliases, etag = self._read_aliases(name)
            if expected is not ANY and aliases.get(alias) != expected:
                raise AliasConflict(name, alias, expected, aliases.get(alias))
            content = json.dumps(aliases | {alias: version}, indent=2, sort_keys=True).encode() + b"\n"
            if self._storage.write_aliases(name, content, etag):
                return

    def verify(self, name: str | None = None) -> list[Problem]:
        """Check every byte of every version, and the aliases, of one model or of all; list what is wrong.

        Raises ArtifactNotFound for an unknown model.
        """
        if name is None:
            return [problem for model in self.models() for problem in self._problems(model)]
        self.latest(name)
        return list(self._problems(name))

    def _problems(self, name: str) -> Iterator[Problem]:
        versions = self.versions(name)
        for version in versions:
            try:
                manifest, _ = self._read_manifest(name, version)
                for fault in faults(manifest, self._storage.folder(name, version)):
                    yield Problem(name, version, fault.file, str(fault))
            except ArtifactCorrupt as error:
                yield Problem(name, version, error.file, str(error))
            except StorageFailed as error:
                yield Problem(name, version, None, str(error))
        try:
            for alias, version in self.aliases(name).items():
                if version not in versions:
                    message = f"Alias {alias!r} of model {name!r} points to version {version}, which does not exist."
                    yield Problem(name, version, _ALIASES_FILE, message)
        except (ArtifactCorrupt, StorageFailed) as error:
            yield Problem(name, None, _ALIASES_FILE, str(error))

    def _version(self, name: str, ref: int | str | None) -> int:
        versions = self.versions(name)
        if not versions:
            raise ArtifactNotFound(name)
        if ref is None:
            ref = SERVING
        version = _parse_ref(ref) if isinstance(ref, str) else ref
        if isinstance(version, str):
            aliases = self.aliases(name)
            if version not in aliases:
                raise ArtifactNotFound(name, version, f"its aliases are {', '.join(aliases) or 'none'}")
            version = aliases[version]
        if version not in versions:
            raise ArtifactNotFound(name, version, f"its latest version is {versions[-1]}")
        return version

    def _read_manifest(self, name: str, version: int) -> tuple[Manifest, str]:
        content = self._read_document(name, version, MANIFEST_FILE)
        digest = hashlib.sha256(content).hexdigest()
        line = self._read_document(name, version, DIGEST_FILE)
        if not _DIGEST_LINE.fullmatch(line):
            expected = f"a line of a SHA-256 and {MANIFEST_FILE!r}"
            raise ArtifactCorrupt(name, version, DIGEST_FILE, expected, "something else")
        if line != _digest_line(content):
            expected, found = f"of the SHA-256 {line[:64].decode()!r}, as {DIGEST_FILE} says", f"of {digest!r}"
            raise ArtifactCorrupt(name, version, MANIFEST_FILE, expected, found)
        try:
            manifest = Manifest.model_validate_json(content)
        except ValidationError as error:
            first = error.errors()[0]
            found = f"invalid at {'.'.join(str(part) for part in first['loc'])!r}: {first['msg']}"
            raise ArtifactCorrupt(name, version, MANIFEST_FILE, "a manifest of schema version 1", found) from error
        if (manifest.name, manifest.version) != (name, version):
            found = f"that of model {manifest.name!r} version {manifest.version}"
            raise ArtifactCorrupt(name, version, MANIFEST_FILE, "the manifest of this version", found)
        return manifest, digest

    def _read_document(self, name: str, version: int, file: str) -> bytes:
        content = self._storage.read(name, version, file)
        if content is None:
            raise ArtifactCorrupt(name, version, file, "a file", "missing")
        return content

    def _read_aliases(self, name: str) -> tuple[dict[str, int], str | None]:
        _check_name(name)
        present = self._storage.read_aliases(name)
        if present is None:
            return {}, None
        content, etag = present
        try:
            return _ALIASES.validate_json(content), etag
        except ValidationError as error:
            found = str(error.errors()[0]["msg"])
            raise ArtifactCorrupt(name, None, _ALIASES_FILE, "a JSON object of versions by alias", found) from error
