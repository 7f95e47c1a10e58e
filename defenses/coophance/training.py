"""Adaptive noising training of a Regulator (CoopHANCE, section 3.1.2, algorithm 1)."""

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from defenses.coophance.augmentation import Augmentation
from defenses.coophance.confusion import FluctuationStatistics, measure_fluctuations
from defenses.coophance.regulator import Regulator, RegulatorConfig

HANDOVER = 0.6
"""The share of the epochs after which the sample model's weights are handed to the Regulator."""

Progress = Callable[[str, int, int], None]
"""Called with a stage's name, the steps done and the steps in all."""


@dataclass(frozen=True)
class TrainingPlan:
    """Say how long and with what a Regulator is trained.

    ``steps`` counts the sample model's optimiser steps; the Regulator proper takes another 40 % of them.
    ``learning_rate`` is Adam's, falling to zero along a half cosine over ``steps``.
    """

    steps: int
    batch_size: int = 128
    learning_rate: float = 3e-3
    augmentation: Augmentation = field(default_factory=Augmentation)
    seed: int = 0


@dataclass(frozen=True)
class TrainedRegulator:
    """Hold a fitted Regulator (in evaluation mode) with the losses and the statistics it was fitted with."""

    regulator: Regulator
    statistics: list[FluctuationStatistics]
    sample_loss: float
    final_loss: float


def fit_regulator(
    config: RegulatorConfig,
    images: Tensor,
    pairs: Sequence[tuple[Tensor, Tensor]],
    plan: TrainingPlan,
    *,
    device: torch.device,
    progress: Progress,
) -> TrainedRegulator:
    """Fit a Regulator to purify ``images``, with confusion that imitates the attacks in ``pairs``.

    ``images`` is uint8 (N, C, H, W); ``pairs`` are (x, x_adv) per attack, float in [0, 1]. A sample model is trained
    for all of the plan's steps; its weights as of 60 % become the Regulator's, the finished sample model gives the
    fluctuation statistics, and the Regulator trains on for the last 40 % with confusion on. The loss is the binary
    cross-entropy against the clean image. The global random state is left as it was.
    """
    handover = max(1, round(HANDOVER * plan.steps))
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(plan.seed)
        sample_model = _build(config, device)
        sample_model.set_confusion(False)
        trainer = _Trainer(sample_model, images, plan, device)
        trainer.run(0, handover, lambda done: progress("sample model", done, plan.steps))
        kept = copy.deepcopy((sample_model.state_dict(), trainer.optimizer.state_dict()))
        sample_loss = trainer.run(handover, plan.steps, lambda done: progress("sample model", done, plan.steps))

        sample_model.eval()
        batches = _batches(pairs, plan.batch_size, device, lambda done, of: progress("statistics", done, of))
        statistics = measure_fluctuations(sample_model, sample_model.confusion_layers, batches)

        regulator = _build(config, device)
        regulator.load_state_dict(kept[0])
        regulator.set_confusion(True)
        for layer, statistic in zip(regulator.confusion_layers, statistics, strict=True):
            layer.set_statistics(statistic.mean, statistic.standard_deviation)
        trainer = _Trainer(regulator, images, plan, device)
        trainer.optimizer.load_state_dict(kept[1])
        rest = plan.steps - handover
        final_loss = trainer.run(handover, plan.steps, lambda done: progress("regulator", done - handover, rest))
    regulator.set_confusion(config.confusion)
    return TrainedRegulator(regulator.eval(), statistics, sample_loss, final_loss)


def steps_in(config: RegulatorConfig, plan: TrainingPlan, seconds: float, *, device: torch.device) -> int:
    """Return how many plan steps a budget of training time holds, by timing a few on this machine.

    The Regulator proper repeats the last 40 %, so a plan of s steps costs 1.4 s optimiser steps.
    """
    images = torch.randint(0, 256, (4 * plan.batch_size, *config.image_shape), dtype=torch.uint8)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        trainer = _Trainer(_build(config, device), images, plan, device)
        trainer.run(0, 3, lambda _: None)
        start = time.perf_counter()
        trainer.run(3, 13, lambda _: None)
        cost = (time.perf_counter() - start) / 10
    return max(5, int(seconds / cost / (2 - HANDOVER)))


def _build(config: RegulatorConfig, device: torch.device) -> Regulator:
    return Regulator(config).to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


class _Trainer:
    def __init__(self, model: Regulator, images: Tensor, plan: TrainingPlan, device: torch.device) -> None:
        self.model = model
        self.images = images
        self.plan = plan
        self.device = device
        self.optimizer = torch.optim.Adam(model.parameters(), lr=plan.learning_rate)
        self.generator = torch.Generator().manual_seed(plan.seed)

    def run(self, first: int, last: int, done: Callable[[int], None]) -> float:
        """Take the steps ``first`` to ``last`` of the schedule; return the mean loss of the last 50."""
        plan, noise_on = self.plan, torch.ones((), device=self.device)
        self.model.train()
        recent: list[Tensor] = []
        for step in range(first, last):
            for group in self.optimizer.param_groups:
                cosine = torch.cos(torch.tensor(torch.pi * step / plan.steps)).item()
                group["lr"] = plan.learning_rate * 0.5 * (1 + cosine)
            chosen = torch.randint(len(self.images), (plan.batch_size,), generator=self.generator)
            x = self.images[chosen].to(self.device).float() / 255
            x = plan.augmentation(x, self.generator).contiguous(memory_format=torch.channels_last)
            noisy = (x + self.model.config.training_noise * torch.randn_like(x)).clamp(0, 1)
            loss = F.binary_cross_entropy_with_logits(self.model.reconstruct(noisy, noise_on), x)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
            recent = [*recent[-49:], loss.detach()]
            done(step + 1)
        return float(torch.stack(recent).mean()) if recent else float("nan")


def _batches(
    pairs: Sequence[tuple[Tensor, Tensor]], size: int, device: torch.device, done: Callable[[int, int], None]
) -> Iterator[tuple[Tensor, Tensor]]:
    total = sum(len(x) for x, _ in pairs)
    seen = 0
    for x, x_adv in pairs:
        for clean, adversarial in zip(x.split(size), x_adv.split(size), strict=True):
            yield clean.to(device), adversarial.to(device)
            seen += len(clean)
            done(seen, total)
