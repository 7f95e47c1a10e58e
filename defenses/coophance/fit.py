"""Fitting a whole CoopHANCE defense for a classifier, from labelled images to a calibrated threshold."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from defenses.attacks import AdversarialExamples, Attack, attack, craft
from defenses.calibration import calibrate, check_budget
from defenses.classifier import Classifier, Layer
from defenses.coophance.augmentation import Augmentation
from defenses.coophance.inspector import FEWEST_EXAMPLES, Inspector, InspectorConfig, InspectorReport, fit_inspector
from defenses.coophance.regulator import Regulator, RegulatorConfig
from defenses.coophance.training import TrainedRegulator, TrainingPlan, fit_regulator, steps_in
from defenses.evaluation import Progress, resisted, run_batched
from defenses.protected import ProtectedClassifier


class LabelledImages(NamedTuple):
    """Images uint8 (N, C, H, W) and their classes int64 (N,)."""

    images: Tensor
    targets: Tensor


class Splits(NamedTuple):
    """The three parts of a data set, which share no image: to fit on, to calibrate on, to measure on."""

    fit: LabelledImages
    calibration: LabelledImages
    test: LabelledImages


@dataclass(frozen=True)
class FitPlan:
    """Say how a CoopHANCE defense is fitted.

    ``epochs`` of the fitting images train the sample model, unless ``minutes`` of training time are given instead.
    ``examples`` is how many adversarial examples each attack contributes, ``negatives`` how many benign images each
    class contributes at most; ``test_examples`` how many test images each attack is measured on. ``budget`` is the
    false-positive rate that the threshold is calibrated to. ``layer`` names the Inspector's layer, found by itself
    when None. ``inverse_penalty`` is the C of the regressions.
    """

    attacks: tuple[str, ...] = ("fgsm", "pgd-stop", "pgd")
    examples: int = 2000
    negatives: int = 2000
    test_examples: int = 300
    epochs: float = 20.0
    minutes: float | None = None
    batch_size: int = 128
    budget: float = 0.05
    form: Literal["batch-norm", "plain"] = "batch-norm"
    confusion: bool = True
    alpha: float = 1.0
    flip: bool = True
    inspects: Literal["raw", "purified"] = "raw"
    layer: str | None = None
    inverse_penalty: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        positive = ("examples", "negatives", "test_examples", "epochs", "minutes", "batch_size", "inverse_penalty")
        for name in positive:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"Expected {name} above 0, got {value}.")
        if not self.alpha >= 0:
            raise ValueError(f"Expected alpha of 0 or more, got {self.alpha}.")

    def regulator_config(self, image_shape: tuple[int, int, int]) -> RegulatorConfig:
        """Return the structure of the Regulator for images (C, H, W)."""
        config = RegulatorConfig(image_shape) if self.form == "batch-norm" else RegulatorConfig.plain(image_shape)
        return replace(config, confusion=self.confusion, alpha=self.alpha)


@dataclass(frozen=True)
class Fitted:
    """A fitted defense on the CPU, in evaluation mode, with what it was fitted on and measured to do.

    ``metrics`` are rates on the test split: ``clean_accuracy_undefended``, ``clean_accuracy`` (alerts not counted as
    errors), ``false_positive_rate``, and per attack ``attack_success_rate.NAME`` and ``resistance_rate.NAME``.
    """

    protected: ProtectedClassifier
    layer: Layer
    regulator: TrainedRegulator
    training: TrainingPlan
    inspector: InspectorReport
    examples: tuple[AdversarialExamples, ...]
    metrics: dict[str, float]


def fit_coophance(
    classifier: Classifier, splits: Splits, plan: FitPlan, *, device: torch.device, progress: Progress
) -> Fitted:
    """Fit a Regulator and an Inspector, calibrate the threshold, and measure the whole (sections 3.1 and 3.2).

    The same plan on the same machine gives the same result; the global random state is left as it was. Before the
    training begins, raises ``CalibrationTooSmall``, ``AttackUnknown`` and ``LayerNotFound``, and ``ValueError`` for a
    classifier that gets nothing right or that too few attacked images fool.
    """
    cuda = [device] if device.type == "cuda" else []
    # Reduced precision would move what lies on the classifier's boundary, where these examples lie.
    exact = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=False, allow_tf32=False)
    with torch.random.fork_rng(devices=cuda), exact:
        torch.manual_seed(plan.seed)
        return _fit(classifier, splits, plan, device, progress)


def _fit(classifier: Classifier, splits: Splits, plan: FitPlan, device: torch.device, progress: Progress) -> Fitted:
    attacks = [attack(text) for text in plan.attacks]
    layer = classifier.resolve_layer(plan.layer) if plan.layer else classifier.tap
    check_budget(len(splits.calibration.targets), plan.budget)
    classifier = classifier.eval().to(device)

    def crafted(each: Attack, part: LabelledImages, limit: int, purpose: str) -> AdversarialExamples:
        def advance(done: int, total: int) -> None:
            progress(f"{each.name} ({purpose})", done, total)

        return craft(each, classifier, *part, limit=limit, device=device, seed=plan.seed, progress=advance)

    examples = tuple(crafted(each, splits.fit, plan.examples, "fit") for each in attacks)
    fooling = sum(int(each.fooled.sum()) for each in examples)
    if fooling < FEWEST_EXAMPLES:
        raise ValueError(
            f"An Inspector needs at least {FEWEST_EXAMPLES} images that fool the classifier, got {fooling}."
        )
    training = _training_plan(classifier, splits.fit.images, plan, device)
    pairs = [(each.x, each.x_adv) for each in examples]
    trained = fit_regulator(
        plan.regulator_config(classifier.image_shape),
        splits.fit.images,
        pairs,
        training,
        device=device,
        progress=progress,
    )
    inspector, report = _fit_inspector(classifier, trained.regulator, layer, splits.fit, examples, plan, progress)
    protected = ProtectedClassifier(classifier, trained.regulator, inspector.to(device), float("inf")).eval()
    scores = run_batched(protected, splits.calibration.images, device).scores
    protected.threshold.fill_(calibrate(scores, plan.budget))
    metrics = _measure_clean(protected, splits.test, device)
    for each in attacks:
        metrics |= _measure_attack(protected, crafted(each, splits.test, plan.test_examples, "test"), device)
    return Fitted(protected.cpu(), layer, trained, training, report, examples, metrics)


def _training_plan(classifier: Classifier, images: Tensor, plan: FitPlan, device: torch.device) -> TrainingPlan:
    training = TrainingPlan(
        steps=max(5, round(plan.epochs * len(images) / plan.batch_size)),
        batch_size=min(plan.batch_size, len(images)),
        augmentation=Augmentation(flip=plan.flip),
        seed=plan.seed,
    )
    if plan.minutes is None:
        return training
    steps = steps_in(plan.regulator_config(classifier.image_shape), training, plan.minutes * 60, device=device)
    return replace(training, steps=steps)


def _fit_inspector(
    classifier: Classifier,
    regulator: Regulator,
    layer: Layer,
    fit: LabelledImages,
    examples: Sequence[AdversarialExamples],
    plan: FitPlan,
    progress: Progress,
) -> tuple[Inspector, InspectorReport]:
    device = regulator.to_image.weight.device
    noise_on = torch.ones((), device=device)

    def purified(x: Tensor) -> Tensor:
        return regulator(x, noise_on)  # type: ignore[no-any-return]

    def activations(x: Tensor) -> Tensor:
        watched = x if plan.inspects == "raw" else purified(x)
        return classifier.features(watched, layer.name).flatten(1)

    fooling = torch.cat([each.x_adv[each.fooled] for each in examples])
    predicted = _over(lambda x: classifier(purified(x)).argmax(1), fooling, device)
    rows = torch.cat([(fit.targets == c).nonzero().flatten()[: plan.negatives] for c in range(classifier.classes)])
    return fit_inspector(
        InspectorConfig(layer.name, math.prod(layer.shape), classifier.classes, plan.inspects),
        lambda images: _over(activations, images, device),
        (fit.images[rows], fit.targets[rows]),
        (fooling, predicted),
        inverse_penalty=plan.inverse_penalty,
        progress=lambda done, total: progress("inspector", done, total),
    )


@torch.no_grad()
def _over(function: Callable[[Tensor], Tensor], images: Tensor, device: torch.device) -> Tensor:
    """Apply a function to images, uint8 or float in [0, 1], in batches; gather the results on the CPU."""
    batches = (batch.to(device) for batch in images.split(128))
    return torch.cat([function(x.float() / 255 if x.dtype == torch.uint8 else x).cpu() for x in batches])


def _measure_clean(protected: ProtectedClassifier, test: LabelledImages, device: torch.device) -> dict[str, float]:
    output = run_batched(protected, test.images, device)
    return {
        "clean_accuracy_undefended": float((output.undefended_logits.argmax(1) == test.targets).float().mean()),
        "clean_accuracy": float((output.logits.argmax(1) == test.targets).float().mean()),
        "false_positive_rate": float(output.alerts.float().mean()),
    }


def _measure_attack(
    protected: ProtectedClassifier, examples: AdversarialExamples, device: torch.device
) -> dict[str, float]:
    name, fooled = examples.attack.name, examples.fooled
    metrics = {f"attack_success_rate.{name}": examples.success_rate}
    if fooled.any():
        output = run_batched(protected, examples.x_adv[fooled], device)
        metrics[f"resistance_rate.{name}"] = float(resisted(output, examples.y[fooled]).float().mean())
    return metrics
