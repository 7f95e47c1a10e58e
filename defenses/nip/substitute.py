"""A substitute for a classifier that can only be asked, learnt from its answers (NIP, sections 3.1 and 6.4.2)."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from defenses.classifier import Classifier
from defenses.evaluation import Progress
from defenses.nip.black_box import Answer, BlackBox, check_every_class
from defenses.nip.substitute_training import (
    DEVIATION,
    MEAN,
    TRAINING,
    ImageShape,
    SubstitutePlan,
    SubstituteTraining,
    network,
)
from defenses.onnx_import import canonicalise
from defenses.onnx_trace import export_classifier
from defenses.pixels import to_float
from defenses.precision import full_precision
from defenses.stages import Stages

ANSWERS = "substitute answers"
HELD_OUT = "substitute held-out answers"


class SubstituteUnsuitable(ValueError):
    """An architecture does not take the images, or does not give the logits, that a substitute needs."""

    def __init__(self, architecture: str, shape: ImageShape, reason: str) -> None:
        self.architecture, self.shape = architecture, shape
        super().__init__(f"The architecture {architecture} makes no substitute for images of shape {shape}: {reason}.")


class TooFewImages(ValueError):
    """There are fewer images to ask about than a substitute needs; ``needed`` and ``found`` are counts."""

    def __init__(self, what: str, needed: int, found: int) -> None:
        self.needed, self.found = needed, found
        super().__init__(f"Expected {needed} or more {what}, got {found}.")


@dataclass(frozen=True)
class Substitute:
    """A substitute on the CPU, in evaluation mode, with what it cost and how well it stands in.

    ``training_queries`` and ``held_out_queries`` are the images that the original answered, each once. ``agreement`` is
    the share of the held-out ones that the substitute gives the original's label; ``commonest_share`` is what a
    constant answer would have there. ``losses`` are the mean training losses of the epochs. ``seconds`` is what each
    stage took, however often it was taken up again.
    """

    classifier: Classifier
    training_queries: int
    held_out_queries: int
    agreement: float
    commonest_share: float
    losses: tuple[float, ...]
    seconds: Mapping[str, float]

    @property
    def queries(self) -> int:
        """How many images the original answered in all."""
        return self.training_queries + self.held_out_queries


def untrained_substitute(shape: ImageShape, classes: int, plan: SubstitutePlan) -> Classifier:
    """Return the classifier that a substitute of a plan will be, with weights that mean nothing; it has its layers.

    It asks nothing, so that a layer for NIP can be looked up before a query is spent. The global random state is left
    as it was. Raises ``ArchitectureNotFound``, ``SubstituteUnsuitable``, ``ExportFailed``, ``GraphUnsuitable`` and
    ``OperatorUnsupported``.
    """
    with torch.random.fork_rng(devices=[]):
        return _exported(_fresh(shape, classes, plan), shape)


def distil(
    answer: Answer,
    shape: ImageShape,
    classes: int,
    images: Tensor,
    held_out: Tensor,
    plan: SubstitutePlan,
    *,
    stages: Stages,
    device: torch.device,
    progress: Progress,
) -> Substitute:
    """Train a substitute on what a classifier answers to ``images``, and measure it on ``held_out``.

    Both are uint8 (N, C, H, W) of ``shape``; no image's true class is looked at. ``answer`` is called without
    gradients with float32 (n, C, H, W) in [0, 1] on the CPU, of at most ``batch_size`` images, and gives labels (n,) or
    logits (n, classes); with ``probabilities`` it gives those or logits. What is done is kept in ``stages``: a job that
    was killed goes on there, to the same result, and spends no query again that was kept. The same plan on the same
    machine gives the same result; the global random state is left as it was.

    Before anything is asked raises ``TooFewImages``, ``ValueError`` for images of another shape, and what
    ``untrained_substitute`` raises; then ``AnswerUnsuitable``, ``ClassesNeverAnswered``, ``SubstituteDiverged``, and
    whatever ``answer`` raises.
    """
    rows = _drawn(images, shape, plan.queries, plan.seed)
    checks = _drawn(held_out, shape, plan.held_out_queries, plan.seed)
    for what, needed, found in (
        ("images to ask about, one for each class", max(2, classes), rows),
        ("held-out images to measure agreement on", 1, checks),
    ):
        if len(found) < needed:
            raise TooFewImages(what, needed, len(found))
    untrained_substitute(shape, classes, plan)
    original = BlackBox(answer, classes, plan.batch_size, stages, progress)
    asked = original.ask(images, rows, plan.answers, ANSWERS)
    check_every_class(asked, classes)
    expected = original.ask(held_out, checks, "label", HELD_OUT)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        targets = asked.labels if plan.answers == "label" else asked.probabilities
        training = SubstituteTraining(_fresh(shape, classes, plan), images, rows, targets, plan, device)
        took = training.run(stages, progress)
        classifier = _exported(training.model, shape)
    with full_precision():
        labels = _labels(classifier.to(device), held_out, checks, plan.batch_size, device)
    return Substitute(
        classifier.cpu(),
        len(rows),
        len(checks),
        float((labels == expected.labels).float().mean()),
        float(torch.bincount(expected.labels).max() / len(checks)),
        tuple(training.losses),
        {ANSWERS: asked.seconds, HELD_OUT: expected.seconds, TRAINING: took},
    )


def _drawn(images: Tensor, shape: ImageShape, limit: int | None, seed: int) -> Tensor:
    """Return which images are asked about, in the order in which they are."""
    if tuple(images.shape[1:]) != tuple(shape):
        raise ValueError(f"Expected images of shape {('N', *shape)}, got {tuple(images.shape)}.")
    return torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:limit]


def _fresh(shape: ImageShape, classes: int, plan: SubstitutePlan) -> nn.Module:
    """Return the plan's network with the weights that its training begins with; sets the CPU's global seed."""
    torch.default_generator.manual_seed(plan.seed)
    model = network(shape, classes, plan)
    name = plan.architecture or "of plain convolutions"
    try:
        with torch.no_grad():
            logits = model.eval()(torch.zeros(2, *shape))
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise SubstituteUnsuitable(name, shape, reason[0].rstrip(".")) from error
    if not isinstance(logits, Tensor) or tuple(logits.shape) != (2, classes):
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise SubstituteUnsuitable(name, shape, f"expected logits of shape (2, {classes}) of two, got {found}")
    return model


def _exported(model: nn.Module, shape: ImageShape) -> Classifier:
    graph = export_classifier(model.cpu().to(memory_format=torch.contiguous_format).eval(), shape)  # type: ignore[call-overload]
    statistics = ([MEAN] * shape[0], [DEVIATION] * shape[0])
    return Classifier(canonicalise(graph, normalisation=statistics)).eval()


@torch.no_grad()
def _labels(classifier: Classifier, images: Tensor, rows: Tensor, batch_size: int, device: torch.device) -> Tensor:
    parts = [classifier(to_float(images[part].to(device))).argmax(1).cpu() for part in rows.split(batch_size)]
    return torch.cat(parts)
