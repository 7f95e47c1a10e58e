"""Labelled images from real files made here, and from the published ones where they lie beside the repository."""

import hashlib
import io
import os
import shutil
import struct
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from model_store import InputSpec
from service.datasets import (
    ClassTooSmall,
    Dataset,
    DatasetError,
    DatasetTooLarge,
    ImagesDuplicated,
    ImagesRefused,
    LabelsMismatch,
    NoImages,
    SingleClass,
    SourceUnreadable,
    Split,
    StrayFiles,
    load_dataset,
)
from service.images import decode_pixels

PUBLISHED = Path(__file__).parents[2].parent / "shared" / "data"
SPEC = InputSpec(shape=(3, 8, 8), mode="RGB")
GREY = InputSpec(shape=(1, 8, 8), mode="L")

ABSENT = "The folder of real data and published weights is not here."
needs_cifar10 = pytest.mark.skipif(not (PUBLISHED / "cifar10" / "test.zip").exists(), reason=ABSENT)
needs_monkeys = pytest.mark.skipif(not (PUBLISHED / "monkeys10" / "val.zip").exists(), reason=ABSENT)


def png(seed: int, size: tuple[int, int] = (8, 8)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def pictures(classes: Sequence[str], count: int, top: str = "", seed: int = 0) -> dict[str, bytes]:
    """Make `count` different images per class: path to content."""
    return {
        f"{top}{label}/{index:03d}.png": png(seed + 1000 * position + index)
        for position, label in enumerate(classes)
        for index in range(count)
    }


def write_folder(folder: Path, files: dict[str, bytes]) -> str:
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return str(folder)


def write_zip(path: Path, files: dict[str, bytes], compression: int = ZIP_STORED) -> str:
    with ZipFile(path, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return str(path)


def load(
    *sources: str, spec: InputSpec = SPEC, labels: Sequence[str] | None = None, seed: int = 0, **options
) -> Dataset:
    return load_dataset(sources, spec, labels=labels, split_seed=seed, **options)


def splits(dataset: Dataset) -> tuple[Split, ...]:
    return dataset.fit, dataset.validation, dataset.calibration, dataset.test


def counts(dataset: Dataset) -> list[list[int]]:
    return [np.bincount(split.targets, minlength=len(dataset.labels)).tolist() for split in splits(dataset)]


def names(dataset: Dataset) -> list[str]:
    return [name for split in splits(dataset) for name in split.names]


def test_a_folder_is_split_60_10_15_15_by_class(tmp_path: Path) -> None:
    dataset = load(write_folder(tmp_path / "pets", pictures(["dog", "cat"], 100)))
    assert dataset.name == "pets"
    assert dataset.labels == ("cat", "dog")
    assert dataset.split_seed == 0
    assert counts(dataset) == [[60, 60], [10, 10], [15, 15], [15, 15]]
    assert len(set(names(dataset))) == 200


def test_every_image_has_the_pixels_target_and_name_of_its_file(tmp_path: Path) -> None:
    files = pictures(["cat", "dog"], 20)
    dataset = load(write_folder(tmp_path, files))
    assert sorted(names(dataset)) == sorted(files)
    for split in splits(dataset):
        assert (split.images.dtype, split.targets.dtype) == (np.uint8, np.int64)
        for image, target, name in zip(split.images, split.targets, split.names, strict=True):
            np.testing.assert_array_equal(image, decode_pixels(files[name], SPEC, max_pixels=64))
            assert dataset.labels[target] == name.split("/")[0]


@pytest.mark.parametrize("held_out", ["test", "val"])
def test_a_part_held_out_validates_calibrates_and_tests(tmp_path: Path, held_out: str) -> None:
    files = pictures(["a", "b"], 30, "train/") | pictures(["a", "b"], 100, f"{held_out}/", seed=50_000)
    dataset = load(write_folder(tmp_path, files))
    assert counts(dataset) == [[30, 30], [20, 20], [20, 20], [60, 60]]
    assert all(name.startswith("train/") for name in dataset.fit.names)
    for split in splits(dataset)[1:]:
        assert all(name.startswith(f"{held_out}/") for name in split.names)


def test_beside_a_test_part_val_is_fitted_on_as_train_is(tmp_path: Path) -> None:
    files = {}
    for number, part in enumerate(("train", "val", "test")):
        files |= pictures(["a", "b"], 50, f"{part}/", seed=10_000 * number)
    dataset = load(write_folder(tmp_path, files))
    assert counts(dataset) == [[100, 100], [10, 10], [10, 10], [30, 30]]
    assert {name.split("/")[0] for name in dataset.fit.names} == {"train", "val"}
    assert {name.split("/")[0] for name in dataset.test.names} == {"test"}


@pytest.mark.parametrize("part", ["train", "val", "test"])
def test_a_part_that_is_alone_is_split_like_a_plain_folder(tmp_path: Path, part: str) -> None:
    dataset = load(write_zip(tmp_path / "x.zip", pictures(["a", "b"], 100, f"{part}/")))
    assert dataset.labels == ("a", "b")
    assert counts(dataset) == [[60, 60], [10, 10], [15, 15], [15, 15]]


def test_small_sets_calibrate_on_twenty_where_the_classes_have_them(tmp_path: Path) -> None:
    assert counts(load(write_folder(tmp_path / "a", pictures(["a", "b"], 40)))) == [
        [20] * 2,
        [4] * 2,
        [10] * 2,
        [6] * 2,
    ]
    assert counts(load(write_folder(tmp_path / "b", pictures(["a", "b"], 8)))) == [[4] * 2, [1] * 2, [2] * 2, [1] * 2]
    assert counts(load(write_folder(tmp_path / "c", pictures(["a", "b"], 4)))) == [[1] * 2, [1] * 2, [1] * 2, [1] * 2]


def test_zips_are_read_together_and_as_the_folder_they_were_made_of(tmp_path: Path) -> None:
    train, test = pictures(["a", "b"], 30, "train/"), pictures(["a", "b"], 5, "test/", seed=50_000)
    parts = list(train.items())
    (tmp_path / "birds").mkdir()
    zipped = load(
        write_zip(tmp_path / "birds" / "train-0.zip", dict(parts[:20])),
        write_zip(tmp_path / "birds" / "train-1.zip", dict(parts[20:]), ZIP_DEFLATED),
        write_zip(tmp_path / "birds" / "test.zip", test),
    )
    unpacked = load(write_folder(tmp_path / "unpacked", train | test))
    assert zipped.name == "birds"
    assert zipped.digest == unpacked.digest
    assert names(zipped) == names(unpacked)
    np.testing.assert_array_equal(zipped.fit.images, unpacked.fit.images)


@pytest.mark.parametrize("wrapper", ["pets-main/", "a/b/c/"])
def test_folders_around_everything_are_passed_through(tmp_path: Path, wrapper: str) -> None:
    files = pictures(["cat", "dog"], 10)
    plain = load(write_zip(tmp_path / "plain.zip", files))
    wrapped = load(write_zip(tmp_path / "wrapped.zip", {wrapper + path: content for path, content in files.items()}))
    assert wrapped.digest == plain.digest


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    assert load(write_folder(tmp_path, pictures(["bus", "train", "test"], 10))).labels == ("bus", "test", "train")


def test_hidden_files_and_papers_outside_the_classes_are_passed_over(tmp_path: Path) -> None:
    files = pictures(["a", "b"], 10)
    clean = load(write_folder(tmp_path / "clean", files))
    litter = {
        "a/.DS_Store": b"x",
        "__MACOSX/a/._000.png": b"x",
        "a/Thumbs.db": b"x",
        "README.md": b"x",
        ".git/a.png": b"x",
    }
    assert load(write_zip(tmp_path / "littered.zip", files | litter)).digest == clean.digest


def test_linked_class_folders_are_followed(tmp_path: Path) -> None:
    write_folder(tmp_path / "all", pictures(["a", "b", "c"], 10))
    (tmp_path / "some").mkdir()
    for label in ("a", "c"):
        (tmp_path / "some" / label).symlink_to(tmp_path / "all" / label)
    assert load(str(tmp_path / "some")).labels == ("a", "c")


def test_the_same_seed_gives_the_same_splits_and_another_does_not(tmp_path: Path) -> None:
    source = write_folder(tmp_path, pictures(["a", "b"], 30))
    assert names(load(source, seed=1)) == names(load(source, seed=1))
    assert set(load(source, seed=1).fit.names) != set(load(source, seed=2).fit.names)
    assert load(source, seed=1).digest == load(source, seed=2).digest


def test_the_splits_do_not_depend_on_the_order_of_the_files_or_of_the_labels(tmp_path: Path) -> None:
    files = pictures(["a", "b"], 30)
    forwards = load(write_zip(tmp_path / "f.zip", files))
    backwards = load(write_zip(tmp_path / "b.zip", dict(reversed(files.items()))), labels=["b", "a"])
    assert names(forwards) == names(backwards)
    assert forwards.digest == backwards.digest
    np.testing.assert_array_equal(forwards.fit.targets, 1 - backwards.fit.targets)


def test_the_digest_is_that_of_the_contents_and_names(tmp_path: Path) -> None:
    files = pictures(["a", "b"], 10)
    digest = load(write_folder(tmp_path / "x", files)).digest
    lines = sorted(f"{hashlib.sha256(content).hexdigest()}  {path}\n" for path, content in files.items())
    by_name = sorted(lines, key=lambda line: line.split("  ")[1])
    assert digest == hashlib.sha256("".join(by_name).encode()).hexdigest()
    assert load(write_folder(tmp_path / "y", files | {"a/000.png": png(777)})).digest != digest
    files["a/other.png"] = files.pop("a/000.png")
    assert load(write_folder(tmp_path / "z", files)).digest != digest


def test_a_limit_holds_for_every_split_and_keeps_the_classes_even(tmp_path: Path) -> None:
    source = write_folder(tmp_path, pictures(["a", "b"], 40) | pictures(["c"], 400, seed=9000))
    whole, limited = load(source), load(source, limit=9)
    assert counts(limited) == [[3, 3, 3]] * 4
    for some, every in zip(splits(limited), splits(whole), strict=True):
        assert some.names == every.names[:9]
    assert limited.digest != whole.digest
    with pytest.raises(ValueError, match="at least 1, not 0"):
        load(source, limit=0)


def test_progress_rises_to_the_total(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    load(write_folder(tmp_path, pictures(["a", "b"], 100)), progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert seen[-1] == (200, 200)
    assert {total for _, total in seen} == {200}


def test_an_error_in_progress_stops_the_loading(tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load(write_folder(tmp_path, pictures(["a", "b"], 100)), progress=stop)


def test_the_classifiers_labels_give_the_order(tmp_path: Path) -> None:
    source = write_folder(tmp_path, pictures(["a", "b", "c"], 10))
    dataset = load(source, labels=["c", "a", "b"])
    assert dataset.labels == ("c", "a", "b")
    assert all(
        dataset.labels[target] == name[0] for target, name in zip(dataset.fit.targets, dataset.fit.names, strict=True)
    )


def test_labels_that_are_but_numbers_stand_for_any_names(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "a", pictures(["x", "y"], 10))
    assert load(source, labels=["0", "1"]).labels == ("x", "y")
    numbered = write_folder(tmp_path / "b", pictures([str(label) for label in range(11)], 4))
    assert load(numbered, labels=[str(label) for label in range(11)]).labels == tuple(map(str, range(11)))


@pytest.mark.parametrize(
    ("labels", "missing", "extra"),
    [
        (["a", "z"], ("z",), ("b",)),
        (["a", "b", "c"], ("c",), ()),
        (["0", "1", "2"], ("0", "1", "2"), ("a", "b")),
        (["1", "0"], ("0", "1"), ("a", "b")),
    ],
)
def test_other_labels_are_refused_with_what_is_missing_and_extra(
    tmp_path: Path, labels: list[str], missing: tuple[str, ...], extra: tuple[str, ...]
) -> None:
    with pytest.raises(LabelsMismatch, match=r"without images: .*; unknown to the classifier: ") as caught:
        load(write_folder(tmp_path, pictures(["a", "b"], 10)), labels=labels)
    assert (caught.value.missing, caught.value.extra) == (missing, extra)


@pytest.mark.parametrize("source", ["nowhere", "nowhere.zip"])
def test_a_source_that_is_not_there_is_named(tmp_path: Path, source: str) -> None:
    with pytest.raises(SourceUnreadable, match=f"{source}' cannot be read: there is no such folder or zip"):
        load(str(tmp_path / source))


def test_a_file_that_is_no_zip_is_refused(tmp_path: Path) -> None:
    whole = write_zip(tmp_path / "whole.zip", pictures(["a", "b"], 10))
    (tmp_path / "half.zip").write_bytes(Path(whole).read_bytes()[:-100])
    (tmp_path / "picture.png").write_bytes(png(0))
    for name in ("half.zip", "picture.png"):
        with pytest.raises(SourceUnreadable, match=f"{name}' cannot be read: a zip was expected"):
            load(str(tmp_path / name))


def test_only_zips_can_be_given_together(tmp_path: Path) -> None:
    zipped, folder = write_zip(tmp_path / "a.zip", pictures(["a", "b"], 5)), str(tmp_path)
    for other in (folder, "digits", "torchvision:MNIST"):
        with pytest.raises(SourceUnreadable, match="only zips can be given together"):
            load(zipped, other)
    with pytest.raises(DatasetError, match="At least one source"):
        load()


@contextmanager
def unprivileged() -> Iterator[None]:
    """Give up the superuser's rights, for whom no folder is closed."""
    was = os.geteuid()
    if was == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(was)


def test_a_folder_that_may_not_be_read_is_refused() -> None:
    with TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        source = write_folder(folder, pictures(["a", "b"], 10))
        load(source)
        (folder / "b").chmod(0)
        with unprivileged(), pytest.raises(SourceUnreadable, match="Permission denied"):
            load(source)
        (folder / "b").chmod(0o755)


def test_a_source_without_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for source in (str(tmp_path / "empty"), write_zip(tmp_path / "empty.zip", {"README.md": b"none"})):
        with pytest.raises(NoImages, match="they must lie in <class>/<image>"):
            load(source)


def test_a_single_class_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SingleClass, match="every image is of the class 'cat'"):
        load(write_folder(tmp_path, pictures(["cat"], 20)))


def test_images_outside_class_folders_are_named_up_to_five(tmp_path: Path) -> None:
    files = pictures(["a", "b"], 10) | {f"{index}.jpg": b"" for index in range(6)} | {"a/deeper/x.png": b""}
    with pytest.raises(StrayFiles) as caught:
        load(write_folder(tmp_path, files))
    assert str(caught.value) == (
        "Every image must lie in the folder of its class, but 7 lie elsewhere: "
        "0.jpg, 1.jpg, 2.jpg, 3.jpg, 4.jpg and 2 more."
    )
    assert caught.value.paths[-1] == "a/deeper/x.png"


def test_class_folders_beside_parts_are_refused(tmp_path: Path) -> None:
    files = pictures(["a", "b"], 10, "train/") | {"c/0.png": png(0)}
    with pytest.raises(StrayFiles, match=r"1 lie elsewhere: c/0\.png"):
        load(write_folder(tmp_path, files))


def test_the_same_path_twice_is_refused(tmp_path: Path) -> None:
    files = pictures(["a", "b"], 10)
    first, second = write_zip(tmp_path / "1.zip", files), write_zip(tmp_path / "2.zip", {"a/003.png": png(5)})
    with pytest.raises(ImagesDuplicated, match=r"1 occur more than once: a/003\.png"):
        load(first, second)
    with ZipFile(first, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("b/007.png", png(6))
    with pytest.raises(ImagesDuplicated, match=r"b/007\.png"):
        load(first)


def test_every_image_that_cannot_be_used_is_told_with_its_reason(tmp_path: Path) -> None:
    files = pictures(["a", "b"], 30)
    files |= {
        "a/cut.png": png(1)[:60],
        "a/notes.txt": b"not an image",
        "b/large.png": png(2, (9, 8)),
        "b/nothing.webp": b"",
    }
    with pytest.raises(ImagesRefused) as caught:
        load(write_folder(tmp_path, files))
    message = str(caught.value)
    assert message.startswith("Every image must be usable, but 4 are not: a/cut.png (The PNG image is damaged")
    assert "a/notes.txt (A PNG, JPEG or WebP image was expected, but 12 bytes" in message
    assert "b/large.png (The image must be 8 pixels wide and 8 high, but is 9 wide and 8 high)" in message
    assert [name for name, _ in caught.value.problems] == ["a/cut.png", "a/notes.txt", "b/large.png", "b/nothing.webp"]


def test_hundreds_of_unusable_images_are_counted(tmp_path: Path) -> None:
    files = {f"{label}/{index:03d}.png": b"" for label in "ab" for index in range(100)}
    with pytest.raises(ImagesRefused, match=r"but 200 are not: a/000.png .* and 195 more\."):
        load(write_folder(tmp_path, files))


def test_damage_inside_a_zip_is_told_by_file(tmp_path: Path) -> None:
    files = pictures(["a", "b"], 10)
    source = Path(write_zip(tmp_path / "x.zip", files))
    content = bytearray(source.read_bytes())
    content[content.index(files["b/004.png"]) + 50] ^= 0xFF
    source.write_bytes(content)
    with pytest.raises(ImagesRefused, match=r"but 1 are not: b/004\.png \(Bad CRC-32"):
        load(str(source))


def test_an_encrypted_zip_is_told_by_file(tmp_path: Path) -> None:
    source = Path(write_zip(tmp_path / "x.zip", pictures(["a", "b"], 4)))
    content = bytearray(source.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        start = content.find(signature)
        while start >= 0:
            content[start + offset] |= 1
            start = content.find(signature, start + 4)
    source.write_bytes(content)
    with pytest.raises(ImagesRefused, match=r"8 are not: .*encrypted"):
        load(str(source))


def test_classes_too_small_to_split_are_named(tmp_path: Path) -> None:
    plain = write_folder(tmp_path / "plain", pictures(["a"], 10) | pictures(["b"], 2, seed=50_000))
    with pytest.raises(ClassTooSmall, match=r"at least 4 image\(s\) to be split, but these have fewer: b \(2\)"):
        load(plain)
    files = pictures(["a", "b"], 10, "train/") | pictures(["a"], 10, "test/", seed=50_000)
    with pytest.raises(ClassTooSmall, match=r"to validate, calibrate and test on, but these have fewer: b \(0\)"):
        load(write_folder(tmp_path / "untested", files))
    files = pictures(["a", "b"], 10, "test/") | pictures(["a"], 10, "train/", seed=50_000)
    with pytest.raises(ClassTooSmall, match=r"to fit on, but these have fewer: b \(0\)") as caught:
        load(write_folder(tmp_path / "untrained", files))
    assert caught.value.counts == {"b": 0}


def test_images_that_would_not_fit_in_memory_are_refused_before_any_is_decoded(tmp_path: Path) -> None:
    huge = InputSpec(shape=(3, 200_000, 200_000), mode="RGB", resize="bilinear")
    with pytest.raises(DatasetTooLarge, match=r"The 20 images need 2235\.2 GiB of memory") as caught:
        load(write_folder(tmp_path, pictures(["a", "b"], 10)), spec=huge)
    assert caught.value.needed == 20 * 3 * 200_000**2
    assert 0 < caught.value.available < caught.value.needed


def test_images_of_any_size_are_resized_as_in_serving(tmp_path: Path) -> None:
    spec = GREY.model_copy(update={"resize": "bicubic"})
    files = {f"{label}/{size}.png": png(size, (size, 20)) for label in "ab" for size in range(5, 15)}
    dataset = load(write_folder(tmp_path, files), spec=spec)
    assert dataset.fit.images.shape[1:] == (1, 8, 8)
    for image, name in zip(dataset.fit.images, dataset.fit.names, strict=True):
        np.testing.assert_array_equal(image, decode_pixels(files[name], spec, max_pixels=1000))


def test_the_digits_of_scikit_learn() -> None:
    dataset = load("digits", spec=GREY)
    digits = load_digits()
    assert dataset.name == "digits"
    assert dataset.labels == tuple("0123456789")
    assert sum(map(sum, counts(dataset))) == len(digits.images) == 1797
    for image, target, name in zip(dataset.test.images, dataset.test.targets, dataset.test.names, strict=True):
        assert target == digits.target[int(name)]
        np.testing.assert_allclose(image[0] / 255 * 16, digits.images[int(name)], atol=16 / 255 / 2 + 1e-9)
    assert dataset.fit.images.min() == 0
    assert dataset.fit.images.max() == 255


def test_the_digits_need_a_filter_for_another_size() -> None:
    spec = InputSpec(shape=(3, 32, 32), mode="RGB", resize="bilinear")
    assert load("digits", spec=spec, limit=50).fit.images.shape == (50, 3, 32, 32)
    with pytest.raises(ImagesRefused, match="must be 32 pixels wide and 32 high, but is 8 wide and 8 high"):
        load("digits", spec=spec.model_copy(update={"resize": None}), limit=50)


@pytest.fixture(scope="module")
def torchvision_loads() -> Iterator[None]:
    """Let a CUDA build of torchvision load beside a CPU torch: its import looks for operators that torch lacks."""
    try:
        import torchvision  # noqa: F401

        library = None
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    yield
    del library  # which takes the operators with it


def write_idx(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes())


@pytest.mark.usefixtures("torchvision_loads")
def test_a_torchvision_data_set_with_a_train_flag(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    written = {}
    for part, prefix, count in (("train", "train", 50), ("test", "t10k", 50)):
        images = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        targets = (np.arange(count) % 10).astype(np.uint8)
        write_idx(tmp_path / "FashionMNIST" / "raw" / f"{prefix}-images-idx3-ubyte", images)
        write_idx(tmp_path / "FashionMNIST" / "raw" / f"{prefix}-labels-idx1-ubyte", targets)
        written[part] = images
    dataset = load("torchvision:FashionMNIST", spec=InputSpec(shape=(1, 28, 28), mode="L"), root=tmp_path)
    assert dataset.labels[:2] == ("T-shirt/top", "Trouser")
    assert counts(dataset) == [[5] * 10, [1] * 10, [1] * 10, [3] * 10]
    for split in splits(dataset):
        for image, target, name in zip(split.images, split.targets, split.names, strict=True):
            part, index = name.split("/")
            np.testing.assert_array_equal(image[0], written[part][int(index)])
            assert target == int(index) % 10


@pytest.mark.usefixtures("torchvision_loads")
def test_a_torchvision_data_set_with_a_split(tmp_path: Path) -> None:
    base = tmp_path / "gtsrb"
    rows = ["Filename;ClassId"]
    for index in range(12):
        picture = Image.open(io.BytesIO(png(index, (20 + index, 30))))
        training = base / "GTSRB" / "Training" / f"{index % 2:05d}" / f"{index}.ppm"
        test = base / "GTSRB" / "Final_Test" / "Images" / f"{index}.ppm"
        for path in (training, test):
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)
        rows.append(f"{test.name};{index % 2}")
    (base / "GT-final_test.csv").write_text("\n".join(rows))
    spec = SPEC.model_copy(update={"resize": "bilinear"})
    dataset = load("torchvision:GTSRB", spec=spec, root=tmp_path, labels=["0", "1"])
    assert dataset.labels == ("0", "1")
    assert counts(dataset) == [[6, 6], [1, 1], [2, 2], [3, 3]]


@pytest.mark.usefixtures("torchvision_loads")
def test_an_unknown_or_unbuildable_torchvision_data_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceUnreadable, match="has no attribute 'Nothing'"):
        load("torchvision:Nothing", root=tmp_path)
    with pytest.raises(SourceUnreadable, match=r"'torchvision:FakeData' cannot be read: .*unexpected keyword"):
        load("torchvision:FakeData", root=tmp_path)
    with pytest.raises(SourceUnreadable, match="need a root folder"):
        load("torchvision:MNIST")


def test_a_torchvision_that_does_not_import_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(SourceUnreadable, match="torchvision does not import beside this build of torch"):
        load("torchvision:MNIST", root=tmp_path)


@needs_cifar10
def test_cifar10_in_place() -> None:
    spec = InputSpec(shape=(3, 32, 32), mode="RGB")
    dataset = load(str(PUBLISHED / "cifar10" / "test.zip"), spec=spec)
    assert dataset.name == "test"
    assert dataset.labels[:3] == ("airplane", "automobile", "bird")
    assert [len(split.images) for split in splits(dataset)] == [5981, 997, 1495, 1495]
    with ZipFile(PUBLISHED / "cifar10" / "test.zip") as archive:
        for image, name in list(zip(dataset.test.images, dataset.test.names, strict=True))[:100]:
            with archive.open(name) as file:
                np.testing.assert_array_equal(image, np.asarray(Image.open(file)).transpose(2, 0, 1))


@needs_monkeys
def test_photographs_in_train_and_val(tmp_path: Path) -> None:
    spec = InputSpec(shape=(3, 64, 64), mode="RGB", resize="bilinear")
    sources = [shutil.copy(PUBLISHED / "monkeys10" / f"{part}.zip", tmp_path) for part in ("train", "val")]
    dataset = load(*map(str, sources), spec=spec, labels=[f"n{index}" for index in reversed(range(10))])
    assert [len(split.images) for split in splits(dataset)] == [1095, 54, 54, 164]
    assert dataset.labels[0] == "n9"
    assert all(name.startswith("val/") for name in dataset.test.names)
