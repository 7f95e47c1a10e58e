"""What a fitted NIP defense was measured to do, whichever it is."""

from dataclasses import dataclass
from typing import Protocol

import torch

from defenses.attacks import AdversarialExamples, attack, craft_once
from defenses.detector import NoDetector
from defenses.evaluation import Progress
from defenses.evaluation.measurement import ExampleRow, Measurement
from defenses.evaluation.rates import CleanRow
from defenses.protected import ProtectedClassifier
from defenses.splits import LabelledImages
from defenses.stages import Stages


@dataclass(frozen=True)
class Measured:
    """Hold what was measured on the test split: clean images, and each attack's rows.

    Of the rows ``regulator`` is the defense success rate: the share answered with the true class among the examples
    that fool the bare classifier. ``examples`` are what was measured, for a look; ``inspected`` says whether there is a
    detector that alerts.
    """

    clean: CleanRow
    attacks: tuple[ExampleRow, ...]
    examples: tuple[AdversarialExamples, ...]
    inspected: bool

    @property
    def metrics(self) -> dict[str, float]:
        """The rates by name; those over examples that fool the classifier, as crafted."""
        metrics = {
            "clean_accuracy_undefended": self.clean.undefended_accuracy,
            "clean_accuracy": self.clean.accuracy,
        }
        if self.inspected:
            metrics["false_positive_rate"] = self.clean.false_positive_rate
        for row in self.attacks:
            if row.form == "as crafted":
                metrics[f"attack_success_rate.{row.attack}"] = row.fooling / row.attempted
                if row.corrected is not None:
                    metrics[f"defense_success_rate.{row.attack}"] = row.corrected
                if self.inspected and row.alerted is not None:
                    metrics[f"alert_rate.{row.attack}"] = row.alerted
        return metrics


class MeasuredPlan(Protocol):
    """What a plan says of the measurement: the attacks, on how many images each, in batches of which size."""

    @property
    def attacks(self) -> tuple[str, ...]: ...

    @property
    def test_examples(self) -> int: ...

    @property
    def batch_size(self) -> int: ...

    @property
    def seed(self) -> int: ...


def measure(
    protected: ProtectedClassifier,
    test: LabelledImages,
    plan: MeasuredPlan,
    *,
    stages: Stages,
    device: torch.device,
    progress: Progress,
) -> Measured:
    """Measure a protected classifier, on ``device``, clean and against a plan's attacks.

    The examples are crafted on the bare classifier, and kept in ``stages``.
    """
    examples = tuple(
        craft_once(
            attack(text),
            protected.classifier,
            test,
            "test",
            limit=plan.test_examples,
            stages=stages,
            device=device,
            seed=plan.seed,
            batch_size=plan.batch_size,
            progress=progress,
        )
        for text in plan.attacks
    )
    scenario = Measurement(protected, device, plan.seed, batch_size=plan.batch_size)
    clean, scores = scenario.clean(*test)
    rows = tuple(row for each in examples for row in scenario.attacked(each, scores))
    return Measured(clean, rows, examples, not isinstance(protected.detector, NoDetector))
