"""Whether something that was fitted on a data set before may be used in a fit on it now."""

from model_store import DataRecord
from service.datasets import Dataset


class OtherSplits(ValueError):
    """Something was fitted on the same images, but these were split in another way."""

    def __init__(self, reference: str, fitted: int, found: int) -> None:
        super().__init__(
            f"{reference} was fitted on these images as --seed {fitted} splits them, and may know those that are to be "
            f"new to it as --seed {found} does: expected --seed {fitted}."
        )
        self.reference = reference
        self.fitted = fitted
        self.found = found


def check_splits(reference: str, fitted_on: DataRecord | None, dataset: Dataset) -> None:
    """Refuse what was fitted on images of which this fit validates, calibrates or tests on some.

    ``reference`` names what was fitted, as NAME@VERSION, on the fit split of ``fitted_on``, None where that is unknown.
    The fit split is the same for every seed where a test part is held out. Raises ``OtherSplits``.
    """
    if fitted_on is None or fitted_on.digest != dataset.digest or fitted_on.split_seed == dataset.split_seed:
        return
    if not has_test_part(dataset):
        raise OtherSplits(reference, fitted_on.split_seed, dataset.split_seed)


def has_test_part(dataset: Dataset) -> bool:
    """Say whether the test images are of a part of the data set of their own, which nothing is ever fitted on.

    Such a part is the folder around all of its classes, and no image to fit on lies in it.
    """
    held_out, fitted = ({name.partition("/")[0] for name in split.names} for split in (dataset.test, dataset.fit))
    return len(held_out) == 1 and held_out.isdisjoint(fitted)
