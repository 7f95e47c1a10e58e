"""What NIP's defenses are worth beside their controls: `python -m loadtest.nip_table resnet20 --data ... --paper ...`.

Every row answers the same clean images and the same adversarial examples, crafted on the bare classifier, which are
kept in a folder and used again. A control is a defense with nothing but its direction replaced. That of a response is
settled anew, at the same distance and for the same loss; that of a correction stands behind the same alerts, once at
the same distance, once at the largest one that costs no more clean images than the correction does, and once at that
one of those which answers most of the attacked images rightly.
"""

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from defenses.attacks import AdversarialExamples, attack, craft_once
from defenses.baselines.smoothing import MedianSmoothing
from defenses.classifier import Classifier
from defenses.detector import NoDetector
from defenses.evaluation import Progress
from defenses.evaluation.rates import exact_interval
from defenses.nip import InverseCorrection, InversePerturbation, Pushing, Replaced, ResponseJudge, fit_response
from defenses.nip.oracle import oracle_answers
from defenses.nip.push import Push, ReplacedPush
from defenses.nip.response_defense import run_pushed
from defenses.pixels import to_float
from defenses.protected import ProtectedClassifier
from defenses.purifier import Purifier
from defenses.splits import LabelledImages, Splits
from defenses.stages import Stages
from model_store import Store, parse_reference
from service.cli.common import DataOption, StoreOption, read_dataset, settings_with
from service.defended import load_defended
from service.fit import find_classifier, splits_of
from service.hardware import hardware
from service.libraries import library_versions
from service.progress import progress_bars
from service.repository import MODELS
from service.served import GRAPH

ATTACKS = ("fgsm", "pgd-stop", "pgd:epsilon=8/255,steps=20", "deepfool", "cw")
CPU = torch.device("cpu")
BATCH = 64
SIZES = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
"""The distances that a correction's controls are tried at, over its own."""

TRIED = 200
"""Images of each attack by which the best distance of a control is chosen: in its favour, by what it is measured on."""

CLEAN = "clean"

Sets = dict[str, tuple[Tensor, Tensor, Tensor]]
"""By name: images, the clean ones that they were made of, and their classes."""

Answer = Callable[[Tensor, Tensor], Tensor]
"""From images and the clean ones that they were made of to the classes that are answered."""


@dataclass(frozen=True)
class Row:
    """One line of the table: what is answered, beside which line it is a control, and whether chance has a part."""

    name: str
    answer: Answer
    control_of: str | None = None
    drawn: bool = True


def main(
    name: Annotated[str, typer.Argument(help="The classifier, as NAME or NAME@VERSION.")],
    data: DataOption,
    output: Annotated[Path, typer.Option(help="Where the results are written, as JSON.")],
    paper: Annotated[str, typer.Option(help="The version with the printed method's pool.")],
    response: Annotated[str, typer.Option(help="The version that answers by response.")],
    inverse: Annotated[str | None, typer.Option(help="One that was fitted with --push inverse.")] = None,
    gated: Annotated[str | None, typer.Option(help="The version that corrects what is alerted.")] = None,
    work: Annotated[Path, typer.Option(help="Where adversarial examples are kept.")] = Path("var/nip_table"),
    attacks: Annotated[list[str] | None, typer.Option("--attack", help="Attack with this; repeat for several.")] = None,
    limit: Annotated[int, typer.Option(help="Test images per attack.")] = 1000,
    clean: Annotated[int, typer.Option(help="Clean test images.")] = 3000,
    seeds: Annotated[int, typer.Option(help="How often what chance has a part in is measured.")] = 3,
    store: StoreOption = None,
) -> None:
    """Measure every row and print the table."""
    models = Store.open(settings_with(store=store).store / MODELS)
    fetched = find_classifier(models, *parse_reference(name))
    classifier = Classifier.load(fetched.folder / GRAPH).eval()
    versions = {
        kind: load_defended(models, *parse_reference(reference))
        for kind, reference in (("paper", paper), ("response", response), ("inverse", inverse), ("gated", gated))
        if reference
    }
    defenses = {kind: protected for kind, (_, protected) in versions.items()}
    seeds_of_splits = {version.manifest.data.split_seed for version, _ in versions.values() if version.manifest.data}
    if len(seeds_of_splits) != 1:
        raise typer.BadParameter(f"Expected versions that were fitted on the same splits, got seeds {seeds_of_splits}.")
    loss = float(versions["response"][0].manifest.options["plan"]["accuracy_loss"])
    with progress_bars() as progress:
        dataset = read_dataset(data, fetched.manifest, seeds_of_splits.pop(), Path("var/data"), progress)
        splits = splits_of(dataset)
        kept = work / f"{fetched.digest[:12]}-{dataset.digest[:12]}-{limit}"
        crafted = [
            craft_once(
                attack(text),
                classifier,
                splits.test,
                "measured",
                limit=limit,
                stages=Stages(kept),
                device=CPU,
                seed=0,
                batch_size=BATCH,
                progress=progress,
            )
            for text in attacks or ATTACKS
        ]
        chosen = torch.randperm(len(splits.test.images), generator=torch.Generator().manual_seed(0))[:clean]
        sets = _sets(LabelledImages(splits.test.images[chosen], splits.test.targets[chosen]), crafted)
        rows = _rows(classifier, defenses, splits, sets, loss, progress)
        right = {}
        for place, row in enumerate(rows, 1):
            right[row.name] = {each: _right(row, *given, seeds) for each, given in sets.items()}
            progress("rows", place, len(rows))
    results = {
        "command": " ".join(["python -m loadtest.nip_table", *sys.argv[1:]]),
        "attacks": {each.attack.name: {"attempted": len(each.y), "l2": each.distortion} for each in crafted},
        "rows": _summary(rows, right),
        "hardware": hardware(CPU),
        "libraries": library_versions(),
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=1) + "\n")
    typer.echo(table(results["rows"]))


def table(rows: Mapping[str, Any]) -> str:
    """Return the results as Markdown: what is right of each set, and how far a control is below or above."""
    sets = list(next(iter(rows.values()))["right"])
    lines = [["", *sets], ["---"] * (1 + len(sets))]
    for name, row in rows.items():
        cells = []
        for each in sets:
            rate = f"{100 * row['right'][each]['rate']:.1f}"
            if row["below"]:
                difference = row["below"][each]
                low, high = (100 * end for end in difference["interval"])
                rate += f" ({100 * difference['mean']:+.1f}, {low:+.1f} to {high:+.1f})"
            cells.append(rate)
        lines.append([name, *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _rows(
    classifier: Classifier,
    defenses: Mapping[str, ProtectedClassifier],
    splits: Splits,
    sets: Sets,
    loss: float,
    progress: Progress,
) -> list[Row]:
    paper = defenses["paper"].purifier
    assert isinstance(paper, InversePerturbation)
    candidates = paper.pool.perturbations.float()
    rows = [
        Row("bare", lambda x, clean: classifier(x).argmax(1), drawn=False),
        _plain("median of 3x3", classifier, MedianSmoothing(3)),
        Row("as printed", _answers(defenses["paper"]), drawn=False),
        Row("as printed, random candidate", _controlled(defenses["paper"], "random"), "as printed"),
        Row("as printed, Gaussian", _controlled(defenses["paper"], "gaussian"), "as printed"),
        Row("as printed, oracle", _oracle(classifier, paper), drawn=False),
    ]
    served = "response (benign only)"
    rows.append(Row(served, _answers(defenses["response"]), drawn=False))
    pushing = defenses["response"].purifier
    assert isinstance(pushing, Pushing)
    rows.append(_plain("its blur alone", classifier, Pushing(pushing.config)))
    if "inverse" in defenses:
        rows.append(Row("response to the class' inverse", _answers(defenses["inverse"]), served, drawn=False))
    for told, replacing in (("a random candidate", candidates), ("Gaussian noise", None)):
        settled = _settled(classifier, pushing.push, replacing, pushing, splits, loss, progress)
        rows.append(Row(f"response to {told}", _answers(settled), served))
    if "gated" in defenses:
        rows += _gated_rows(defenses["gated"], candidates, splits, sets)
    return rows


def _gated_rows(gated: ProtectedClassifier, candidates: Tensor, splits: Splits, sets: Sets) -> list[Row]:
    name, corrector = "correction (behind alerts)", gated.corrector
    assert isinstance(corrector, InverseCorrection)
    regulator = ProtectedClassifier(gated.classifier, gated.purifier, NoDetector()).eval()
    uncorrected = ProtectedClassifier(
        gated.classifier, gated.purifier, gated.detector, float(gated.threshold), judge=gated.judge
    ).eval()
    rows = [
        Row("Regulator alone", _answers(regulator)),
        Row(name, _answers(gated)),
        Row("alerted: purified answer", _answers(uncorrected), name),
    ]
    images, targets = splits.calibration
    most = _lost(gated, images, targets)
    for told, replacing in (("random candidate", Replaced(candidates)), ("Gaussian", Replaced())):
        sized = {size: _replaced(gated, corrector, replacing, size) for size in SIZES}
        fitting = [size for size in SIZES if _lost(sized[size], images, targets) <= most] or [min(SIZES)]
        answered = {size: _attacked_right(sized[size], sets) for size in fitting}
        best = max(fitting, key=answered.__getitem__)
        rows.append(Row(f"alerted: {told}, same L2", _answers(sized[1.0]), name))
        rows.append(Row(f"alerted: {told}, {max(fitting):g} L2, same loss", _answers(sized[max(fitting)]), name))
        rows.append(Row(f"alerted: {told}, {best:g} L2, best within that loss", _answers(sized[best]), name))
    return rows


def _replaced(
    gated: ProtectedClassifier, corrector: InverseCorrection, replacing: Replaced, size: float
) -> ProtectedClassifier:
    config = replace(corrector.config, size=size * corrector.config.size)
    other = InverseCorrection(config, gated.classifier, corrector.head)
    other.replaced = replacing
    return ProtectedClassifier(
        gated.classifier, gated.purifier, gated.detector, float(gated.threshold), judge=gated.judge, corrector=other
    ).eval()


@torch.no_grad()
def _lost(protected: ProtectedClassifier, images: Tensor, targets: Tensor) -> int:
    """Return how many clean images are answered wrongly that the bare classifier gets right, less the reverse."""
    torch.manual_seed(0)
    lost = 0
    for batch, y in zip(images.split(BATCH), targets.split(BATCH), strict=True):
        output = protected(to_float(batch))
        lost += int((output.undefended_logits.argmax(1) == y).sum() - (output.logits.argmax(1) == y).sum())
    return lost


def _attacked_right(protected: ProtectedClassifier, sets: Sets) -> float:
    """Return the mean share, over the attacks, of the first images that are answered with their class."""
    row, shares = Row("", _answers(protected)), []
    for name, (images, clean, targets) in sets.items():
        if name != CLEAN:
            shares.append(float(_right(row, images[:TRIED], clean[:TRIED], targets[:TRIED], 1).float().mean()))
    return sum(shares) / len(shares)


def _settled(
    classifier: Classifier,
    push: Push,
    candidates: Tensor | None,
    pushing: Pushing,
    splits: Splits,
    loss: float,
    progress: Progress,
) -> ProtectedClassifier:
    """Return a defense by response to another direction, at the same distance and for the same loss."""
    other, judge = Pushing(pushing.config), ResponseJudge(classifier.classes)
    other.push = ReplacedPush(push, candidates)
    torch.manual_seed(0)
    seen = [
        run_pushed(classifier, other, part, BATCH, CPU, progress, name)
        for name, part in (("validation", splits.validation), ("calibration", splits.calibration))
    ]
    fit_response(judge, seen[0], seen[1], loss)
    return ProtectedClassifier(classifier, other, NoDetector(), judge=judge).eval()


def _plain(name: str, classifier: Classifier, purifier: Purifier) -> Row:
    return Row(name, _answers(ProtectedClassifier(classifier, purifier, NoDetector()).eval()), drawn=False)


def _answers(protected: ProtectedClassifier) -> Answer:
    return lambda x, clean: protected(x).logits.argmax(1)


def _controlled(protected: ProtectedClassifier, control: Any) -> Answer:
    purifier = protected.purifier
    assert isinstance(purifier, InversePerturbation)

    def answer(x: Tensor, clean: Tensor) -> Tensor:
        purifier.control = control
        try:
            return protected(x).logits.argmax(1)
        finally:
            purifier.control = None

    return answer


def _oracle(classifier: Classifier, purifier: InversePerturbation) -> Answer:
    config = purifier.config

    def answer(x: Tensor, clean: Tensor) -> Tensor:
        answers = oracle_answers(
            classifier,
            purifier.head,
            config.layer,
            clean,
            x,
            k1=config.k1,
            k2=config.k2,
            amplitude=config.amplitude,
            batch_size=BATCH,
            device=CPU,
        )
        return answers.logits.argmax(1)

    return answer


def _sets(test: LabelledImages, crafted: list[AdversarialExamples]) -> Sets:
    """Return images, the clean ones that they were made of, and classes: clean, and what fools of each attack.

    Where rounding to 8 bits changes an attack's examples, what fools of those is a set of its own.
    """
    sets = {CLEAN: (test.images, test.images, test.targets)}
    for each in crafted:
        for form in ("as crafted", "rounded"):
            fooled, images = each.fooling(form)
            if form == "as crafted":
                sets[each.attack.name] = (images, each.x[fooled], each.y[fooled])
            elif len(images) and not torch.allclose(to_float(images), each.x_adv[fooled], atol=1e-6):
                sets[f"{each.attack.name}, rounded"] = (images, each.x[fooled], each.y[fooled])
    return sets


@torch.no_grad()
def _right(row: Row, images: Tensor, clean: Tensor, targets: Tensor, seeds: int) -> Tensor:
    """Return (seeds, N) which images are answered with their class; one seed where chance has no part."""
    runs = []
    for seed in range(seeds if row.drawn else 1):
        torch.manual_seed(seed)
        batches = zip(images.split(BATCH), clean.split(BATCH), targets.split(BATCH), strict=True)
        runs.append(torch.cat([row.answer(to_float(x), to_float(c)) == y for x, c, y in batches]))
    return torch.stack(runs)


def _summary(rows: list[Row], right: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Any]:
    """Return each row's rates with Clopper-Pearson intervals at 95 % (of one seed), and how far controls are below.

    The difference is taken image by image, over the seeds' means; its interval is that of a mean at 95 %.
    """
    summary: dict[str, Any] = {}
    for row in rows:
        rates = {
            each: {"images": hits.shape[1], "rate": float(hits.float().mean()), "interval": exact_interval(hits[0])}
            for each, hits in right[row.name].items()
        }
        below = {}
        if row.control_of:
            for each, hits in right[row.name].items():
                difference = right[row.control_of][each].float().mean(0) - hits.float().mean(0)
                mean, half = float(difference.mean()), 1.96 * float(difference.std()) / len(difference) ** 0.5
                below[each] = {"mean": mean, "interval": [mean - half, mean + half]}
        summary[row.name] = {"right": rates, "control_of": row.control_of, "below": below}
    return summary


if __name__ == "__main__":
    typer.run(main)
