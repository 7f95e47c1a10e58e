"""What one defense does, measured: on clean images, under attacks, by luck and by the clock."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from defenses.attacks import AdversarialExamples, Form
from defenses.attacks.examples import fools
from defenses.attacks.shards import Crafted, Crafting
from defenses.classifier import Classifier
from defenses.evaluation.answer_cache import AnswerCache
from defenses.evaluation.crafting import Work
from defenses.evaluation.defense import Defense
from defenses.evaluation.lottery import Draws, Lottery
from defenses.evaluation.measurement import Measurement
from defenses.evaluation.plan import EvaluationPlan
from defenses.evaluation.rows import AttackResult, CleanResult, SubstituteResult
from defenses.pixels import to_8_bits, to_float

TIMED = 32
ROUNDS = 5
SAMPLES = 3
"""Images that are timed at once, how often, and how many of each row are shown."""


@dataclass(frozen=True)
class DefenseResult:
    """What is said of a defense whatever the attack: on clean images, by luck, and in milliseconds per image.

    The times are medians of 5 rounds at a batch of 32, in turn with the bare classifier, in torch.
    """

    name: str
    noisy: bool
    clean: CleanResult
    lottery: Lottery | None
    milliseconds: float
    bare_milliseconds: float


@dataclass(frozen=True, eq=False)
class Sample:
    """Show one example of a row: clean, adversarial and purified images, float32 (C, H, W) in [0, 1], and answers."""

    defense: str
    scenario: str
    attack: str
    clean: Tensor
    adversarial: Tensor
    purified: Tensor
    true_class: int
    undefended_class: int
    answered_class: int
    alerted: bool


class Meter:
    """Measure one defense of a classifier, under each of its noises.

    ``images`` uint8 (N, C, H, W) and ``targets`` (N,) are the clean ones; ``cache`` is this defense's. The noise is
    drawn from seeds of the plan alone, so that each measurement gives the same whatever went before it, and the global
    random state is left as it was.
    """

    def __init__(
        self,
        classifier: Classifier,
        defense: Defense,
        plan: EvaluationPlan,
        images: Tensor,
        targets: Tensor,
        device: torch.device,
        cache: AnswerCache,
    ) -> None:
        self.classifier, self.defense, self.plan, self.device = classifier, defense, plan, device
        self.images = images
        self.scale = float(plan.noise)
        seeds = range(plan.seed, plan.seed + (plan.noise_seeds if defense.noisy else 1))
        self.measurements = [
            Measurement(defense.protected, self.device, seed, self.scale, cache=cache) for seed in seeds
        ]
        self.draws = Draws(defense.protected, self.device, plan.seed, self.scale, cache)
        self._clean = [each.clean(images, targets) for each in self.measurements]

    def defense_result(self) -> DefenseResult:
        """Return what is said of the defense whatever the attack."""
        images = self.images
        milliseconds, bare = self._timed(images[:TIMED])
        return DefenseResult(
            self.defense.name,
            self.defense.noisy,
            CleanResult.over([row for row, _ in self._clean]),
            self.draws.lottery(images[: self.plan.lottery]) if self.defense.noisy and self.plan.lottery else None,
            milliseconds,
            bare,
        )

    def attacked(
        self, work: Work, crafting: Crafting, crafted: Crafted, substitute: SubstituteResult | None
    ) -> tuple[list[AttackResult], list[Sample]]:
        """Return a row for each form of an attack's examples, and a few of them."""
        examples = self._examples(work, crafting, crafted)
        forms = zip(
            *(
                measurement.attacked(examples, scores)
                for measurement, (_, scores) in zip(self.measurements, self._clean, strict=True)
            ),
            strict=True,
        )
        rows = [
            AttackResult.over(
                under_each_noise,
                defense=self.defense.name,
                scenario=work.scenario,
                attack=crafting.attack,
                success_within=self._success_within(examples, under_each_noise[0].form),
                seconds_per_image=crafted.seconds / len(crafted.rows),
                substitute=substitute,
            )
            for under_each_noise in forms
        ]
        return rows, list(self._samples(work, examples))

    def won(self, crafting: Crafting, crafted: Crafted) -> float:
        """Return the share of examples that are answered wrongly and not alerted, under the first noise."""
        y = crafting.targets[crafted.rows]
        answers = self.measurements[0].answers(crafted.x_adv)
        return float(((answers.logits.argmax(1) != y) & ~answers.alerts).float().mean())

    def _examples(self, work: Work, crafting: Crafting, crafted: Crafted) -> AdversarialExamples:
        """Return what was crafted with what counts: what fools the bare classifier in A, all attempts otherwise."""
        x, y, x_adv = crafting.images[crafted.rows], crafting.targets[crafted.rows], crafted.x_adv
        everything = torch.ones(len(y), dtype=torch.bool)
        fooled, fooled_rounded = everything, everything
        if work.scenario == "A":
            fooled, fooled_rounded = (self._fooled(each, y) for each in (x_adv, to_8_bits(x_adv)))
        return AdversarialExamples(crafting.attack, x, x_adv, y, crafted.rows, fooled, fooled_rounded)

    def _fooled(self, images: Tensor, y: Tensor) -> Tensor:
        parts = zip(images.split(128), y.split(128), strict=True)
        return torch.cat(
            [fools(self.classifier, to_float(x.to(self.device)), truth.to(self.device)).cpu() for x, truth in parts]
        )

    def _success_within(self, examples: AdversarialExamples, form: Form) -> dict[int, float] | None:
        fooled, images = examples.fooling(form)
        count = self.plan.lottery
        if form != "as crafted" or not (self.defense.noisy and count and len(images)):
            return None
        return self.draws.success_within(images[:count], examples.y[fooled][:count])

    @torch.no_grad()
    def _samples(self, work: Work, examples: AdversarialExamples) -> Iterator[Sample]:
        fooled, images = examples.fooling("as crafted")
        x, x_adv, y = examples.x[fooled][:SAMPLES], images[:SAMPLES], examples.y[fooled][:SAMPLES]
        if not len(y):
            return
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(self.plan.seed)
            output = self.defense.protected(x_adv.to(self.device), torch.tensor(self.scale, device=self.device))
        for i, truth in enumerate(y.tolist()):
            yield Sample(
                self.defense.name,
                work.scenario,
                examples.attack.name,
                to_float(x[i]),
                x_adv[i],
                output.purified[i].cpu(),
                truth,
                int(output.undefended_logits[i].argmax()),
                int(output.logits[i].argmax()),
                bool(output.alerts[i]),
            )

    @torch.no_grad()
    def _timed(self, images: Tensor) -> tuple[float, float]:
        """Return the median milliseconds per image of the protected classifier and of the bare one, run in turn."""
        x = to_float(images).to(self.device)
        protected, bare = self.defense.protected, self.classifier
        spent: tuple[list[float], list[float]] = ([], [])
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            for _ in range(ROUNDS + 1):
                for model, times in zip((protected, bare), spent, strict=True):
                    start = time.perf_counter()
                    model(x)
                    if self.device.type == "cuda":
                        torch.cuda.synchronize(self.device)
                    times.append(time.perf_counter() - start)
        return median(spent[0][1:]) * 1000 / len(x), median(spent[1][1:]) * 1000 / len(x)
