"""The training loop of a Regulator: steps that can be taken up again where they were left."""

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from defenses.coophance.augmentation import Augmentation
from defenses.coophance.confusion import Fluctuation
from defenses.coophance.regulator import Regulator, RegulatorConfig
from defenses.noise import gaussian_like
from defenses.pixels import to_float
from defenses.seeds import derived_seed
from defenses.stages import Stages

KEEP_EVERY = 60.0
"""Seconds of training after which what has been learnt so far is kept."""

POINT_EVERY = 20
"""Steps whose mean loss makes one point of a curve."""

Curve = list[tuple[int, float]]
"""Points (step, mean training loss of the steps since the point before)."""

State = dict[str, Tensor]


@dataclass(frozen=True)
class TrainingPlan:
    """Say how long and with what a Regulator is trained.

    ``steps`` counts the Regulator's optimiser steps, of which those before the handover are shared with the sample
    model; with confusion, the sample model takes another 40 % of them. ``learning_rate`` is Adam's, constant or
    falling to zero along a half cosine over ``steps``. ``averaging`` is the decay of the running average of the
    weights, which is what is kept (0: the weights themselves). ``precision`` is that of the network's arithmetic; the
    weights stay float32.
    """

    steps: int
    batch_size: int = 128
    learning_rate: float = 3e-3
    schedule: Literal["cosine", "constant"] = "cosine"
    averaging: float = 0.99
    precision: Literal["float32", "bfloat16"] = "float32"
    confusion: bool = True
    augmentation: Augmentation = field(default_factory=Augmentation)
    seed: int = 0


class Trainer:
    """Train a Regulator, and a running average of its weights.

    ``images`` is uint8 (N, C, H, W). The loss of a batch is that of what the network makes of its noisy form against
    the batch itself: binary cross-entropy where the network gives an image, as published, and the mean squared error
    where it gives a residual. Every step draws its batch and its noise from a seed of its own, so that a training that
    goes on after a kill takes the very steps that it would have taken. Sets torch's global seed.
    """

    def __init__(self, config: RegulatorConfig, images: Tensor, plan: TrainingPlan, device: torch.device) -> None:
        self.images, self.plan, self.device = images, plan, device
        self.model = Regulator(config).to(device).to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        self.model.set_confusion(False)
        self.average = copy.deepcopy(self.model).eval()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=plan.learning_rate)
        self.step = 0
        self.curve: Curve = []

    def run(self, stage: str, until: int, stages: Stages, done: Callable[[int], None]) -> None:
        """Take the steps up to ``until``, from where ``stages`` has kept this stage; ``done`` is told each step."""
        partial = f"{stage}, partial"
        if (kept := stages.load(stage) or stages.load(partial)) is not None:
            self.restore(kept.tensors)
            self.curve = [(int(step), float(loss)) for step, loss in kept.values["curve"]]
        began = saved = time.perf_counter()
        before = kept.values["seconds"] if kept else 0.0
        losses: list[Tensor] = []
        first = self.step
        while self.step < until:
            losses.append(self.advance())
            done(self.step)
            if self.step % POINT_EVERY == 0 or self.step == until:
                self.curve.append((self.step, float(torch.stack(losses).mean())))
                losses.clear()
                now = time.perf_counter()
                if now - saved > KEEP_EVERY and self.step < until:
                    stages.save(partial, self.state(), {"curve": self.curve, "seconds": before + now - began})
                    saved = now
        if self.step > first:
            seconds = before + time.perf_counter() - began
            stages.save(stage, self.state(), {"curve": self.curve, "seconds": seconds})
            stages.drop(partial)

    def advance(self) -> Tensor:
        """Take one step; return its loss, a scalar."""
        plan = self.plan
        confused = self.model.confusion_layers[0].enabled
        generator = torch.Generator().manual_seed(derived_seed(plan.seed, self.step, confused))
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        if plan.schedule == "cosine":
            for group in self.optimizer.param_groups:
                group["lr"] = plan.learning_rate * 0.5 * (1 + math.cos(math.pi * self.step / plan.steps))
        chosen = torch.randint(len(self.images), (plan.batch_size,), generator=generator)
        x = plan.augmentation(to_float(self.images[chosen].to(self.device)), generator)
        loss = self._loss(x.contiguous(memory_format=torch.channels_last))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self._follow()
        self.step += 1
        return loss.detach()

    def confuse(self, fluctuations: Sequence[Fluctuation]) -> None:
        """Switch the confusion layers on, with what they are to imitate."""
        for model in (self.model, self.average):
            model.set_confusion(True)
            for layer, fluctuation in zip(model.confusion_layers, fluctuations, strict=True):
                layer.imitate(fluctuation)

    def state(self) -> State:
        """Return all that the next step depends on."""
        state = {"step": torch.tensor(self.step)}
        for part, module in (("model", self.model), ("average", self.average)):
            state |= {f"{part}.{name}": value.clone() for name, value in module.state_dict().items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            state |= {f"optimizer.{index}.{name}": value.clone() for name, value in moments.items()}
        return state

    def restore(self, state: State) -> None:
        """Go back to what ``state`` returned."""
        self.step = int(state["step"])
        for part, module in (("model", self.model), ("average", self.average)):
            module.load_state_dict(_under(f"{part}.", state))
        moments: dict[int, State] = {}
        for name, value in _under("optimizer.", state).items():
            index, moment = name.split(".")
            moments.setdefault(int(index), {})[moment] = value.clone()
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})

    def _loss(self, x: Tensor) -> Tensor:
        config = self.model.config
        noisy = (x + config.training_noise * gaussian_like(x)).clamp(0, 1)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.plan.precision == "bfloat16"):
            reconstruction = self.model.reconstruct(noisy, torch.ones((), device=self.device))
        if config.output == "residual":
            return F.mse_loss(noisy + reconstruction.float(), x)
        return F.binary_cross_entropy_with_logits(reconstruction.float(), x)

    @torch.no_grad()
    def _follow(self) -> None:
        """Move the average towards the model; faster early on, so that it forgets the random start."""
        decay = min(self.plan.averaging, (1 + self.step) / (10 + self.step))
        both = zip(self.average.state_dict().values(), self.model.state_dict().values(), strict=True)
        for average, value in both:
            if average.is_floating_point():
                average.lerp_(value, 1 - decay)
            else:
                average.copy_(value)


def _under(prefix: str, state: State) -> State:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
