"""Why a data set cannot be used: every class is a `DatasetError`, and names what is at fault."""

from collections.abc import Sequence

NAMED_AT_MOST = 5


def listed(names: Sequence[str]) -> str:
    """Join names with commas: the first five, then how many more there are."""
    more = len(names) - NAMED_AT_MOST
    return ", ".join(names[:NAMED_AT_MOST]) + (f" and {more} more" if more > 0 else "")


class DatasetError(ValueError):
    """A data set cannot be used."""


class SourceUnreadable(DatasetError):
    """A source is not there, cannot be read, or does not belong with the others."""

    def __init__(self, source: str, reason: str) -> None:
        super().__init__(f"The data source {source!r} cannot be read: {reason}.")
        self.source = source


class NoImages(DatasetError):
    """Nothing lies where images of a class are looked for."""

    def __init__(self, sources: Sequence[str]) -> None:
        super().__init__(
            f"No images were found in {listed(sources)}: they must lie in <class>/<image>, "
            "or in train/<class>/<image> with test/ or val/ beside it."
        )
        self.sources = tuple(sources)


class StrayFiles(DatasetError):
    """Images lie outside the class folders."""

    def __init__(self, paths: Sequence[str]) -> None:
        super().__init__(
            f"Every image must lie in the folder of its class, but {len(paths)} lie elsewhere: {listed(paths)}."
        )
        self.paths = tuple(paths)


class ImagesDuplicated(DatasetError):
    """Images of the same path come more than once, in one source or in several."""

    def __init__(self, paths: Sequence[str]) -> None:
        super().__init__(f"Every path may occur once, but {len(paths)} occur more than once: {listed(paths)}.")
        self.paths = tuple(paths)


class ImagesRefused(DatasetError):
    """Images are damaged, of another format or of the wrong size; `problems` has (path, reason) of every one."""

    def __init__(self, problems: Sequence[tuple[str, str]]) -> None:
        described = [f"{path} ({reason.rstrip('.')})" for path, reason in problems]
        super().__init__(f"Every image must be usable, but {len(problems)} are not: {listed(described)}.")
        self.problems = tuple(problems)


class SingleClass(DatasetError):
    """All images are of one class."""

    def __init__(self, label: str) -> None:
        super().__init__(f"At least two classes are needed, but every image is of the class {label!r}.")
        self.label = label


class ClassTooSmall(DatasetError):
    """Classes have too few images to be in every split; `counts` has the images per class."""

    def __init__(self, part: str, least: int, counts: dict[str, int]) -> None:
        described = [f"{label} ({count})" for label, count in counts.items()]
        super().__init__(
            f"Every class needs at least {least} image(s) {part}, but these have fewer: {listed(described)}."
        )
        self.counts = counts


class LabelsMismatch(DatasetError):
    """The classes of the images are not those of the classifier."""

    def __init__(self, missing: Sequence[str], extra: Sequence[str]) -> None:
        super().__init__(
            "The classes of the images must be the classifier's labels; "
            f"without images: {listed(missing) or 'none'}; unknown to the classifier: {listed(extra) or 'none'}."
        )
        self.missing = tuple(missing)
        self.extra = tuple(extra)


class DatasetTooLarge(DatasetError):
    """The decoded images would not fit in memory; sizes in bytes."""

    def __init__(self, images: int, needed: int, available: int) -> None:
        super().__init__(
            f"The {images} images need {needed / 2**30:.1f} GiB of memory once decoded, but only "
            f"{available / 2**30:.1f} GiB are available: limit the images per split or use a smaller input."
        )
        self.needed = needed
        self.available = available
