"""Adaptive noising training of a Regulator (CoopHANCE, section 3.1.2, algorithm 1)."""

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median

import torch
from torch import Tensor

from defenses.coophance.confusion import Fluctuation, measure_fluctuations
from defenses.coophance.regulator import Regulator, RegulatorConfig
from defenses.coophance.trainer import Curve, Trainer, TrainingPlan
from defenses.evaluation import Progress
from defenses.pixels import to_float
from defenses.stages import Stages

HANDOVER = 0.6
"""The share of the steps after which the sample model's weights are handed to the Regulator."""

STOPPING_POINTS = 4
"""At how many points of the last 40 % the Regulator is kept, to be chosen from."""

WARM, TIMED = 3, 15
"""The steps that are taken before a training is timed, and those that are."""


@dataclass(frozen=True)
class TrainedRegulator:
    """Hold the Regulators that a training could stop at, by their step, in evaluation mode and on the CPU.

    ``fluctuations`` are what the confusion layers imitate, one for each layer, empty without confusion; ``curves`` the
    training loss over the steps, by stage.
    """

    stopping_points: dict[int, Regulator]
    fluctuations: list[Fluctuation]
    curves: dict[str, Curve]


def fit_regulator(
    config: RegulatorConfig,
    images: Tensor,
    pairs: Sequence[tuple[Tensor, Tensor]],
    plan: TrainingPlan,
    *,
    stages: Stages,
    device: torch.device,
    progress: Progress,
) -> TrainedRegulator:
    """Fit a Regulator to purify ``images``, with confusion that imitates the attacks in ``pairs``.

    ``images`` is uint8 (N, C, H, W); ``pairs`` are (x, x_adv) per attack, uint8 or float in [0, 1]. A sample model is
    trained for all of the plan's steps; its weights as of 60 % become the Regulator's, the finished sample model gives
    the fluctuation statistics, and the Regulator trains on for the last 40 % with confusion on. Without confusion there
    is no sample model. What is done is kept in ``stages``, so that a training that was killed goes on, to the same
    result. The global random state is left as it was.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(plan.seed)
        trainer = Trainer(config, images, plan, device)
        handover = max(1, round(HANDOVER * plan.steps))
        first = "sample model" if plan.confusion else "regulator"
        trainer.run("handover", handover, stages, lambda step: progress(first, step, plan.steps))
        curves: dict[str, Curve] = {}
        fluctuations: list[Fluctuation] = []
        if plan.confusion:
            state, curve = trainer.state(), list(trainer.curve)
            trainer.run("sample model", plan.steps, stages, lambda step: progress(first, step, plan.steps))
            curves["sample model"] = trainer.curve
            fluctuations = _fluctuations(trainer.average, pairs, plan.batch_size, stages, device, progress)
            trainer.restore(state)
            trainer.curve = curve
            trainer.confuse(fluctuations)
        stopping_points = {}
        for step in _stopping_points(handover, plan.steps):
            trainer.run(f"regulator, step {step}", step, stages, lambda step: progress("regulator", step, plan.steps))
            regulator = copy.deepcopy(trainer.average)
            regulator.set_confusion(config.confusion)
            stopping_points[step] = regulator.cpu().to(memory_format=torch.contiguous_format).eval()
        curves["regulator"] = trainer.curve
    return TrainedRegulator(stopping_points, fluctuations, curves)


def steps_in(config: RegulatorConfig, plan: TrainingPlan, seconds: float, *, device: torch.device) -> int:
    """Return how many steps of the plan a budget of training time holds, by timing a few on this machine.

    With confusion a plan of s steps costs s without it, and 0.4 s more with it: the sample model and the Regulator each
    take the last 40 %.
    """
    images = torch.randint(0, 256, (4 * plan.batch_size, *config.image_shape), dtype=torch.uint8)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        trainer = Trainer(config, images, replace(plan, steps=100), device)
        cost = _seconds_a_step(trainer)
        if plan.confusion:
            trainer.model.set_confusion(True)
            cost += (1 - HANDOVER) * _seconds_a_step(trainer)
    return max(5, int(seconds / cost))


def _seconds_a_step(trainer: Trainer) -> float:
    """Return the median of a few steps' seconds: a mean would take a moment's other load for the training's own."""
    seconds = []
    for _ in range(WARM + TIMED):
        start = time.perf_counter()
        float(trainer.advance())
        seconds.append(time.perf_counter() - start)
    return median(seconds[WARM:])


def _stopping_points(handover: int, steps: int) -> list[int]:
    rest = steps - handover
    return sorted({handover + round(rest * point / STOPPING_POINTS) for point in range(1, STOPPING_POINTS + 1)})


def _fluctuations(
    sample_model: Regulator,
    pairs: Sequence[tuple[Tensor, Tensor]],
    batch_size: int,
    stages: Stages,
    device: torch.device,
    progress: Progress,
) -> list[Fluctuation]:
    layers = sample_model.confusion_layers
    if (kept := stages.load("statistics")) is not None:
        columns = ([kept.tensors[f"{name}.{index}"] for index in range(len(layers))] for name in Fluctuation._fields)
        return [Fluctuation(*each) for each in zip(*columns, strict=True)]
    start = time.perf_counter()
    batches = _batches(pairs, batch_size, device, lambda done, of: progress("statistics", done, of))
    measured = measure_fluctuations(sample_model, layers, batches)
    tensors = {
        f"{name}.{index}": value for index, each in enumerate(measured) for name, value in each._asdict().items()
    }
    stages.save("statistics", tensors, {"seconds": time.perf_counter() - start})
    return measured


def _batches(
    pairs: Sequence[tuple[Tensor, Tensor]], size: int, device: torch.device, done: Callable[[int, int], None]
) -> Iterator[tuple[Tensor, Tensor]]:
    total = sum(len(x) for x, _ in pairs)
    seen = 0
    for x, x_adv in pairs:
        for clean, adversarial in zip(x.split(size), x_adv.split(size), strict=True):
            yield to_float(clean.to(device)), to_float(adversarial.to(device))
            seen += len(clean)
            done(seen, total)
