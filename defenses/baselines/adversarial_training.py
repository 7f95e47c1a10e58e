"""Fast adversarial training of a classifier (Wong, Rice and Kolter 2020, "Fast is better than free")."""

import math
import time
from dataclasses import asdict
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defenses.attacks import craft
from defenses.baselines.adversarial_outcome import AdversarialTraining, Epoch, TrainingDiverged, has_collapsed
from defenses.baselines.adversarial_plan import AdversarialPlan, check_feasible
from defenses.baselines.adversarial_step import augmented, perturbed, triangle
from defenses.coophance.selection import accuracy_of
from defenses.evaluation import Progress
from defenses.pixels import to_float
from defenses.precision import has_bfloat16
from defenses.seeds import derived_seed
from defenses.splits import LabelledImages, Splits
from defenses.stages import Kept, Stages

MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4
"""Those of the stochastic gradient descent, as published."""

TRAINING = "training"
PACE = "pace"
TEST = "test"

_INITIAL = 2**31
_CRAFTING = 2**31 + 1
"""What the seeds of the first weights and of PGD are derived with; the epochs' are with their numbers."""

State = dict[str, Tensor]


def initial_seed(seed: int) -> int:
    """Return the seed of 32 bits that fresh weights are drawn with."""
    return derived_seed(seed, _INITIAL)


def precision_on(device: torch.device) -> Literal["float32", "bfloat16"]:
    """Return the arithmetic that a network is trained in on a device."""
    return "bfloat16" if has_bfloat16(device) else "float32"


def train_adversarially(
    model: nn.Module,
    splits: Splits,
    plan: AdversarialPlan,
    *,
    stages: Stages,
    device: torch.device,
    progress: Progress,
) -> AdversarialTraining:
    """Train a classifier on examples of FGSM from random starts (algorithm 3), and measure it on test images.

    ``model`` gives logits (N, K) for images (N, C, H, W) in [0, 1]. It ends with the trained weights, on the CPU and in
    evaluation mode. Where the accuracy under PGD on validation images collapses after an epoch (``has_collapsed``), the
    training stops, and the weights are those of the epoch before. Each epoch is kept in ``stages``, and is the same
    whether or not the one before it was killed. The global random state is left as it was. Raises ``ImagesTooFew``
    before anything is computed, and ``TrainingDiverged``.
    """
    check_feasible(plan, fit=len(splits.fit.targets), validation=len(splits.validation.targets))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        training = _Training(model, splits, plan, stages, device, progress)
        training.run()
        clean, robust = training.measure(splits.test)
    model.to(memory_format=torch.contiguous_format).cpu().eval()  # type: ignore[call-overload]
    return AdversarialTraining(
        planned=training.planned,
        epochs=tuple(training.epochs),
        kept=len(training.epochs) - (training.collapsed is not None),
        collapsed=training.collapsed,
        precision=training.precision,
        clean_accuracy=clean,
        robust_accuracy=robust,
        attacked=min(plan.test_examples, len(splits.test.targets)),
        seconds=stages.timed(),
    )


class _Training:
    """A training that can be taken up again after its last whole epoch."""

    def __init__(
        self,
        model: nn.Module,
        splits: Splits,
        plan: AdversarialPlan,
        stages: Stages,
        device: torch.device,
        progress: Progress,
    ) -> None:
        self.splits, self.plan, self.stages, self.device, self.progress = splits, plan, stages, device, progress
        self.model = model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=plan.learning_rate, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY
        )
        self.precision = precision_on(device)
        self.steps = len(splits.fit.targets) // plan.batch_size
        self.epochs: list[Epoch] = []
        self.collapsed: int | None = None
        self.planned = plan.epochs

    def run(self) -> None:
        """Train the epochs that are not kept yet."""
        self.planned = self.settle_epochs()
        kept, before = self.stages.load(TRAINING), 0.0
        if kept is not None:
            self.restore(kept)
            before = kept.values["seconds"]
        start = time.perf_counter()
        while len(self.epochs) < self.planned and self.collapsed is None:
            state = self.state()
            self.epochs.append(self.epoch())
            if has_collapsed(self.epochs):
                self.collapsed = len(self.epochs)
                self.go_back(state)
            values = {"epochs": [asdict(each) for each in self.epochs], "collapsed": self.collapsed}
            seconds = before + time.perf_counter() - start
            self.stages.save(TRAINING, self.state(), {**values, "seconds": seconds})

    def settle_epochs(self) -> int:
        """Return how many epochs there are to be; what a number of minutes holds is settled once."""
        if self.plan.minutes is None:
            return self.plan.epochs
        if (kept := self.stages.load(PACE)) is None:
            epochs = max(1, int(self.plan.minutes * 60 / self.seconds_an_epoch()))
            self.stages.save(PACE, {}, {"epochs": epochs})
            return epochs
        return int(kept.values["epochs"])

    def seconds_an_epoch(self) -> float:
        """Return about how long an epoch takes on this machine, by timing a few steps and PGD on one batch."""
        state = self.state()
        rows = torch.arange(self.plan.batch_size)
        self.model.train()
        for count in (2, 5):  # what is done but once is not timed
            start = time.perf_counter()
            for _ in range(count):
                self.step(rows, 0).tolist()
            step = (time.perf_counter() - start) / count
        images, targets = (column[: self.plan.batch_size] for column in self.splits.validation)
        x, y = to_float(images.to(self.device)), targets.to(self.device)
        self.model.eval()
        for count in (2, len(y)):
            start = time.perf_counter()
            self.plan.measured_by.run(self.model, x[:count], y[:count]).cpu()
            attacked = (time.perf_counter() - start) / count
        self.go_back(state)
        validated = min(self.plan.validation_examples, len(self.splits.validation.targets))
        return self.steps * step + validated * attacked

    def epoch(self) -> Epoch:
        """Train one epoch, the images that are left over from its whole batches left out; raises ``TrainingDiverged``.

        All that is drawn in it depends on its number alone.
        """
        done = len(self.epochs)
        torch.manual_seed(derived_seed(self.plan.seed, done))
        self.model.train()
        order = torch.randperm(len(self.splits.fit.targets))[: self.steps * self.plan.batch_size]
        sums, total = torch.zeros(2, device=self.device), self.planned * self.steps
        for index, rows in enumerate(order.split(self.plan.batch_size)):
            sums += self.step(rows, done * self.steps + index)
            self.progress(TRAINING, done * self.steps + index + 1, total)
        loss, right = (sums / len(order)).tolist()
        if not math.isfinite(loss):
            raise TrainingDiverged(done + 1, self.plan.learning_rate)
        validation = LabelledImages(*(column[: self.plan.validation_examples] for column in self.splits.validation))
        self.model.eval()
        clean = accuracy_of(self.model, *validation, self.device)
        return Epoch(done + 1, loss, right, clean, self.robust_accuracy(validation))

    def step(self, rows: Tensor, number: int) -> Tensor:
        """Take one step on some of the images; return (2,) the sum of the losses, and how many are right."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.plan.learning_rate * triangle(number, self.planned * self.steps)
        images, y = augmented(self.splits.fit.images[rows], flip=self.plan.flip), self.splits.fit.targets[rows]
        x, y = to_float(images.to(self.device)), y.to(self.device)
        logits = self.logits(perturbed(self.logits, x, y, epsilon=self.plan.epsilon, step_size=self.plan.step_size))
        loss = F.cross_entropy(logits, y)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return torch.stack([loss.detach() * len(y), (logits.detach().argmax(1) == y).sum()])

    def logits(self, x: Tensor) -> Tensor:
        """Return logits (N, K), float32, computed in the precision of the training."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            logits: Tensor = self.model(x)
        return logits.float()

    def measure(self, test: LabelledImages) -> tuple[float, float]:
        """Return the clean accuracy on the test images, and that under PGD on the first of them."""
        if (kept := self.stages.load(TEST)) is not None:
            return kept.values["clean_accuracy"], kept.values["robust_accuracy"]
        start = time.perf_counter()
        self.model.eval()
        clean = accuracy_of(self.model, *test, self.device)
        robust = self.robust_accuracy(LabelledImages(*(column[: self.plan.test_examples] for column in test)), TEST)
        values = {"clean_accuracy": clean, "robust_accuracy": robust, "seconds": time.perf_counter() - start}
        self.stages.save(TEST, {}, values)
        return clean, robust

    def robust_accuracy(self, split: LabelledImages, stage: str = "validation") -> float:
        """Return the share of images that is answered rightly both as it is and under PGD."""
        self.model.eval()
        right = round(accuracy_of(self.model, *split, self.device) * len(split.targets))
        if not right:
            return 0.0
        examples = craft(
            self.plan.measured_by,
            self.model,
            *split,
            limit=right,
            device=self.device,
            seed=derived_seed(self.plan.seed, _CRAFTING),
            batch_size=self.plan.batch_size,
            progress=lambda done, total: self.progress(stage, done, total),
        )
        return int((~examples.fooled).sum()) / len(split.targets)

    def state(self) -> State:
        """Return copies of all that the next epoch depends on besides its number."""
        moments = self.optimizer.state_dict()["state"]
        return {f"model.{name}": value.clone() for name, value in self.model.state_dict().items()} | {
            f"momentum.{place}": each["momentum_buffer"].clone() for place, each in moments.items()
        }

    def go_back(self, state: State) -> None:
        """Go back to what ``state`` returned."""
        parts: dict[str, State] = {"model": {}, "momentum": {}}
        for key, value in state.items():
            part, _, name = key.partition(".")
            parts[part][name] = value
        moments: dict[int, Any] = {int(place): {"momentum_buffer": each} for place, each in parts["momentum"].items()}
        self.model.load_state_dict(parts["model"])
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})

    def restore(self, kept: Kept) -> None:
        """Go back to the end of the last epoch that is kept."""
        self.go_back(kept.tensors)
        self.epochs = [Epoch(**each) for each in kept.values["epochs"]]
        self.collapsed = kept.values["collapsed"]
