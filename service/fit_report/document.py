"""The facts and figures of a fit, as JSON holds them: no NaN, no infinity."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import torch
from torch import Tensor

from defenses.attacks import AdversarialExamples
from defenses.coophance import Fitted, Inspector, Regulator
from defenses.evaluation.curves import ResistanceCurve
from defenses.evaluation.rates import CleanRow
from model_store import Draft
from service.fit_report.findings import findings
from service.fit_report.guarantee import guarantee_of
from service.fit_report.samples import Look
from service.fit_report.stages import stage_times
from service.hardware import hardware

FORMAT = 1
"""The number of this report's form; a form that programs would misread gets the next."""

BINS = 48
"""Bars of a histogram of scores; the first and the last hold whatever lies beyond."""


class DraftIncomplete(ValueError):
    """What is recorded about a defense lacks what a report of its fit tells; `missing` names it."""

    def __init__(self, missing: Sequence[str]) -> None:
        self.missing = tuple(missing)
        super().__init__(f"Expected the draft of a fitted defense, got one without {', '.join(missing)}.")


def checked_seed(draft: Draft) -> int:
    """Return the seed of a draft that a report can be written from; raises ``DraftIncomplete`` for another."""
    needed = {
        "parent": draft.parent,
        "data": draft.data,
        "false_positive_rate": draft.false_positive_rate,
        "seed": draft.seed,
        "options.plan": draft.options.get("plan"),
    }
    if missing := [name for name, value in needed.items() if value is None]:
        raise DraftIncomplete(missing)
    assert draft.seed is not None
    return draft.seed


def describe(fitted: Fitted, looks: Sequence[Look], *, name: str, draft: Draft, device: torch.device) -> dict[str, Any]:
    """Return the report of a fit as JSON values; what is not finite becomes None.

    ``looks`` are those at ``fitted.test_examples``, in their order; ``draft`` is complete (see ``checked_seed``).
    """
    facts = draft.model_dump(mode="json")
    classifier = {**facts["parent"], "input": facts["input"], "labels": facts["labels"]}
    report = {
        "format": FORMAT,
        "name": name,
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "fit": facts["options"].get("fit"),
        "command": facts["command"],
        "seed": facts["seed"],
        "classifier": classifier,
        "data": facts["data"],
        "plan": facts["options"]["plan"],
        "summary": _summary(fitted),
        "clean": asdict(fitted.clean),
        "clean_alerts": _clean_alerts(fitted.clean),
        "threshold": fitted.protected.threshold.tolist(),
        "guarantee": asdict(
            guarantee_of(
                facts["false_positive_rate"]["budget"],
                calibrated_on=len(fitted.calibration_scores),
                measured_on=fitted.clean.images,
                per_class=fitted.protected.threshold.ndim > 0,
            )
        ),
        "attacks": _attacks(fitted, looks),
        "regulator": _regulator(fitted, facts),
        "selection": fitted.selection.as_json(),
        "inspector": _inspector(fitted, facts["labels"]),
        "stages": [asdict(stage) for stage in stage_times(fitted)],
        "libraries": facts["libraries"],
        "hardware": hardware(device),
    }
    plain: dict[str, Any] = _finite(report)
    return {**plain, "findings": findings(plain)}


def _summary(fitted: Fitted) -> dict[str, Any]:
    resisted = [row.resisted for row in fitted.attacks if row.form == "as crafted" and row.resisted is not None]
    return {
        "accuracy_lost": fitted.clean.undefended_accuracy - fitted.clean.accuracy,
        "attacks_measured": len(resisted),
        "attacks_resisted": sum(resisted) / len(resisted) if resisted else None,
        "seconds": sum(fitted.seconds.values()),
    }


def _clean_alerts(clean: CleanRow) -> dict[str, Any]:
    """Return how many clean images are alerted, how many of those are answered wrongly, and that share of all."""
    alerted = round(clean.false_positive_rate * clean.images)
    wrong = alerted - round((clean.accuracy - clean.accepted_accuracy) * clean.images)
    return {
        "images": alerted,
        "answered_wrongly": wrong,
        "wrong_rate": wrong / alerted if alerted else None,
        "wrong_rate_of_all": 1 - clean.accuracy,
    }


def _attacks(fitted: Fitted, looks: Sequence[Look]) -> list[dict[str, Any]]:
    edges = _edges([fitted.clean_scores, *(look.scores for look in looks)])
    fitted_on = {each.attack.name: each for each in fitted.examples}
    return [
        {
            "name": examples.attack.name,
            "parameters": dict(examples.attack.parameters),
            "fitted_on": _counts(fitted_on.get(examples.attack.name)),
            "rows": [asdict(row) for row in fitted.attacks if row.attack == examples.attack.name],
            "detector_curve": _detector_curve(fitted.clean_scores, look.scores),
            "histogram": {
                "edges": edges.tolist(),
                "clean": _histogram(fitted.clean_scores, edges),
                "corrected": _histogram(look.scores[look.corrected], edges),
                "left": _histogram(look.scores[~look.corrected], edges),
                "threshold": 0.0 if fitted.protected.threshold.ndim else float(fitted.protected.threshold),
            },
            "samples": [asdict(sample) for sample in look.samples],
        }
        for examples, look in zip(fitted.test_examples, looks, strict=True)
    ]


def _counts(examples: AdversarialExamples | None) -> dict[str, int] | None:
    return None if examples is None else {"images": len(examples.y), "fooling": int(examples.fooled.sum())}


def _detector_curve(clean_scores: Tensor, scores: Tensor) -> list[tuple[float, float]]:
    if not len(scores):
        return []
    return list(ResistanceCurve.sweep(clean_scores, scores, torch.zeros(len(scores), dtype=torch.bool)).thinned())


def _edges(scores: Sequence[Tensor]) -> Tensor:
    """Return the edges (B + 1,) of a histogram's bars, over all scores but the farthest half per cent at each end."""
    every = torch.cat(list(scores)).double().sort().values
    low, high = every[[int(0.005 * (len(every) - 1)), math.ceil(0.995 * (len(every) - 1))]].tolist()
    return torch.linspace(low, max(high, low + 1e-6), BINS + 1, dtype=torch.float64)


def _histogram(scores: Tensor, edges: Tensor) -> list[int]:
    # Of the edges only the inner ones matter: what lies beyond the outer ones goes into the last bars.
    bars = torch.searchsorted(edges[1:-1], scores.double(), right=True)
    counted: list[int] = torch.bincount(bars, minlength=BINS).tolist()
    return counted


def _regulator(fitted: Fitted, facts: dict[str, Any]) -> dict[str, Any]:
    regulator = fitted.protected.purifier
    assert isinstance(regulator, Regulator)
    depth = len(regulator.down)
    positions = [
        *(f"after down-sampling {index}" for index in range(1, depth + 1)),
        *(f"before up-sampling {index}" for index in range(1, depth + 1)),
    ]
    layers = [
        {
            "position": position,
            "channels": layer.mu.numel(),
            "mean_absolute_mu": float(layer.mu.abs().mean()),
            "mean_sigma": float(layer.sigma.mean()),
            "largest_sigma": float(layer.sigma.max()),
        }
        for position, layer in zip(positions, regulator.confusion_layers, strict=True)
    ]
    return {
        "version": facts["options"].get("regulator_version"),
        "reused": fitted.trained is None,
        "parameters": sum(parameter.numel() for parameter in regulator.parameters()),
        "config": regulator.config.as_json(),
        "training": _training(fitted, facts["data"]["counts"]["fit"]),
        "curves": fitted.trained.curves if fitted.trained else {},
        "stopping_points": sorted(fitted.trained.stopping_points) if fitted.trained else [],
        "confusion_layers": layers,
    }


def _training(fitted: Fitted, images: int) -> dict[str, Any] | None:
    plan = fitted.training
    return None if plan is None else {**asdict(plan), "epochs": plan.steps * plan.batch_size / images}


def _inspector(fitted: Fitted, labels: Sequence[str]) -> dict[str, Any]:
    inspector, report = fitted.protected.detector, fitted.inspector
    assert isinstance(inspector, Inspector)
    own = [c for c in range(len(labels)) if c not in report.shared]
    # One regression for each class of its own, in their order, and after them the one that the others share.
    seconds = {c: report.seconds[index] for index, c in enumerate(own)}
    return {
        **inspector.config.as_json(),
        "layer": fitted.layer.name,
        "features": inspector.config.features,
        "inverse_penalty": report.inverse_penalty,
        "areas": [{"inverse_penalty": float(tried), "area": area} for tried, area in report.areas.items()],
        "classes": [
            {
                "label": label,
                "negatives": report.negatives[c],
                "positives": report.positives[c],
                "shared": c in report.shared,
                "seconds": seconds.get(c, report.seconds[-1]),
            }
            for c, label in enumerate(labels)
        ],
    }


def _finite(value: Any) -> Any:
    """Return JSON values with tuples as lists, and None for every number that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return value
