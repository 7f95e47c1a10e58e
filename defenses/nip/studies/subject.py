"""What a study looks at: a fitted pool, the images that one like it is made of, and those that it is measured on."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from defenses.attacks import AdversarialExamples
from defenses.classifier import Classifier
from defenses.evaluation import Progress
from defenses.nip.head import head_behind
from defenses.nip.inverse_perturbation import Control, InversePerturbation
from defenses.nip.plan import NipPlan
from defenses.nip.pool import BuiltPool, build_pool
from defenses.precision import full_precision
from defenses.splits import LabelledImages


@dataclass(frozen=True)
class StudySubject:
    """A pool of inverse perturbations with the plan that it was made by, and the images to study it on.

    Classifier and purifier are in evaluation mode on ``device``. Pools are made anew of ``fit``, amplitudes set anew
    on ``validation`` so that at most a share ``accuracy_loss`` of it is lost, ``clean`` are the test images;
    none of the three is empty. ``attacked`` was crafted on the bare classifier; of it what fools, as crafted, is
    looked at.
    """

    classifier: Classifier
    purifier: InversePerturbation
    plan: NipPlan
    fit: LabelledImages
    validation: LabelledImages
    clean: LabelledImages
    attacked: tuple[AdversarialExamples, ...]
    accuracy_loss: float
    device: torch.device
    seed: int
    progress: Progress

    @property
    def batch_size(self) -> int:
        """Images in a batch, as in the plan."""
        return self.plan.batch_size

    def pool_of(self, plan: NipPlan, layer: str, stage: str) -> tuple[InversePerturbation, BuiltPool]:
        """Make a pool of the images to fit on, and the inverse perturbation that has it, on the device.

        ``stage`` is what the progress is called. Raises what ``build_pool`` raises, and ``LayerNotFound``.
        """
        found = self.classifier.resolve_layer(layer)
        built = build_pool(
            self.classifier,
            found,
            *self.fit,
            plan,
            device=self.device,
            progress=lambda part, done, total: self.progress(f"{stage}: {part}", done, total),
        )
        purifier = InversePerturbation(built.config, head_behind(self.classifier, found))
        purifier.set_pool(built.pool)
        return purifier.eval().to(self.device), built

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Draw from the seed anew within the block, and compute in full precision; leave the random state as it was."""
        cuda = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda), full_precision():
            torch.manual_seed(self.seed)
            yield

    @contextmanager
    def directed(self, control: Control | None) -> Iterator[None]:
        """Move by a control in place of the nearest candidate within the block."""
        before, self.purifier.control = self.purifier.control, control
        try:
            yield
        finally:
            self.purifier.control = before
