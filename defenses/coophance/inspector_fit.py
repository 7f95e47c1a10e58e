"""Fitting an Inspector: its regressions, how much they are regularised, and what they are weighed with."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from defenses.coophance.fusion import CLUES, clues, fit_fusion
from defenses.coophance.inspector import Inspector, InspectorConfig
from defenses.coophance.regressions import Watched, fit_regressions
from defenses.detector import Evidence
from defenses.evaluation.curves import ResistanceCurve
from defenses.pixels import to_float
from defenses.stages import Stages

INVERSE_PENALTIES = (1e-4, 1e-3, 1e-2)
"""The C that are tried for the regressions."""


@dataclass(frozen=True)
class InspectorExamples:
    """What an Inspector is fitted on, and what it is chosen by; no image is in both.

    ``benign`` and ``adversarial`` fit the regressions, ``clean`` and ``attacks`` (by name) validate them and fit the
    fusion.
    """

    benign: Watched
    adversarial: Watched
    clean: Watched
    attacks: Mapping[str, Watched]


@dataclass(frozen=True)
class InspectorReport:
    """Tell what an Inspector was fitted on.

    ``negatives`` and ``positives`` count each class's examples; ``shared`` are the classes that take the regression of
    all classes together; ``seconds`` is what each regression took. ``inverse_penalty`` is the C taken, and ``areas``
    are, for each C that was tried, the area under resistance over false positives, averaged over the attacks; empty
    where no attacked validation image fools the classifier.
    """

    negatives: tuple[int, ...]
    positives: tuple[int, ...]
    shared: tuple[int, ...]
    seconds: tuple[float, ...]
    inverse_penalty: float
    areas: Mapping[str, float]


def fit_inspector(
    config: InspectorConfig,
    activations_of: Callable[[Tensor], Tensor],
    evidence_of: Callable[[Tensor], Evidence],
    examples: InspectorExamples,
    inverse_penalties: Sequence[float],
    *,
    surviving: bool,
    device: torch.device,
    seed: int,
    stages: Stages,
    progress: Callable[[int, int], None],
) -> tuple[Inspector, InspectorReport]:
    """Fit the regressions and, where the configuration has one, the fusion; return the Inspector with its report.

    ``activations_of`` turns images, float in [0, 1] and on ``device``, into the activations of the Inspector's layer,
    ``evidence_of`` into all that it is shown. The rest is as in ``fit_regressions``, which raises; of several inverse
    penalties the one is taken that does best on the validation examples. The Inspector is in evaluation mode and on
    ``device``. Raises ``ValueError`` too where several penalties or a fusion want attacked examples and there are none.
    """
    if not examples.attacks and (config.fusion or len(inverse_penalties) > 1):
        raise ValueError("Expected attacked validation images to choose the penalty and fit the fusion by, got none.")
    inspector = Inspector(config).eval().to(device)

    def features_of(images: Tensor) -> Tensor:
        return _gathered(lambda x: inspector.features(activations_of(x)), images, device, seed)

    fitted = fit_regressions(
        features_of,
        examples.benign,
        examples.adversarial,
        config.classes,
        inverse_penalties,
        surviving=surviving,
        stages=stages,
        progress=progress,
    )
    weights, biases = fitted.weights.to(device), fitted.biases.to(device)

    def observed(x: Tensor) -> Tensor:
        """Return the decision under each inverse penalty, and the clues beside it: (N, G + 12)."""
        evidence = evidence_of(x)
        features, predicted = inspector.features(evidence.activations), evidence.logits.argmax(1)
        decisions = [
            (features * weight[predicted]).sum(1) + bias[predicted]
            for weight, bias in zip(weights, biases, strict=True)
        ]
        return torch.cat([torch.stack(decisions, 1), clues(evidence)], 1)

    tried = len(inverse_penalties)
    clean = _gathered(observed, examples.clean.images, device, seed).split([tried, len(CLUES) - 1], 1)
    attacks = [
        (*_gathered(observed, watched.images, device, seed).split([tried, len(CLUES) - 1], 1), watched.corrected)
        for watched in examples.attacks.values()
    ]
    areas = [
        sum(ResistanceCurve.sweep(clean[0][:, i], each[:, i], right).area for each, _, right in attacks) / len(attacks)
        for i in range(tried if attacks else 0)
    ]
    best = max(range(len(areas)), key=areas.__getitem__, default=0)
    inspector.weight.data.copy_(fitted.weights[best])
    inspector.bias.data.copy_(fitted.biases[best])
    if inspector.fusion is not None:
        beside = [(torch.cat([each[:, best, None], rest], 1), right) for each, rest, right in attacks]
        fit_fusion(inspector.fusion, torch.cat([clean[0][:, best, None], clean[1]], 1), beside)
    report = InspectorReport(
        fitted.negatives,
        fitted.positives,
        fitted.shared,
        fitted.seconds,
        inverse_penalties[best],
        {f"{penalty:g}": area for penalty, area in zip(inverse_penalties, areas, strict=bool(attacks))},
    )
    return inspector, report


@torch.no_grad()
def _gathered(function: Callable[[Tensor], Tensor], images: Tensor, device: torch.device, seed: int) -> Tensor:
    """Apply a function to images, uint8 or float in [0, 1], in batches; gather the results on the CPU.

    Whatever noise it draws is drawn from ``seed``, so that it does not matter what was done before.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        return torch.cat([function(to_float(batch.to(device))).cpu() for batch in images.split(128)])
