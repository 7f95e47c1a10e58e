"""Fitting a whole NIP defense for a classifier, from benign images to a calibrated strength."""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from defenses.attacks import attack
from defenses.classifier import Classifier, Layer
from defenses.detector import NoDetector
from defenses.evaluation import Progress
from defenses.nip.amplitude import Strength, choose_amplitude
from defenses.nip.head import head_behind
from defenses.nip.influence import check_layer
from defenses.nip.inverse_perturbation import InversePerturbation, InversePerturbationConfig, Pool
from defenses.nip.measured import Measured, measure
from defenses.nip.plan import NipPlan
from defenses.nip.pool import BuiltPool, build_pool, check_size
from defenses.precision import full_precision
from defenses.protected import ProtectedClassifier
from defenses.splits import Splits
from defenses.stages import Stages


@dataclass(frozen=True)
class FittedNip:
    """A fitted defense on the CPU, in evaluation mode, with what it was measured to do.

    ``left_out`` benign examples gave no gradient. ``seconds`` is what each stage took, however often the fit was taken
    up again.
    """

    protected: ProtectedClassifier
    layer: Layer
    candidates: int
    left_out: int
    template_sizes: tuple[int, ...]
    strength: Strength
    measured: Measured
    seconds: Mapping[str, float]

    @property
    def template_size(self) -> int:
        """How many neurons the template holds; of one for each class, the least."""
        return min(self.template_sizes)

    @property
    def empty_template(self) -> bool:
        """Whether the template, or that of a class, is empty, so that every similarity to it is 0."""
        return self.template_size == 0

    @property
    def metrics(self) -> dict[str, float]:
        """The rates on the test split, by name."""
        return self.measured.metrics


def fit_nip(
    classifier: Classifier,
    splits: Splits,
    plan: NipPlan,
    *,
    stages: Stages,
    device: torch.device,
    progress: Progress,
) -> FittedNip:
    """Fit a pool of inverse perturbations, calibrate its strength, and measure it (sections 4.1 to 4.4).

    The pool is made of the fit split, the strength settled on the validation split, both of clean images alone. What is
    done is kept in ``stages``: a fit that was killed goes on there, to the same result. The same plan on the same
    machine gives the same result; the global random state is left as it was. Before anything is computed raises
    ``LayerNotFound``, ``LayerUnsuitable``, ``PoolTooLarge``, ``AttackUnknown`` and, without validation images,
    ``ValueError``; then ``ValueError`` for a classifier that gets nothing right or has no gradient.
    """
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda), full_precision():
        torch.manual_seed(plan.seed)
        return _Fit(classifier.eval().to(device), splits, plan, stages, device, progress).run()


@dataclass(frozen=True)
class _Fit:
    classifier: Classifier
    splits: Splits
    plan: NipPlan
    stages: Stages
    device: torch.device
    progress: Progress

    def run(self) -> FittedNip:
        plan, splits, classifier = self.plan, self.splits, self.classifier
        layer = classifier.resolve_layer(plan.layer) if plan.layer else classifier.head_layer
        check_layer(layer, plan.k1, plan.k2)
        most = min(plan.pool_size, len(splits.fit.images))
        check_size(InversePerturbationConfig.planned(plan, classifier, layer, most))
        for text in plan.attacks:
            attack(text)
        if not len(splits.validation.images):
            raise ValueError("Expected clean validation images to settle the strength by, got none.")
        built = self.pool(layer)
        purifier = InversePerturbation(built.config, head_behind(classifier, layer))
        purifier.set_pool(built.pool)
        purifier = purifier.eval().to(self.device)
        strength = self.strength(purifier)
        purifier.set_amplitude(strength.amplitude)
        protected = ProtectedClassifier(classifier, purifier, NoDetector()).eval()
        measured = measure(protected, splits.test, plan, stages=self.stages, device=self.device, progress=self.progress)
        return FittedNip(
            protected.cpu(),
            layer,
            built.config.candidates,
            built.left_out,
            built.config.template_sizes,
            strength,
            measured,
            self.stages.timed(),
        )

    def pool(self, layer: Layer) -> BuiltPool:
        """Return the pool that is kept, or make and keep it."""
        if (kept := self.stages.load("pool")) is not None:
            config = InversePerturbationConfig.from_json(kept.values["config"])
            return BuiltPool(Pool(**kept.tensors), config, kept.values["left_out"])
        start = time.perf_counter()
        built = build_pool(
            self.classifier, layer, *self.splits.fit, self.plan, device=self.device, progress=self.progress
        )
        values = {
            "config": built.config.as_json(),
            "left_out": built.left_out,
            "seconds": time.perf_counter() - start,
        }
        self.stages.save("pool", built.pool._asdict(), values)
        return built

    def strength(self, purifier: InversePerturbation) -> Strength:
        """Settle the amplitude on the validation split, or return what was settled."""
        if (kept := self.stages.load("amplitude")) is not None:
            return Strength.from_json(kept.values["strength"])
        plan = self.plan
        start = time.perf_counter()
        strength = choose_amplitude(
            self.classifier,
            purifier,
            *self.splits.validation,
            (plan.amplitude,) if plan.accuracy_loss is None else plan.amplitudes,
            plan.accuracy_loss,
            batch_size=plan.batch_size,
            device=self.device,
            progress=self.progress,
        )
        values = {"strength": strength.as_json(), "seconds": time.perf_counter() - start}
        self.stages.save("amplitude", {}, values)
        return strength
