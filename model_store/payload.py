"""What may be published, and whether what was published is still what is there."""

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from model_store.errors import ArtifactCorrupt, PayloadRefused
from model_store.files import is_regular, scan, sha256_of, storage_failures
from model_store.manifest import MANIFEST_FILE, FileRecord, Manifest, check_path

DIGEST_FILE: Final = f"{MANIFEST_FILE}.sha256"
PAYLOAD_SUFFIXES: Final = (".onnx", ".onnx.data", ".safetensors", ".json", ".html")


def list_payload(folder: Path) -> list[str]:
    """List the files of a folder that is to be published, by relative posix path, or raise PayloadRefused."""
    if not folder.is_dir():
        raise PayloadRefused(folder, None, "it is not a folder")
    with storage_failures("The folder to publish could not be read"):
        found = scan(folder)
    if not found:
        raise PayloadRefused(folder, None, "it holds no files")
    for file, status in found.items():
        if not is_regular(status):
            raise PayloadRefused(folder, file, "it is a link or a special file, and only regular files are kept")
        if not file.endswith(PAYLOAD_SUFFIXES):
            raise PayloadRefused(folder, file, f"its name should end in one of {', '.join(PAYLOAD_SUFFIXES)}")
        try:
            check_path(file)
        except ValueError as error:
            raise PayloadRefused(folder, file, str(error)) from error
    return list(found)


def faults(manifest: Manifest, folder: Path) -> Iterator[ArtifactCorrupt]:
    """Compare the folder of a version with its manifest, byte for byte; yield one error per file that differs."""

    def fault(file: str, expected: str, actual: str) -> ArtifactCorrupt:
        return ArtifactCorrupt(manifest.name, manifest.version, file, expected, actual)

    with storage_failures(f"Model {manifest.name!r} version {manifest.version} could not be read"):
        found = scan(folder)
        for file, status in found.items():
            if not is_regular(status):
                yield fault(file, "a regular file", "a link or a special file")
            elif file not in manifest.files and file not in {MANIFEST_FILE, DIGEST_FILE}:
                yield fault(file, "absent, since the manifest does not list it", "present")
        for file, record in manifest.files.items():
            if file not in found:
                yield fault(file, "a file", "missing")
            elif is_regular(found[file]) and (difference := _difference(folder / file, record, found[file].st_size)):
                yield fault(file, *difference)


def _difference(path: Path, record: FileRecord, size: int) -> tuple[str, str] | None:
    if size != record.size:
        return f"{record.size} bytes long", f"{size} bytes long"
    digest = sha256_of(path)
    return None if digest == record.sha256 else (f"of the SHA-256 {record.sha256!r}", f"of {digest!r}")
