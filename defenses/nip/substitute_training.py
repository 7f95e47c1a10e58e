"""The network of a substitute classifier, and its training on another classifier's answers."""

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defenses.architectures import build
from defenses.coophance.augmentation import Augmentation
from defenses.evaluation import Progress
from defenses.nip.black_box import AnswerKind
from defenses.pixels import to_float
from defenses.precision import has_bfloat16
from defenses.seeds import derived_seed
from defenses.stages import Stages

TRAINING = "substitute training"
KEEP_EVERY = 60.0
"""Seconds of training after which the epochs so far are kept."""

MEAN, DEVIATION = 0.5, 0.25
"""What is taken from the pixels of every channel, and what they are divided by, before the network sees them."""

WIDTHS = (32, 64, 128)
FEATURES = 512
WARM_UP = 0.1
"""The share of the steps in which the learning rate rises; it falls along a half cosine in the others."""

ImageShape = tuple[int, int, int]


class SubstituteDiverged(ArithmeticError):
    """A substitute's training loss is no longer finite; ``epoch`` is the one it happened in, from 1."""

    def __init__(self, epoch: int, learning_rate: float) -> None:
        self.epoch, self.learning_rate = epoch, learning_rate
        super().__init__(
            f"The substitute's training loss is not finite in epoch {epoch}: expected a learning_rate that it is "
            f"trained stably with, less than {learning_rate}."
        )


@dataclass(frozen=True)
class SubstitutePlan:
    """Say what a substitute is, what it is told, and how long it is trained.

    ``architecture`` is a spec that ``defenses.architectures.build`` takes; None is a network of plain convolutions made
    for the image's shape, whose pooled layer is 512 wide. Of each answer the ``label`` is learnt, with
    ``label_smoothing``, or all ``probabilities``. At most ``queries`` of the fitting images are asked about, all when
    None, and at most ``held_out_queries`` of those that agreement is measured on. ``augmentation`` rotates, shifts and
    zooms the images trained on, and with ``flip`` mirrors them; an image's answer holds for all its forms.
    ``learning_rate`` is the highest. Raises ``ValueError`` for what cannot be.
    """

    architecture: str | None = None
    answers: AnswerKind = "label"
    queries: int | None = None
    held_out_queries: int = 1000
    epochs: int = 20
    batch_size: int = 64
    learning_rate: float = 2e-3
    label_smoothing: float = 0.1
    augmentation: bool = True
    flip: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.answers not in ("label", "probabilities"):
            raise ValueError(f"Expected answers to be label or probabilities, got {self.answers!r}.")
        for name, least in (("queries", 2), ("held_out_queries", 1), ("epochs", 1), ("batch_size", 2), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"Expected {name} of {least} or more, got {value}.")
        if not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            raise ValueError(f"Expected a learning_rate above 0, got {self.learning_rate}.")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"Expected label_smoothing from 0 to below 1, got {self.label_smoothing}.")


def network(shape: ImageShape, classes: int, plan: SubstitutePlan) -> nn.Module:
    """Return the plan's network with fresh weights, of images (N, C, H, W) that are normalised.

    Raises ``ArchitectureNotFound``.
    """
    return build(plan.architecture, classes) if plan.architecture else _plain_convolutions(shape, classes)


def _plain_convolutions(shape: ImageShape, classes: int) -> nn.Sequential:
    """Build stages of two 3x3 convolutions that halve the maps, behind a stem for images of 64 pixels and more."""
    before, side = shape[0], min(shape[1:])
    layers: list[nn.Module] = []
    if side >= 64:
        layers += [*_convolution(before, WIDTHS[0], 7, 2), nn.MaxPool2d(3, 2, 1)]
        before, side = WIDTHS[0], side // 4
    for width in WIDTHS:
        layers += [*_convolution(before, width, 3, 1), *_convolution(width, width, 3, 1)]
        if side >= 4:
            layers.append(nn.MaxPool2d(2))
            side //= 2
        before = width
    layers += _convolution(before, FEATURES, 3, 1)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(FEATURES, classes))


def _convolution(before: int, width: int, side: int, stride: int) -> list[nn.Module]:
    return [nn.Conv2d(before, width, side, stride, side // 2, bias=False), nn.BatchNorm2d(width), nn.ReLU()]


class SubstituteTraining:
    """Train a network on answers, by epochs that can be taken up again where they were left.

    ``images`` is uint8 (N, C, H, W), of which the ``rows`` int64 (M,) were answered with ``targets``: labels int64 (M,)
    or probabilities float32 (M, K). The loss is cross-entropy. Every epoch draws its order, its augmentation and its
    dropout from a seed of its own. Sets torch's global seed.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        rows: Tensor,
        targets: Tensor,
        plan: SubstitutePlan,
        device: torch.device,
    ) -> None:
        self.images, self.rows, self.targets = images, rows, targets
        self.plan, self.device = plan, device
        self.model = model.to(device).to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=plan.learning_rate, weight_decay=0.05)
        self.augment = Augmentation(rotation=10, shift=0.1, zoom=0.2, flip=plan.flip) if plan.augmentation else None
        self.losses: list[float] = []

    def run(self, stages: Stages, progress: Progress) -> float:
        """Train to the end, from where ``stages`` has kept it; return the seconds it took, however often resumed.

        Raises ``SubstituteDiverged``.
        """
        partial = f"{TRAINING}, partial"
        if (kept := stages.load(TRAINING)) is not None:
            self.model.load_state_dict(kept.tensors)
            self.losses = kept.values["losses"]
            return float(kept.values["seconds"])
        before = 0.0
        if (kept := stages.load(partial)) is not None:
            self._restore(kept.tensors)
            self.losses, before = kept.values["losses"], kept.values["seconds"]
        began = saved = time.perf_counter()

        def values() -> dict[str, Any]:
            return {"losses": self.losses, "seconds": before + time.perf_counter() - began}

        while len(self.losses) < self.plan.epochs:
            self._epoch()
            progress(TRAINING, len(self.losses), self.plan.epochs)
            if time.perf_counter() - saved > KEEP_EVERY and len(self.losses) < self.plan.epochs:
                stages.save(partial, self._state(), values())
                saved = time.perf_counter()
        finished = values()
        stages.save(TRAINING, self.model.state_dict(), finished)
        stages.drop(partial)
        return float(finished["seconds"])

    def _epoch(self) -> None:
        plan, epoch = self.plan, len(self.losses)
        generator = torch.Generator().manual_seed(derived_seed(plan.seed, epoch))
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        order = torch.randperm(len(self.rows), generator=generator)
        # A batch of one image has no statistics for a batch normalisation.
        batches = [part for part in order.split(plan.batch_size) if len(part) > 1]
        losses = []
        for index, part in enumerate(batches):
            rate = plan.learning_rate * _schedule((epoch + index / len(batches)) / plan.epochs)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            losses.append(self._step(part, generator))
        loss = float(torch.stack(losses).mean())
        if not math.isfinite(loss):
            raise SubstituteDiverged(epoch + 1, plan.learning_rate)
        self.losses.append(loss)

    def _step(self, part: Tensor, generator: torch.Generator) -> Tensor:
        x = to_float(self.images[self.rows[part]].to(self.device))
        if self.augment is not None:
            x = self.augment(x, generator)
        x = ((x - MEAN) / DEVIATION).contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=has_bfloat16(self.device)):
            logits = self.model(x)
        smoothing = self.plan.label_smoothing if self.plan.answers == "label" else 0.0
        loss = F.cross_entropy(logits.float(), self.targets[part].to(self.device), label_smoothing=smoothing)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def _state(self) -> dict[str, Tensor]:
        state = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            state |= {f"optimizer.{index}.{name}": value for name, value in moments.items()}
        return state

    def _restore(self, state: dict[str, Tensor]) -> None:
        weights: dict[str, Tensor] = {}
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in state.items():
            part, _, rest = name.partition(".")
            if part == "model":
                weights[rest] = value
            else:
                index, moment = rest.split(".")
                moments.setdefault(int(index), {})[moment] = value
        self.model.load_state_dict(weights)
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})


def _schedule(done: float) -> float:
    """Return the share of the highest learning rate when a share of the training, from 0 to 1, is done."""
    if done < WARM_UP:
        return 0.04 + 0.96 * done / WARM_UP
    return 0.5 * (1 + math.cos(math.pi * (done - WARM_UP) / (1 - WARM_UP)))
