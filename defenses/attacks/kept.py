"""An attack's examples as a stage of a fit: crafted once, and kept."""

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from defenses.attacks.attack import Attack
from defenses.attacks.examples import AdversarialExamples, NothingToAttack, craft_any
from defenses.classifier import Classifier
from defenses.evaluation import Progress
from defenses.seeds import derived_seed
from defenses.splits import LabelledImages
from defenses.stages import Stages

PIECE = 128
"""The fewest images that are looked at between two moments at which what was crafted is kept."""

_KEPT = ("x_adv", "y", "rows", "fooled", "fooled_rounded")

_Columns = dict[str, Tensor]


def craft_once(
    attack: Attack,
    classifier: Classifier,
    part: LabelledImages,
    purpose: str,
    *,
    limit: int,
    stages: Stages,
    device: torch.device,
    seed: int,
    batch_size: int,
    progress: Progress,
) -> AdversarialExamples:
    """Return the examples that are kept of an attack on a part of the data for a purpose, or make and keep them.

    The first ``limit`` images that the classifier gets right are attacked, piece by piece of the part: whole batches,
    ``PIECE`` images or a few more, each from a seed of its own that is drawn from ``seed``. Every piece is kept when it
    is done, so that a fit that was killed goes on with the next one, to the same examples; once all are kept as one
    stage the pieces are dropped. The clean images are not kept: they are those of the part, which is the same whenever
    this is called again. Raises ``NothingToAttack`` for a classifier that gets nothing right, and what the attack and
    ``Stages.save`` raise.
    """
    name = f"{purpose} examples, {attack.name}"
    pieces = _Pieces(
        attack, classifier, part, name, f"{attack.name} ({purpose})", stages, device, seed, batch_size, progress
    )
    if (kept := stages.load(name)) is None:
        tensors, seconds = pieces.made(limit)
        stages.save(name, tensors, {"seconds": seconds})
    else:
        tensors = kept.tensors
    pieces.drop()
    return AdversarialExamples(attack, x=part.images[tensors["rows"]], **tensors)


@dataclass(frozen=True)
class _Pieces:
    """The examples of a part of the data, in pieces; ``name`` is the stage of the whole, ``told`` its progress's."""

    attack: Attack
    classifier: Classifier
    part: LabelledImages
    name: str
    told: str
    stages: Stages
    device: torch.device
    seed: int
    batch_size: int
    progress: Progress

    @property
    def length(self) -> int:
        """How many of the part's images a piece has: a multiple of the batch size."""
        return self.batch_size * -(-PIECE // self.batch_size)

    def made(self, limit: int) -> tuple[_Columns, float]:
        """Make what is not kept, one piece after the other; return the whole, and the seconds that it took in all."""
        images = len(self.part.images)
        pieces: list[_Columns] = []
        count, seconds = 0, 0.0
        for index, first in enumerate(range(0, images, self.length)):
            last = first + self.length >= images
            tensors, took = self.piece(index, first, count, limit, last=last)
            pieces.append(tensors)
            count, seconds = count + len(tensors["y"]), seconds + took
            if count >= limit:
                break
        if not count:
            raise NothingToAttack(images)
        return {field: torch.cat([tensors[field] for tensors in pieces]) for field in _KEPT}, seconds

    def piece(self, index: int, first: int, count: int, limit: int, *, last: bool) -> tuple[_Columns, float]:
        """Return the piece that begins at an image, ``count`` examples after the first, and its seconds.

        It is kept unless nothing is left to be made after it, since the whole is kept then.
        """
        name = self._stage(index)
        if (kept := self.stages.load(name)) is not None:
            self.progress(self.told, count + len(kept.tensors["y"]), limit)
            return kept.tensors, kept.values["seconds"]
        start = time.perf_counter()
        examples = craft_any(
            self.attack,
            self.classifier,
            *(each[first : first + self.length] for each in self.part),
            limit=limit - count,
            device=self.device,
            seed=derived_seed(self.seed, index),
            batch_size=self.batch_size,
            progress=lambda done, _: self.progress(self.told, count + done, limit),
        )
        tensors = {field: getattr(examples, field) for field in _KEPT}
        tensors["rows"] = tensors["rows"] + first
        seconds = time.perf_counter() - start
        if not last and count + len(examples.y) < limit:
            self.stages.save(name, tensors, {"seconds": seconds})
        return tensors, seconds

    def drop(self) -> None:
        """Drop all pieces that are kept."""
        for name in self.stages.names():
            if name.startswith(self._stage("")):
                self.stages.drop(name)

    def _stage(self, index: int | str) -> str:
        return f"{self.name}, piece {index}"
