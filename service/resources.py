"""What a fit takes of memory and disk, and what is left of them."""

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

FEWER_EXAMPLES = "fewer --examples take less"
SMALLER_BATCH = "a smaller --batch-size takes less"

PEAK = 2
"""The peak of a training step over what its forward pass keeps, gradients and workspace included."""

GIB = 2**30


class MemoryTooSmall(MemoryError):
    """A fit would not fit in memory; `needed` and `available` are bytes."""

    def __init__(self, needed: int, available: int, where: str, largest: "Part") -> None:
        super().__init__(_refusal(needed, available, where, largest))
        self.needed = needed
        self.available = available


class DiskTooSmall(OSError):
    """What a fit keeps and publishes would not fit on the disk; `needed` and `available` are bytes."""

    def __init__(self, needed: int, available: int, folder: Path, largest: "Part") -> None:
        super().__init__(_refusal(needed, available, f"disk under {folder}", largest))
        self.needed = needed
        self.available = available


@dataclass(frozen=True)
class Part:
    """One part of what is needed: what it is, its bytes, and what to do about it."""

    what: str
    size: int
    advice: str


@dataclass(frozen=True)
class FitSize:
    """Say how large a fit is.

    ``image_shape`` is (C, H, W); ``fit``, ``validation`` and ``test`` count images. ``attacks``,
    ``examples``, ``validation_examples``, ``test_examples``, ``negatives`` and ``batch_size`` are the plan's, and
    ``features`` is how many features the Inspector's regressions have. In bytes: what a pass over one image keeps for
    the backward pass, in the Regulator (0 where it is not trained) and in the classifier
    (``defenses.footprint.saved_bytes``), and the weights of all three.
    """

    image_shape: tuple[int, int, int]
    fit: int
    validation: int
    test: int
    classes: int
    attacks: int
    examples: int
    validation_examples: int
    test_examples: int
    negatives: int
    batch_size: int
    features: int
    regulator_pass: int
    classifier_pass: int
    regulator_weights: int
    classifier_weights: int
    inspector_weights: int

    @property
    def fitted_on(self) -> int:
        """How many adversarial examples there are to fit on and to choose by, of all attacks."""
        each = min(self.examples, self.fit) + min(self.validation_examples, self.validation)
        return self.attacks * each

    @property
    def crafted(self) -> Part:
        """The examples of every attack: x as uint8, x_adv as float32, and 18 bytes of row, class and success."""
        count = self.fitted_on + self.attacks * min(self.test_examples, self.test)
        return Part("the adversarial examples", count * (5 * math.prod(self.image_shape) + 18), FEWER_EXAMPLES)

    @property
    def gathered(self) -> Part:
        """One attack's examples once more, while its batches are put together."""
        count = min(self.examples, self.fit)
        return Part("the adversarial examples", count * (5 * math.prod(self.image_shape) + 18), FEWER_EXAMPLES)

    @property
    def activations(self) -> Part:
        """What an Inspector is fitted on: the examples once more, and the features of one class.

        The features are float32, twice: gathered, and as the solver holds them. The class has all of its negatives and,
        of the adversarial examples, twice an equal share.
        """
        attacked = self.attacks * min(self.examples, self.fit)
        rows = min(self.negatives, self.fit) + min(attacked, math.ceil(2 * attacked / self.classes))
        size = 4 * self.fitted_on * math.prod(self.image_shape) + 2 * 4 * rows * self.features
        return Part("what the Inspector is fitted on", size, "fewer --examples, or another --layer, take less")

    @property
    def training(self) -> Part:
        """A training batch in the Regulator, and 16 times its weights.

        They are its gradients, Adam's two moments, the running average, and the points to stop at.
        """
        batch = min(self.batch_size, self.fit) * self.regulator_pass
        return Part("a training batch", PEAK * batch + 16 * self.regulator_weights, SMALLER_BATCH)

    @property
    def attack(self) -> Part:
        """A batch under attack in the classifier."""
        batch = min(self.batch_size, self.fit) * self.classifier_pass
        return Part("a batch under attack", PEAK * batch + self.classifier_weights, SMALLER_BATCH)

    @property
    def kept_examples(self) -> Part:
        """What is kept of the examples: all but x."""
        count = self.fitted_on + self.attacks * min(self.test_examples, self.test)
        return Part("the adversarial examples", count * (4 * math.prod(self.image_shape) + 18), FEWER_EXAMPLES)

    @property
    def kept_weights(self) -> Part:
        """What is kept of the training: seven states of four times the weights, and each class's regressions."""
        return Part("the stages of the training", 28 * self.regulator_weights + 3 * self.inspector_weights, "make room")

    @property
    def exported(self) -> Part:
        """The graph and the checkpoint as they are written and again as they are published, and the Regulator's."""
        once = self.classifier_weights + 2 * (self.regulator_weights + self.inspector_weights)
        return Part("the protected classifier", 2 * (once + self.regulator_weights), "make room")


def check_memory(size: FitSize, *, available: int | None, device_available: int | None = None) -> None:
    """Refuse a fit that the memory left does not hold; None where it is unknown.

    Every attack's examples are held throughout. On top of them comes the largest of what is done in turns: gathering
    an attack's examples, a training batch, a batch under attack, fitting the Inspector. With
    ``device_available``, the batches are on the accelerator instead, and are held against its memory. The images
    themselves are in memory already. Raises ``MemoryTooSmall``.
    """
    batches = [size.training, size.attack]
    turns = [size.gathered, size.activations]
    if device_available is None:
        turns += batches
    else:
        _check_memory([max(batches, key=_size)], device_available, "memory on the GPU")
    _check_memory([size.crafted, max(turns, key=_size)], available, "memory")


def _check_memory(parts: Sequence[Part], available: int | None, where: str) -> None:
    needed = sum(part.size for part in parts)
    if available is not None and needed > available:
        raise MemoryTooSmall(needed, available, where, max(parts, key=_size))


def check_disk(size: FitSize, folder: Path, *, kept: int) -> None:
    """Refuse a fit whose stages and versions the disk under ``folder`` does not hold.

    Needed are the kept examples, the kept weights, and what is exported; ``kept`` bytes of it are there already, from
    an earlier run. Raises ``DiskTooSmall``.
    """
    parts = [size.kept_examples, size.kept_weights, size.exported]
    needed = max(0, sum(part.size for part in parts) - kept)
    available = shutil.disk_usage(folder).free
    if needed > available:
        raise DiskTooSmall(needed, available, folder, max(parts, key=_size))


def memory_available() -> int | None:
    """Tell the bytes left on this machine and in the control group of this process; None where it is unknown."""
    left = []
    meminfo, group = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
    if meminfo.exists():
        left += [int(line.split()[1]) * 1024 for line in meminfo.read_text().splitlines() if "MemAvailable" in line]
    limit = group / "memory.max"
    if limit.exists() and (most := limit.read_text().strip()) != "max":
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used = int((group / "memory.current").read_text()) - int(stat["inactive_file"])
        left.append(int(most) - used)
    return min(left, default=None)


def _size(part: Part) -> int:
    return part.size


def _refusal(needed: int, available: int, where: str, largest: Part) -> str:
    return (
        f"This fit needs about {_told(needed)} of {where}, but only {_told(available)} are available. "
        f"The most of it, {_told(largest.size)}, is for {largest.what}: {largest.advice}."
    )


def _told(size: int) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / 2**20:.1f} MiB"
