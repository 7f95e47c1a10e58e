"""An evaluation: everything crafted, then everything measured, then the attacks themselves looked at."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

import torch
from torch import Tensor

from defenses.attacks import AdversarialExamples, Form
from defenses.attacks.examples import fools
from defenses.attacks.shards import Crafted, Crafting, ExampleCache, craft_shards
from defenses.classifier import Classifier
from defenses.evaluation import Progress, run_batched, sanity
from defenses.evaluation.crafting import (
    ANOTHER_IMAGE,
    REPEATED,
    RESULT,
    UNDEFENDED,
    Defense,
    QueryImages,
    StandIn,
    Substitutes,
    Work,
    Workshop,
    first_right,
)
from defenses.evaluation.lottery import Draws, Lottery
from defenses.evaluation.measurement import Measurement
from defenses.evaluation.plan import EvaluationPlan, Sweep
from defenses.evaluation.rows import AttackResult, Check, CleanResult, SubstituteResult, SweepResult
from defenses.pixels import to_8_bits, to_float
from defenses.protected import ProtectedClassifier

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


@dataclass(frozen=True)
class EvaluationResult:
    """All that was measured; ``complete`` says whether all was crafted that the plan asks for."""

    defenses: tuple[DefenseResult, ...]
    rows: tuple[AttackResult, ...]
    sweeps: tuple[SweepResult, ...]
    checks: tuple[Check, ...]
    samples: tuple[Sample, ...]
    attempted: int
    complete: bool


class Evaluation:
    """Evaluate defenses of one classifier, all on ``device`` and in evaluation mode, on the same images.

    ``digest`` names the classifier for good, and each defense has one of its own: examples are kept under them.
    ``undefended`` is the classifier behind no defense.
    """

    def __init__(
        self,
        classifier: Classifier,
        digest: str,
        undefended: ProtectedClassifier,
        defenses: Sequence[tuple[str, str, ProtectedClassifier]],
        plan: EvaluationPlan,
        images: Tensor,
        targets: Tensor,
        device: torch.device,
        query_images: QueryImages | None = None,
    ) -> None:
        """Take images uint8 (N, C, H, W) and classes (N,), in the order in which they are attempted.

        ``query_images`` are what substitutes learn from in scenario transfer. Raises ``AttackUnknown`` and
        ``SweepUnclear``, and ``ValueError`` where the classifier gets none right or a substitute has no images.
        """
        plan.parsed()
        self.classifier, self.plan, self.device = classifier, plan, device
        self.images, self.targets = images, targets
        rows = first_right(classifier, images, targets, plan.limit, device)
        if not len(rows):
            raise ValueError(f"The classifier gets none of the {len(images)} images right, so none can be attempted.")
        self.rows = rows
        scale = float(plan.noise)
        few = images[:8]
        self.defenses = tuple(
            Defense(name, own, protected, Draws(protected, device, plan.seed, scale).noisy(few))
            for name, own, protected in defenses
        )
        self.workshop = Workshop(classifier, digest, undefended, self.defenses, plan, images[rows], targets[rows])
        self.query_images = query_images
        if self.workshop.wants_substitutes and query_images is None:
            raise ValueError("Expected images that substitutes can ask the defenses about in transfer, got none.")

    def run(self, kept: ExampleCache, *, deadline: float = float("inf"), progress: Progress) -> EvaluationResult:
        """Craft what is not kept, until ``deadline`` in ``time.monotonic()``, and measure what there is.

        Raises what the attacks and ``distil`` raise, and ``StageNotKept``.
        """
        substitutes = self._substitutes(kept, deadline, progress)
        works = self.workshop.works(substitutes)
        made = craft_shards(list(works.values()), kept, device=self.device, deadline=deadline, progress=progress)
        crafted = dict(zip(works, made, strict=True))
        results, rows, samples = [], [], []
        for number, defense in enumerate(self.defenses):
            progress("measured", number, len(self.defenses))
            meter = _Meter(self, defense)
            results.append(meter.defense_result())
            for work, examples in crafted.items():
                if work.purpose == RESULT and work.defense in (None, defense.name) and len(examples.rows):
                    asked = substitutes[defense.name].result if work.scenario == "transfer" else None
                    found, shown = meter.attacked(work, works[work], examples, asked)
                    rows += found
                    samples += shown
        progress("measured", len(self.defenses), len(self.defenses))
        sweeps = tuple(self._sweeps(rows))
        checks = tuple(self._checks(works, crafted, rows, sweeps)) if self.plan.checks else ()
        complete = all(len(crafted[work].rows) == len(crafting.targets) for work, crafting in works.items())
        complete &= not self.workshop.wants_substitutes or len(substitutes) == len(self.defenses)
        judged = tuple(replace(row, untrusted=sanity.untrusted_by(checks, row)) for row in rows)
        return EvaluationResult(tuple(results), judged, sweeps, checks, tuple(samples), len(self.rows), complete)

    def _substitutes(self, kept: ExampleCache, deadline: float, progress: Progress) -> dict[str, StandIn]:
        if self.query_images is None or not self.workshop.wants_substitutes:
            return {}
        return Substitutes(kept.folder, self.plan, self.query_images, self.device, progress).train(
            self.defenses, deadline
        )

    def _sweeps(self, rows: Sequence[AttackResult]) -> Iterator[SweepResult]:
        by_place = {(row.defense, row.scenario, row.attack): row for row in rows if row.form == "as crafted"}
        for defense in self.defenses:
            for sweep in self.workshop.sweeps:
                for scenario in self.plan.scenarios:
                    found = [by_place.get((defense.name, scenario, each.name)) for each in sweep.attacks]
                    present = [(value, row) for value, row in zip(sweep.values, found, strict=True) if row is not None]
                    if present:
                        yield _swept(sweep, present)

    def _checks(
        self,
        works: Mapping[Work, Crafting],
        crafted: Mapping[Work, Crafted],
        rows: Sequence[AttackResult],
        sweeps: Sequence[SweepResult],
    ) -> Iterator[Check]:
        broken, same = {}, {}
        for work, examples in crafted.items():
            if work.purpose == UNDEFENDED and len(examples.rows):
                broken[work.attack] = self._broken(works[work], examples)
                again = crafted[replace(work, purpose=REPEATED)].x_adv
                if len(again):
                    same[work.attack] = torch.equal(examples.x_adv[: len(again)], again)
        yield from sanity.breaks_the_undefended(broken)
        yield from sanity.repeats(same)
        yield from sanity.wins_without_bound(
            row for row in rows if row.attack == ANOTHER_IMAGE and row.form == "as crafted"
        )
        yield from self._efforts(works, crafted)
        yield from sanity.white_box_is_best(rows)
        yield from sanity.transfer_is_weaker(rows)
        yield from sanity.budget_breaks_all(sweeps)

    def _efforts(self, works: Mapping[Work, Crafting], crafted: Mapping[Work, Crafted]) -> Iterator[Check]:
        defenses = {defense.name: defense for defense in self.defenses}
        for work, examples in crafted.items():
            if work.purpose in (RESULT, UNDEFENDED, REPEATED) or work.defense is None or not len(examples.rows):
                continue
            usual = crafted[replace(work, purpose=RESULT)]
            count = min(len(usual.rows), len(examples.rows))
            meter = _Meter(self, defenses[work.defense])
            before, after = (
                meter.won(works[work], replace(each, rows=each.rows[:count], x_adv=each.x_adv[:count]))
                for each in (usual, examples)
            )
            yield sanity.gains_little(work.purpose, work.defense, work.attack, before, after, count)

    def _broken(self, crafting: Crafting, examples: Crafted) -> float:
        y = crafting.targets[examples.rows]
        wrong = [
            fools(self.classifier, x_adv.to(self.device), truth.to(self.device)).cpu()
            for x_adv, truth in zip(examples.x_adv.split(128), y.split(128), strict=True)
        ]
        return float(torch.cat(wrong).float().mean())


class _Meter:
    """Measure one defense of an evaluation, under each of its noises."""

    def __init__(self, evaluation: Evaluation, defense: Defense) -> None:
        plan = evaluation.plan
        self.evaluation, self.defense, self.plan, self.device = evaluation, defense, plan, evaluation.device
        self.scale = float(plan.noise)
        seeds = range(plan.seed, plan.seed + (plan.noise_seeds if defense.noisy else 1))
        self.measurements = [Measurement(defense.protected, self.device, seed, self.scale) for seed in seeds]
        self.draws = Draws(defense.protected, self.device, plan.seed, self.scale)
        self._clean = [each.clean(evaluation.images, evaluation.targets) for each in self.measurements]

    def defense_result(self) -> DefenseResult:
        """Return what is said of the defense whatever the attack."""
        images = self.evaluation.images
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
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(self.plan.seed)
            answers = run_batched(self.defense.protected, crafted.x_adv, self.device, noise_scale=self.scale)
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
        classifier = self.evaluation.classifier
        parts = zip(images.split(128), y.split(128), strict=True)
        return torch.cat(
            [fools(classifier, to_float(x.to(self.device)), truth.to(self.device)).cpu() for x, truth in parts]
        )

    def _success_within(self, examples: AdversarialExamples, form: Form) -> dict[int, float] | None:
        fooled, images = examples.fooling(form)
        count = self.plan.lottery
        if not (self.defense.noisy and count and len(images)):
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
        protected, bare = self.defense.protected, self.evaluation.classifier
        spent: tuple[list[float], list[float]] = ([], [])
        for _ in range(ROUNDS + 1):
            for model, times in zip((protected, bare), spent, strict=True):
                start = time.perf_counter()
                model(x)
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)
                times.append(time.perf_counter() - start)
        return median(spent[0][1:]) * 1000 / len(x), median(spent[1][1:]) * 1000 / len(x)


def _swept(sweep: Sweep, present: Sequence[tuple[float, AttackResult]]) -> SweepResult:
    values, rows = zip(*present, strict=True)
    first: AttackResult = rows[0]
    return SweepResult(
        first.defense,
        first.scenario,
        sweep.text,
        sweep.parameter,
        values,
        tuple(row.attack for row in rows),
        tuple(1.0 if row.resisted_of_attempts is None else row.resisted_of_attempts for row in rows),
        tuple(1.0 if row.corrected is None else row.corrected.mean for row in rows),
        tuple(0.0 if row.alerted is None else row.alerted.mean for row in rows),
        tuple(row.distortion_l2 for row in rows),
    )
