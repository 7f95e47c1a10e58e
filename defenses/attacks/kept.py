"""An attack's examples as a stage of a fit: crafted once, and kept."""

import time

import torch

from defenses.attacks.attack import Attack
from defenses.attacks.examples import AdversarialExamples, craft
from defenses.classifier import Classifier
from defenses.evaluation import Progress
from defenses.splits import LabelledImages
from defenses.stages import Stages

_KEPT = ("x_adv", "y", "rows", "fooled", "fooled_rounded")


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
    """Return the examples that are kept of an attack on a part of the data for a purpose, or ``craft`` and keep them.

    The clean images are not kept: they are those of the part, which is the same whenever this is called again.
    Raises what ``craft`` and ``Stages.save`` raise.
    """
    name = f"{purpose} examples, {attack.name}"
    if (kept := stages.load(name)) is not None:
        return AdversarialExamples(attack, x=part.images[kept.tensors["rows"]], **kept.tensors)
    start = time.perf_counter()
    examples = craft(
        attack,
        classifier,
        *part,
        limit=limit,
        device=device,
        seed=seed,
        batch_size=batch_size,
        progress=lambda done, total: progress(f"{attack.name} ({purpose})", done, total),
    )
    tensors = {field: getattr(examples, field) for field in _KEPT}
    stages.save(name, tensors, {"seconds": time.perf_counter() - start})
    return examples
