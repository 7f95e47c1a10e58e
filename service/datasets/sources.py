"""Where labelled images come from: a folder, zips, scikit-learn's digits, torchvision's data sets."""

import inspect
import os
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Literal
from zipfile import BadZipFile, ZipFile

import numpy as np
from PIL import Image

from service.datasets.errors import DatasetError, ImagesDuplicated, NoImages, SourceUnreadable, StrayFiles

TORCHVISION = "torchvision:"

_PARTS = ("train", "val", "test")
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_SYSTEM_FILES = ("__MACOSX", "Thumbs.db", "desktop.ini")

Reader = Callable[[], bytes | Image.Image]
Part = Literal["train", "test"]
File = tuple[PurePosixPath, Reader]


@dataclass(frozen=True, slots=True)
class Item:
    """One image not yet read: its name in the data set, its class, and its part; None where none is kept to test."""

    name: str
    label: str
    part: Part | None
    read: Reader


@dataclass(frozen=True, slots=True)
class Collection:
    """All images of a data set, and its classes in the set's own order."""

    name: str
    labels: tuple[str, ...]
    items: tuple[Item, ...]


def open_sources(sources: Sequence[str], root: Path | None, stack: ExitStack) -> Collection:
    """List the images of one folder, of zips, of "digits" or of "torchvision:NAME"; zips stay open as long as `stack`.

    Raises DatasetError where a source cannot be read, and where files do not lie in the layouts of `load_dataset`.
    """
    if not sources:
        raise DatasetError("At least one source of images is needed, but none was given.")
    first = sources[0]
    if len(sources) == 1 and first == "digits":
        return _digits()
    if len(sources) == 1 and first.startswith(TORCHVISION):
        return _torchvision(first, root)
    if len(sources) == 1 and Path(first).is_dir():
        return _arranged(Path(first).resolve().name, sources, [_folder(Path(first))])
    files = [_zip(source, stack) for source in sources]
    path = Path(first).resolve()
    return _arranged(path.stem if len(sources) == 1 else path.parent.name, sources, files)


def _folder(folder: Path) -> list[File]:
    def refuse(error: OSError) -> None:
        raise SourceUnreadable(str(folder), str(error)) from error

    return [
        (PurePosixPath(path.relative_to(folder)), path.read_bytes)
        for parent, _, names in os.walk(folder, onerror=refuse, followlinks=True)
        for path in map(Path(parent).joinpath, names)
    ]


def _zip(source: str, stack: ExitStack) -> list[File]:
    if Path(source).is_dir() or source == "digits" or source.startswith(TORCHVISION):
        raise SourceUnreadable(source, "only zips can be given together, a folder or a named data set stands alone")
    try:
        archive = stack.enter_context(ZipFile(source))
    except FileNotFoundError as error:
        raise SourceUnreadable(source, "there is no such folder or zip") from error
    except (OSError, BadZipFile) as error:
        raise SourceUnreadable(source, f"a zip was expected, {error}") from error
    return [
        (PurePosixPath(info.filename), partial(archive.read, info)) for info in archive.infolist() if not info.is_dir()
    ]


def _arranged(name: str, sources: Sequence[str], files: Sequence[list[File]]) -> Collection:
    """Tell class and part of every file by its path, once what wraps each source is taken off."""
    readers = [file for source in files for file in _unwrapped(source)]
    partitioned = any(len(path.parts) == 3 and path.parts[0] in _PARTS for path, _ in readers)
    items, stray, present = [], [], set()
    for path, read in readers:
        if len(path.parts) == 2 + partitioned and (not partitioned or path.parts[0] in _PARTS):
            items.append((path, read))
            present.add(path.parts[0])
        elif path.suffix.lower() in _SUFFIXES:
            stray.append(str(path))
    if stray:
        raise StrayFiles(sorted(stray))
    if not items:
        raise NoImages(sources)
    repeated = [str(path) for path, count in Counter(path for path, _ in items).items() if count > 1]
    if repeated:
        raise ImagesDuplicated(sorted(repeated))
    held_out = ("test" if "test" in present else "val") if partitioned and len(present) > 1 else None
    return Collection(
        name,
        tuple(sorted({path.parts[-2] for path, _ in items})),
        tuple(Item(str(path), path.parts[-2], _part(path, held_out), read) for path, read in items),
    )


def _part(path: PurePosixPath, held_out: str | None) -> Part | None:
    if held_out is None:
        return None
    return "test" if path.parts[0] == held_out else "train"


def _unwrapped(files: list[File]) -> list[File]:
    """Drop what operating systems leave behind, and folders that hold all the rest."""
    files = [
        (path, read)
        for path, read in files
        if not any(part.startswith(".") or part in _SYSTEM_FILES for part in path.parts)
    ]
    while files:
        tops = {path.parts[0] for path, _ in files}
        depths = {len(path.parts) for path, _ in files}
        if len(tops) > 1 or not tops.isdisjoint(_PARTS) or min(depths) < 2 or max(depths) < 3:
            break
        files = [(path.relative_to(*tops), read) for path, read in files]
    return files


def _digits() -> Collection:
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    items = (
        Item(f"{index:04d}", str(target), None, partial(Image.fromarray, image))
        for index, (image, target) in enumerate(zip(pixels, digits.target, strict=True))
    )
    return Collection("digits", tuple(str(digit) for digit in range(10)), tuple(items))


def _torchvision(source: str, root: Path | None) -> Collection:
    if root is None:
        raise SourceUnreadable(source, "torchvision's data sets need a root folder to be downloaded to")
    try:
        from torchvision import datasets
    except (ImportError, OSError, RuntimeError) as error:
        raise SourceUnreadable(source, f"torchvision does not import beside this build of torch ({error})") from error
    try:
        build = getattr(datasets, source.removeprefix(TORCHVISION))
        parts: dict[Part, Any] = {"train": _built(build, root, "train"), "test": _built(build, root, "test")}
        targets = {part: _targets(built) for part, built in parts.items()}
    except Exception as error:  # Each data set fails in its own way: unknown, offline, damaged, other arguments.
        raise SourceUnreadable(source, str(error).rstrip(".")) from error
    count = max(max(each) for each in targets.values()) + 1
    labels = tuple(getattr(parts["train"], "classes", map(str, range(count))))
    items = (
        Item(f"{part}/{index:06d}", labels[target], part, partial(_picture, parts[part], index))
        for part, each in targets.items()
        for index, target in enumerate(each)
    )
    return Collection(source, labels, tuple(items))


def _built(build: Callable[..., Any], root: Path, part: Part) -> Any:
    known = inspect.signature(build).parameters
    chosen = {"train": part == "train"} if "train" in known else {"split": part}
    return build(root, download=True, **chosen)


def _targets(built: Any) -> list[int]:
    targets = getattr(built, "targets", None)
    if targets is None:
        targets = getattr(built, "labels", None)
    if targets is None:
        targets = [built[index][1] for index in range(len(built))]
    return [int(target) for target in targets]


def _picture(built: Any, index: int) -> Image.Image:
    picture: Image.Image = built[index][0]
    return picture
