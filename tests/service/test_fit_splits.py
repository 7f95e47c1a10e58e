"""What was fitted before is refused where it may know images that are to be new to it."""

import numpy as np
import pytest

from model_store import DataRecord
from service.datasets import Dataset, Split
from service.fit_splits import OtherSplits, check_splits, has_test_part

SHAPE = (1, 4, 4)
LABELS = ("cat", "dog")


@pytest.mark.parametrize(
    ("held_out", "fitted", "own"),
    [
        (("test/cat/1.png", "test/dog/1.png"), ("train/cat/1.png", "val/dog/2.png"), True),
        (("val/cat/1.png",), ("train/cat/1.png",), True),
        (("test/000003",), ("train/000003",), True),
        (("cat/1.png", "dog/1.png"), ("cat/2.png", "dog/2.png"), False),
        (("train/cat/1.png", "train/dog/1.png"), ("train/cat/2.png",), False),
        (("0003", "0004"), ("0001", "0002"), False),
    ],
)
def test_a_test_part_is_told_by_the_names(held_out, fitted, own):
    def split(names: tuple[str, ...]) -> Split:
        return Split(np.zeros((len(names), *SHAPE), np.uint8), np.zeros(len(names), np.int64), names)

    dataset = Dataset("pets", "cd" * 32, LABELS, split(fitted), split(()), split(()), split(held_out), 1)
    assert has_test_part(dataset) == own
    earlier = DataRecord(name="pets", digest="cd" * 32, split_seed=0, counts={})
    if own:
        check_splits("robust@1", earlier, dataset)
    else:
        with pytest.raises(OtherSplits, match="expected --seed 0") as caught:
            check_splits("robust@1", earlier, dataset)
        assert (caught.value.reference, caught.value.fitted, caught.value.found) == ("robust@1", 0, 1)
    check_splits("robust@1", None, dataset)
    check_splits("robust@1", earlier.model_copy(update={"digest": "ef" * 32}), dataset)
    check_splits("robust@1", earlier.model_copy(update={"split_seed": 1}), dataset)
