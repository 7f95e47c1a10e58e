"""What each part of CoopHANCE is worth: one fit a variation, all measured on the same adversarial examples.

`python -m loadtest.ablations resnet20 --data ... --output results.json` fits and measures every variation that has not
been measured yet, so that it may be stopped and taken up again, and prints the tables of all that have been. Several
processes may share the work, each with variations of its own (`--only`), once the base has been measured.
"""

import json
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from defenses.attacks import AdversarialExamples, attack, craft
from defenses.classifier import Classifier
from defenses.coophance import FitPlan, fit_coophance
from defenses.evaluation import Progress
from defenses.evaluation.measurement import Measurement
from defenses.splits import Splits
from defenses.stages import Stages
from model_store import Store, parse_reference
from service.cli.common import DataOption, StoreOption, read_dataset, settings_with
from service.fit import find_classifier, splits_of
from service.hardware import hardware
from service.libraries import library_versions
from service.progress import progress_bars
from service.repository import MODELS
from service.served import GRAPH

MEASURED = ("fgsm", "pgd-stop", "deepfool", "cw")
"""The attacks of the paper's table 1 that every variation is measured on."""

CPU = torch.device("cpu")

Change = Callable[[FitPlan], FitPlan]


def _trained(**changes: Any) -> Change:
    return lambda plan: replace(plan, regulator=replace(plan.regulator, **changes))


def _inspected(**changes: Any) -> Change:
    return lambda plan: replace(plan, inspector=replace(plan.inspector, **changes))


def _fitted(**changes: Any) -> Change:
    return lambda plan: replace(plan, **changes)


def _both(first: Change, second: Change) -> Change:
    return lambda plan: second(first(plan))


PLAIN = "no fusion"
PUBLISHED = _inspected(fusion=False, surviving=False)
"""The published Inspector: the regressions' decision alone, fitted to all attacks."""

BASE = "no input noise at inference"
"""What all the others vary: the default but for this, so that one Regulator serves every noise at inference."""

TRAININGS: Mapping[str, Change] = {
    BASE: lambda plan: plan,
    "network gives the image": _trained(output="image"),
    "skips 16, 32, 64, 128": _trained(skip_channels=(16, 32, 64, 128)),
    "skips 0, 2, 4, 8": _trained(skip_channels=(0, 2, 4, 8)),
    "no batch norm": _trained(batch_norm=False),
    "width 8, 16, 32, 64": _trained(channels=(8, 16, 32, 64)),
    "depth 3": _trained(channels=(16, 32, 64), skip_channels=(4, 8, 16)),
    "training noise 10/255": _trained(training_noise=10 / 255),
    "training noise 25/255": _trained(training_noise=25 / 255),
    "no confusion": _trained(confusion="off"),
    "alpha 0.5": _trained(alpha=0.5),
    "alpha 4": _trained(alpha=4.0),
    "weights not averaged": _trained(averaging=0.0),
    "float32": _trained(precision="float32"),
}
"""Variations that train a Regulator of their own."""

ONE_ATTACK = {name: f"fitted on {name}" for name in MEASURED}
"""The variations that are fitted on one attack, by the attack."""

NOISY = _trained(inference_noise=15 / 255)

REUSES: Mapping[str, Change] = {
    "input noise 5/255 at inference": _trained(inference_noise=5 / 255),
    "input noise 15/255 at inference, the default": NOISY,
    "input noise 20/255 at inference": _trained(inference_noise=20 / 255),
    "input noise 25/255 at inference": _trained(inference_noise=25 / 255),
    "no batch norm, input noise 15/255 at inference": _both(TRAININGS["no batch norm"], NOISY),
    "skips 16, 32, 64, 128, input noise 15/255 at inference": _both(TRAININGS["skips 16, 32, 64, 128"], NOISY),
    "confusion in training only": _trained(confusion="training"),
    "full strength": _fitted(strength=1.0),
    "accuracy loss 2 %": _fitted(accuracy_loss=0.02),
    "accuracy loss 6 %": _fitted(accuracy_loss=0.06),
    "purified taps": _inspected(inspects="purified"),
    "layer: stem": _inspected(layer="relu"),
    "layer: stage 1": _inspected(layer="layer1"),
    "layer: stage 3": _inspected(layer="layer3"),
    "pooled to 2,048 features": _inspected(most_features=2048),
    "C = 10, as published": _inspected(inverse_penalty=10.0),
    "fitted to all attacks, not to those left": _inspected(surviving=False),
    "no fusion": _inspected(fusion=False),
    "no fusion, fitted to all attacks": PUBLISHED,
    "no fusion, purified taps": _inspected(fusion=False, inspects="purified"),
    "a threshold for each class": _inspected(thresholds="class"),
    **{text: _fitted(attacks=(name,)) for name, text in ONE_ATTACK.items()},
    **{f"{text}, {PLAIN}": _both(PUBLISHED, _fitted(attacks=(name,))) for name, text in ONE_ATTACK.items()},
    "fitted on all four": _fitted(attacks=MEASURED),
    "fitted on fgsm, pgd-stop and pgd": _fitted(attacks=("fgsm", "pgd-stop", "pgd")),
    "fitted on those, deepfool and cw": _fitted(attacks=("fgsm", "pgd-stop", "pgd", "deepfool", "cw")),
}
"""Variations that use again what was trained for the base, or for the training that their name begins with."""

VARIATIONS: Mapping[str, Change] = {**TRAININGS, **REUSES}

CRAFTED = ("*examples, *.safetensors",)
TRAINED = ("handover*", "sample model*", "statistics*", "regulator, step*")
CHOSEN = "selection*"
"""The stages of a fit, as files: those that no Regulator has a part in, its training, its stopping point."""


def main(
    name: Annotated[str, typer.Argument(help="The classifier, as NAME or NAME@VERSION.")],
    data: DataOption,
    output: Annotated[Path, typer.Option(help="Where the results are gathered, as JSON.")],
    work: Annotated[Path, typer.Option(help="Where examples, Regulators and rows are kept.")] = Path("var/ablations"),
    epochs: Annotated[float, typer.Option(help="How long each Regulator is trained.")] = 5,
    examples: Annotated[int, typer.Option(help="Images per attack to fit on.")] = 2000,
    limit: Annotated[int, typer.Option(help="Test images per attack.")] = 1000,
    only: Annotated[list[str] | None, typer.Option(help="Only this variation; repeat for several.")] = None,
    store: StoreOption = None,
) -> None:
    """Fit and measure what has not been measured yet."""
    unknown = set(only or ()) - VARIATIONS.keys()
    if unknown:
        raise typer.BadParameter(f"Expected variations of {', '.join(VARIATIONS)}; got {', '.join(sorted(unknown))}.")
    models = Store.open(settings_with(store=store).store / MODELS)
    fetched = find_classifier(models, *parse_reference(name))
    classifier = Classifier.load(fetched.folder / GRAPH).eval()
    plan = replace(base(epochs), examples=examples, test_examples=50)
    with progress_bars() as progress:
        splits = splits_of(read_dataset(data, fetched.manifest, 0, Path("var/data"), progress))
        measured = [_examples(each, classifier, splits, limit, Stages(work / "measured")) for each in MEASURED]
        for variation, change in VARIATIONS.items():
            row = work / "rows" / f"{_slug(variation)}.json"
            if row.exists() or (only and variation not in only):
                continue
            folder, changed = work / "fits" / _slug(variation), change(plan)
            if variation in REUSES:
                training = trained_for(variation)
                trained, trained_plan = work / "fits" / _slug(training), TRAININGS[training](plan)
                if not list(trained.glob(CHOSEN)):
                    _link(work / "crafted", trained, CRAFTED)
                    fit_coophance(
                        classifier, splits, trained_plan, stages=Stages(trained), device=CPU, progress=progress
                    )
                _link(trained, folder, TRAINED)
                if replace(changed, inspector=plan.inspector) == trained_plan:
                    _link(trained, folder, [CHOSEN])
            _link(work / "crafted", folder, CRAFTED)
            start = time.perf_counter()
            result = _measure(classifier, splits, changed, Stages(folder), measured, progress)
            _link(folder, work / "crafted", CRAFTED)
            row.parent.mkdir(exist_ok=True)
            row.write_text(json.dumps({"minutes": (time.perf_counter() - start) / 60, **result}))
    rows = {each: work / "rows" / f"{_slug(each)}.json" for each in VARIATIONS}
    variations = {each: json.loads(path.read_text()) for each, path in rows.items() if path.exists()}
    results = {
        "command": " ".join(["python -m loadtest.ablations", *sys.argv[1:]]),
        "plan": asdict(plan),
        "hardware": hardware(CPU),
        "libraries": library_versions(),
        "variations": variations,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=1) + "\n")
    typer.echo(f"{table(variations)}\n\n{generalisation(variations)}")


def base(epochs: float) -> FitPlan:
    """Return the plan that every variation changes."""
    return _trained(epochs=epochs, inference_noise=0.0)(FitPlan())


def table(variations: Mapping[str, Any]) -> str:
    """Return the results as a Markdown table: accuracy, false positives, and what is resisted of each attack."""
    head = ["variation", "accuracy lost", "false positives", *MEASURED, "mean", "mean AUC"]
    lines = [head, ["---"] * len(head)]
    for name, each in variations.items():
        clean, attacks = each["clean"], each["attacks"]
        lost = clean["undefended_accuracy"] - clean["accuracy"]
        resisted = [attacks[attacked]["resisted"] for attacked in MEASURED]
        area = sum(attacks[attacked]["auc"] for attacked in MEASURED) / len(MEASURED)
        rates = [lost, clean["false_positive_rate"], *resisted, sum(resisted) / len(resisted), area]
        lines.append([name, *(f"{100 * rate:.1f}" for rate in rates)])
    return _markdown(lines)


def generalisation(variations: Mapping[str, Any]) -> str:
    """Return what is resisted by a defense fitted on one attack, as a Markdown table; the test attacks are columns."""
    lines = [["fitted on", *MEASURED], ["---"] * (1 + len(MEASURED))]
    for text in ONE_ATTACK.values():
        for name in (text, f"{text}, {PLAIN}"):
            if name in variations:
                attacks = variations[name]["attacks"]
                rates = [f"{100 * attacks[attacked]['resisted']:.1f}" for attacked in MEASURED]
                lines.append([name.removeprefix("fitted on "), *rates])
    return _markdown(lines)


def trained_for(variation: str) -> str:
    """Return the training whose Regulator a variation uses again."""
    return next((name for name in TRAININGS if variation.startswith(f"{name}, ")), BASE)


def _measure(
    classifier: Classifier,
    splits: Splits,
    plan: FitPlan,
    stages: Stages,
    examples: Sequence[AdversarialExamples],
    progress: Progress,
) -> dict[str, Any]:
    fitted = fit_coophance(classifier, splits, plan, stages=stages, device=CPU, progress=progress)
    scenario = Measurement(fitted.protected, CPU, plan.seed)
    rows = [scenario.attacked(each, fitted.clean_scores)[0] for each in examples]
    return {
        "clean": asdict(fitted.clean),
        "attacks": {row.attack: {**asdict(row), "curve": None} for row in rows},
        "selection": asdict(fitted.selection.chosen),
        "inspector": asdict(fitted.inspector),
        "seconds": dict(fitted.seconds),
    }


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _examples(name: str, classifier: Classifier, splits: Splits, limit: int, stages: Stages) -> AdversarialExamples:
    """Return an attack's examples on test images, made once."""
    stage = f"{name}, {limit}"
    if (kept := stages.load(stage)) is not None:
        return AdversarialExamples(attack(name), **kept.tensors)
    examples = craft(
        attack(name), classifier, *splits.test, limit=limit, device=CPU, seed=1, progress=lambda done, total: None
    )
    stages.save(stage, {field.name: getattr(examples, field.name) for field in fields(examples)[1:]})
    return examples


def _link(source: Path, target: Path, patterns: Sequence[str]) -> None:
    """Let a fit find what another has kept as if it were its own; a kept file is never written to again."""
    target.mkdir(parents=True, exist_ok=True)
    for path in (each for pattern in patterns for each in source.glob(pattern)):
        with suppress(FileExistsError):
            os.link(path, target / path.name)


def _slug(variation: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", variation.lower()).strip("-")


if __name__ == "__main__":
    typer.run(main)
