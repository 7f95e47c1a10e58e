"""Labelled images into memory, decoded exactly as those that are served."""

import hashlib
import os
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from PIL import Image

from model_store import InputSpec
from service.datasets.errors import DatasetTooLarge, ImagesRefused, LabelsMismatch
from service.datasets.sources import Item, open_sources
from service.datasets.splits import split_items
from service.images import ImageRefused, decode_pixels, render_pixels
from service.resources import memory_available

MAX_PIXELS = 100_000_000
CHUNK = 64


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """Images uint8 (N, C, H, W), targets int64 (N,) and names; the classes take turns, so any beginning is balanced."""

    images: np.ndarray
    targets: np.ndarray
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Dataset:
    """A data set in memory. `digest` is the SHA-256 over names and contents of its images, whatever their order."""

    name: str
    digest: str
    labels: tuple[str, ...]
    fit: Split
    validation: Split
    calibration: Split
    test: Split
    split_seed: int


def load_dataset(
    sources: Sequence[str],
    spec: InputSpec,
    *,
    labels: Sequence[str] | None,
    split_seed: int,
    progress: Callable[[int, int], None] | None = None,
    limit: int | None = None,
    root: Path | None = None,
) -> Dataset:
    """Load labelled images, decoded as in serving (`service.images.decode_pixels`), and split them.

    `sources` is one folder, or one or more zips, read in place, or "digits" (scikit-learn's, 8x8 grey), or
    "torchvision:NAME", downloaded to `root`. Files lie in <class>/<image>, or in train/<class>/<image> with test/ or
    val/ beside it; of the two test/ is held out, and all else is fitted on. A part that is alone
    is split like a plain folder. Folders around everything are passed through, hidden files passed over. `split_items`
    says how images are split. `limit` is the most images per split, evenly over the classes.

    The classes are those of the set, folders sorted by name; `labels`, the classifier's, must name the same classes and
    then give their order. Labels that are but numbers, "0" to "K-1", are taken for as many classes of any names.
    `progress` is called with the images done and their total.

    Raises DatasetError: LabelsMismatch, ImagesRefused with every image that cannot be used, DatasetTooLarge before
    memory runs out, and the others in `service.datasets.errors`.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"The limit of images per split must be at least 1, not {limit}.")
    with ExitStack() as stack:
        collection = open_sources(sources, root, stack)
        ordered = _match_labels(collection.labels, labels)
        parts = split_items(collection.items, ordered, split_seed, limit)
        _check_memory(sum(map(len, parts)), spec)
        fit, validation, calibration, test = splits = [_empty_split(items, ordered, spec) for items in parts]
        digests = _decode(parts, splits, spec, progress)
    return Dataset(collection.name, _digest(digests), ordered, fit, validation, calibration, test, split_seed)


def _match_labels(found: tuple[str, ...], labels: Sequence[str] | None) -> tuple[str, ...]:
    if labels is None or sorted(labels) == sorted(found):
        return tuple(labels or found)
    if list(labels) == [str(index) for index in range(len(found))]:
        return found
    raise LabelsMismatch(sorted(set(labels) - set(found)), sorted(set(found) - set(labels)))


def _check_memory(count: int, spec: InputSpec) -> None:
    needed = count * int(np.prod(spec.shape, dtype=np.int64))
    available = memory_available()
    if available is not None and needed > available:
        raise DatasetTooLarge(count, needed, available)


def _empty_split(items: Sequence[Item], labels: Sequence[str], spec: InputSpec) -> Split:
    index = {label: target for target, label in enumerate(labels)}
    return Split(
        np.empty((len(items), *spec.shape), dtype=np.uint8),
        np.array([index[item.label] for item in items], dtype=np.int64),
        tuple(item.name for item in items),
    )


def _decode(
    parts: Sequence[Sequence[Item]],
    splits: Sequence[Split],
    spec: InputSpec,
    progress: Callable[[int, int], None] | None,
) -> list[tuple[str, str]]:
    """Decode into the splits' images on all cores; return (name, SHA-256 of the content) of each image."""
    digests: list[tuple[str, str]] = []
    problems: list[tuple[str, str]] = []
    total, done = sum(map(len, parts)), 0
    pool = ThreadPoolExecutor(max_workers=os.cpu_count())
    try:
        chunks = {
            pool.submit(_decode_chunk, items[start : start + CHUNK], split.images[start : start + CHUNK], spec)
            for items, split in zip(parts, splits, strict=True)
            for start in range(0, len(items), CHUNK)
        }
        for chunk in as_completed(chunks):
            read, refused = chunk.result()
            digests += read
            problems += refused
            done += len(read) + len(refused)
            if progress is not None:
                progress(done, total)
    finally:
        pool.shutdown(cancel_futures=True)
    if problems:
        raise ImagesRefused(sorted(problems))
    return digests


def _decode_chunk(
    items: Sequence[Item], images: np.ndarray, spec: InputSpec
) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    digests, problems = [], []
    for item, image in zip(items, images, strict=True):
        try:
            content = item.read()
            if isinstance(content, Image.Image):
                image[...] = render_pixels(content, spec)
                content = f"{content.mode} {content.size} ".encode() + content.tobytes()
            else:
                image[...] = decode_pixels(content, spec, max_pixels=MAX_PIXELS)
            digests.append((item.name, hashlib.sha256(content).hexdigest()))
        # A damaged, encrypted or exotically packed zip shows here, file by file.
        except (ImageRefused, OSError, EOFError, RuntimeError, BadZipFile, zlib.error) as error:
            problems.append((item.name, str(error)))
    return digests, problems


def _digest(digests: Sequence[tuple[str, str]]) -> str:
    listing = "".join(f"{content}  {name}\n" for name, content in sorted(digests))
    return hashlib.sha256(listing.encode()).hexdigest()
