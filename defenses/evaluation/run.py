"""An evaluation: everything crafted, then everything measured, then the attacks themselves looked at."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from defenses.attacks.examples import fools
from defenses.attacks.shards import Crafted, Crafting, ExampleCache, craft_shards
from defenses.classifier import Classifier
from defenses.evaluation import Progress, sanity
from defenses.evaluation.answer_cache import AnswerCache
from defenses.evaluation.crafting import (
    ANOTHER_IMAGE,
    REPEATED,
    RESULT,
    UNDEFENDED,
    Work,
    Workshop,
    first_right,
)
from defenses.evaluation.defense import Defense
from defenses.evaluation.lottery import Draws
from defenses.evaluation.meter import DefenseResult, Meter, Sample
from defenses.evaluation.plan import EvaluationPlan, Sweep
from defenses.evaluation.rows import AttackResult, Check, SweepResult
from defenses.evaluation.substitutes import QueryImages, StandIn, Substitutes
from defenses.precision import full_precision
from defenses.protected import ProtectedClassifier


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

        ``query_images`` are what substitutes learn from in scenario transfer. Raises ``AttackUnknown``,
        ``SweepUnclear`` and ``ScenarioMissing``, and ``ValueError`` where the classifier gets none right or a
        substitute has no images.
        """
        plan.parsed()
        self.classifier, self.plan, self.device = classifier, plan, device
        self.images, self.targets = images, targets
        with full_precision():
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
        self.workshop = Workshop(
            classifier, digest, undefended, self.defenses, plan, images[rows], targets[rows], device
        )
        self.query_images = query_images
        if self.workshop.wants_substitutes and query_images is None:
            raise ValueError("Expected images that substitutes can ask the defenses about in transfer, got none.")

    def run(self, kept: ExampleCache, *, deadline: float = float("inf"), progress: Progress) -> EvaluationResult:
        """Craft what is not kept, until ``deadline`` in ``time.monotonic()``, and measure what there is.

        Raises what the attacks and ``distil`` raise, and ``StageNotKept``.
        """
        with full_precision():
            return self._run(kept, deadline, progress)

    def _run(self, kept: ExampleCache, deadline: float, progress: Progress) -> EvaluationResult:
        substitutes = self._substitutes(kept, deadline, progress)
        works = self.workshop.works(substitutes)
        made = craft_shards(list(works.values()), kept, deadline=deadline, progress=progress)
        crafted = dict(zip(works, made, strict=True))
        meters: dict[str, Meter] = {}
        results, rows, samples = [], [], []
        for number, defense in enumerate(self.defenses):
            progress("measured", number, len(self.defenses))
            answers = AnswerCache(kept.folder, f"{defense.digest}, answers, {self.plan.switches}", self.device)
            meter = Meter(self.classifier, defense, self.plan, self.images, self.targets, self.device, answers)
            meters[defense.name] = meter
            results.append(meter.defense_result())
            for work, examples in crafted.items():
                if work.purpose == RESULT and work.defense in (None, defense.name) and len(examples.rows):
                    asked = substitutes[defense.name].result if work.scenario == "transfer" else None
                    found, shown = meter.attacked(work, works[work], examples, asked)
                    rows += found
                    samples += shown
        progress("measured", len(self.defenses), len(self.defenses))
        sweeps = tuple(self._sweeps(rows))
        checks = tuple(self._checks(works, crafted, rows, sweeps, meters)) if self.plan.checks else ()
        complete = all(len(crafted[work].rows) == len(crafting.targets) for work, crafting in works.items())
        complete &= not self.workshop.wants_substitutes or len(substitutes) == len(self.defenses)
        judged = tuple(
            replace(row, untrusted=sanity.untrusted_by(checks, row), checked=sanity.checked_by(checks, row))
            for row in rows
        )
        sweeps = tuple(self._sweeps(judged))
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
        meters: Mapping[str, Meter],
    ) -> Iterator[Check]:
        broken, same = {}, {}
        for work, examples in crafted.items():
            if work.purpose == UNDEFENDED and len(examples.rows):
                broken[work.attack] = self._broken(works[work], examples)
                once, again = _common(examples, crafted[replace(work, purpose=REPEATED)])
                if len(again.rows):
                    same[work.attack] = torch.equal(once.x_adv, again.x_adv)
        must_break = self.workshop.must_break
        yield from sanity.breaks_the_undefended({name: share for name, share in broken.items() if name in must_break})
        yield from sanity.repeats(same)
        yield from sanity.wins_without_bound(
            row for row in rows if row.attack == ANOTHER_IMAGE and row.form == "as crafted"
        )
        yield from _efforts(works, crafted, meters)
        yield from sanity.white_box_is_best(rows)
        yield from sanity.turns_the_defense(rows, broken)
        yield from sanity.knowledge_helps(rows)
        yield from sanity.transfer_is_weaker(rows)
        whole = {sweep.text: len(sweep.attacks) for sweep in self.workshop.sweeps}
        yield from sanity.budget_breaks_all(each for each in sweeps if len(each.values) == whole[each.sweep])

    def _broken(self, crafting: Crafting, examples: Crafted) -> float:
        y = crafting.targets[examples.rows]
        wrong = [
            fools(self.classifier, x_adv.to(self.device), truth.to(self.device)).cpu()
            for x_adv, truth in zip(examples.x_adv.split(128), y.split(128), strict=True)
        ]
        return float(torch.cat(wrong).float().mean())


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
        tuple(row.distortion_l2 for row in rows),
        tuple(bool(row.untrusted) for row in rows),
        tuple(row.unchecked for row in rows),
    )


def _efforts(
    works: Mapping[Work, Crafting], crafted: Mapping[Work, Crafted], meters: Mapping[str, Meter]
) -> Iterator[Check]:
    for work, examples in crafted.items():
        if work.purpose in (RESULT, UNDEFENDED, REPEATED) or work.defense is None or not len(examples.rows):
            continue
        usual, longer = _common(crafted[replace(work, purpose=RESULT)], examples)
        if len(usual.rows):
            before, after = (meters[work.defense].won(works[work], each) for each in (usual, longer))
            yield sanity.gains_little(work.purpose, work.defense, work.attack, before, after, len(usual.rows))


def _common(first: Crafted, second: Crafted) -> tuple[Crafted, Crafted]:
    """Return what two craftings made of the images that both came to."""

    def shared(each: Crafted, other: Crafted) -> Crafted:
        kept = torch.isin(each.rows, other.rows)
        return replace(each, rows=each.rows[kept], x_adv=each.x_adv[kept])

    return shared(first, second), shared(second, first)
