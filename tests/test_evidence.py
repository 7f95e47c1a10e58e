"""Every figure in the tables of docs/evidence.md is one of the report that is linked beside it."""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SIX = ("fgsm", "pgd-stop", "deepfool", "cw", "jsma", "autoattack")
AT_ONCE = ("joint:steps=50", "orthogonal-pgd:steps=50", "selective-pgd:steps=50")

Row = dict[str, Any]


@cache
def report(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "docs" / "results" / f"evidence-{name}.json").read_text())


def table(heading: str) -> list[list[str]]:
    """Return the first table under a heading: its cells behind the first column, row by row, but for its header."""
    text = (ROOT / "docs" / "evidence.md").read_text().split(f"# {heading}\n")[1]
    lines = re.search(r"(?:^\|.*\n)+", text, re.MULTILINE)[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")[1:]] for line in lines]


def rows(name: str, defense: str, form: str = "as crafted") -> dict[str, Row]:
    """Return what a report has of one defense, by attack."""
    found = [row for row in report(name)["rows"] if (row["defense"], row["form"]) == (defense, form)]
    assert len({row["attack"] for row in found}) == len(found) > 0
    return {row["attack"]: row for row in found}


def swept(name: str, defense: str) -> list[Row]:
    """Return what a report of one sweep has of one defense, in the order of the values."""
    (sweep,) = (each for each in report(name)["sweeps"] if each["defense"] == defense)
    of = rows(name, defense)
    return [of[attack] for attack in sweep["attacks"]]


def defenses(name: str) -> list[str]:
    return [defense["name"] for defense in report(name)["defenses"]]


def percent(*shares: float) -> list[float]:
    return [100 * share for share in shares]


def told(cell: str, *values: float) -> None:
    """Hold that a cell has these numbers and no others, each as exact as it is written."""
    numbers = re.findall(r"\d[\d,]*(?:\.\d+)?", cell)
    assert len(numbers) == len(values), f"{cell!r} has other figures than {values}"
    for number, value in zip(numbers, values, strict=True):
        decimals = len(number.partition(".")[2])
        assert float(number.replace(",", "")) == pytest.approx(value, abs=0.5 / 10**decimals + 1e-6), cell


def marked(cell: str, row: Row) -> None:
    """Hold that a cell is marked where, and only where, its row is not to be trusted."""
    assert cell.endswith("!") == bool(row["untrusted"]), f"{cell!r}: {row['untrusted']}"


def with_right(cell: str, row: Row) -> None:
    """Hold that a cell tells what is resisted of all attempts and, if that is anything, what is answered rightly."""
    right = row["corrected"]["mean"]
    told(cell, *percent(row["resisted_of_attempts"], *([right] if "(" in cell else [])))
    assert "(" in cell or right < 0.005


def with_interval(cell: str, row: Row) -> None:
    told(cell, *percent(row["resisted"]["mean"], *row["resisted"]["interval"]))


def crafted_on_the_classifier(cells: list[str], name: str, defense: dict[str, Any]) -> dict[str, Row]:
    """Hold what cells tell of clean images, of six attacks and of their mean; return the defense's rows by attack."""
    clean, of = defense["clean"], rows(name, defense["name"])
    accuracy, accepted = clean["accuracy"]["mean"], clean["accepted_accuracy"]["mean"]
    told(cells[0], *percent(accuracy, *([accepted] if "(" in cells[0] else [])))
    assert "(" in cells[0] or accepted == accuracy
    false_positives = clean["false_positive_rate"]["mean"]
    told(cells[1], *percent(*([false_positives] if false_positives else [])))
    for cell, attack in zip(cells[2:8], SIX, strict=True):
        told(cell, *percent(of[attack]["resisted"]["mean"]))
        marked(cell, of[attack])
    told(cells[8], *percent(sum(of[attack]["resisted"]["mean"] for attack in SIX) / len(SIX)))
    return of


def test_crafted_on_the_classifier():
    measured = report("classifier-known")["defenses"]
    for cells, defense in zip(table("The attacker knows the classifier"), measured, strict=True):
        one_pixel = crafted_on_the_classifier(cells, "classifier-known", defense)["one-pixel"]
        told(cells[9], *percent(one_pixel["resisted"]["mean"]))
        marked(cells[9], one_pixel)


def test_three_fits_of_the_same():
    measured = table("Once more, and trained for as long as by default")
    for cells, name in zip(measured, ("classifier-known", "again", "default"), strict=True):
        assert len(cells) == 9
        (defense,) = (each for each in report(name)["defenses"] if each["kind"] == "coophance")
        crafted_on_the_classifier(cells, name, defense)


def test_beside_the_published_figures():
    published = report("classifier-known")["published"]
    measured = ("coophance", "feature-squeezing", "lid", "magnet")
    for cells, method in zip(table("Beside the published figures"), measured, strict=True):
        of = {row["attack"]: row["published_resisted"] for row in published if row["method"] == method}
        for cell, attack in zip(cells, SIX, strict=True):
            told(cell, *percent(of[attack]))


def test_a_growing_confidence():
    distances, right, alerted, resisted = table("Examples that are surer of themselves")
    for number, row in enumerate(swept("confidence", "resnet20@2")):
        told(distances[number], row["distortion_l2"])
        told(right[number], *percent(row["corrected"]["mean"]))
        told(alerted[number], *percent(row["alerted"]["mean"]))
        with_interval(resisted[number], row)


def test_a_growing_epsilon():
    distances, *shares = table("A growing budget")
    for cells, defense in zip(shares, defenses("epsilon"), strict=True):
        for distance, cell, row in zip(distances, cells, swept("epsilon", defense), strict=True):
            told(distance, row["distortion_l2"])
            told(cell, *percent(row["resisted_of_attempts"]))


def test_crafted_on_the_defense():
    asked = (
        *(("defense-known-1000", attack) for attack in ("fgsm", "pgd-stop:steps=20")),
        *(("defense-known", attack) for attack in ("pgd", "mi-fgsm")),
    )
    for cells, defense in zip(table("The attacker knows the defense"), defenses("defense-known"), strict=True):
        for cell, (name, attack) in zip(cells, asked, strict=True):
            row = rows(name, defense)[attack]
            with_right(cell, row)
            marked(cell, row)


def test_a_growing_budget_on_the_defense():
    text = (ROOT / "docs" / "evidence.md").read_text()
    assert text.count("# A growing budget\n") == 2, "the second is of scenario B"
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    first = next(number for number, line in enumerate(lines) if line.startswith("| resisted of all attempts (answered"))
    for line, defense in zip(lines[first + 1 : first + 4], defenses("budget"), strict=True):
        for cell, row in zip(line.strip("|").split("|")[1:], swept("budget", defense), strict=True):
            with_right(cell.strip(), row)
    joint, distances = (line.strip("|").split("|")[1:] for line in lines[first + 5 : first + 7])
    for cell, distance, row in zip(joint, distances, swept("budget-joint", "resnet20@2"), strict=True):
        told(cell, *percent(row["resisted_of_attempts"]))
        told(distance, row["distortion_l2"])


def by_attack(lines: list[list[str]], name: str, defense: str, attempts: int) -> None:
    """Hold what a table tells of one defense, an attack a line, each of so many attempts."""
    measured = [row for row in rows(name, defense).values() if row["attack"] != "other-image"]
    for cells, row in zip(lines, measured, strict=True):
        assert row["attempted"] == attempts
        with_interval(cells[0], row)
        marked(cells[0], row)
        told(cells[1], *percent(row["corrected"]["mean"]))
        told(cells[2], *percent(row["alerted"]["mean"]))
        told(cells[3], row["distortion_l2"])


def test_a_thousand_attempts_on_the_defense():
    by_attack(table("A thousand attempts each"), "default-defense-known", "resnet20@3", 1000)


def test_without_gradients():
    by_attack(table("Without gradients"), "black", "resnet20@2", 200)


def test_nip_end_to_end():
    (defense,) = defenses("nip")
    attacks = ("pgd", "cw:searches=3,steps=100", "autoattack-rand")
    as_crafted, rounded, distances = table("NIP as printed, end to end")
    for number, attack in enumerate(attacks):
        crafted = rows("nip", defense)[attack]
        with_interval(as_crafted[number], crafted)
        with_interval(rounded[number], rows("nip", defense, "rounded")[attack])
        told(distances[number], crafted["distortion_l2"])


def test_the_adaptive_attack():
    resisted, wrong, distances = table("The attacker knows the defense and its detector")
    for number, row in enumerate(swept("adaptive", "resnet20@2")):
        told(resisted[number], *percent(row["resisted_of_attempts"]))
        told(wrong[number], row["attempted"] * (1 - row["corrected"]["mean"]))
        told(distances[number], row["distortion_l2"])


def test_label_and_score_together():
    of = rows("detector-known", "resnet20@2")
    for cells, attack in zip(table("Label and score at once"), AT_ONCE, strict=True):
        row, count = of[attack], of[attack]["attempted"]
        told(cells[0], count * row["resisted"]["mean"], *percent(*row["resisted"]["interval"]))
        told(cells[1], count * row["alerted"]["mean"])
        told(cells[2], count * row["corrected"]["mean"])
        told(cells[3], row["distortion_l2"])


def test_adversarial_training():
    right, distances, published_weights = table("Another classifier: adversarial training")
    of = rows("adversarial", "resnet20-adversarial@1")
    bare = rows("defense-known", "resnet20@1") | rows("classifier-known", "resnet20@1")
    for number, attack in enumerate(("fgsm", "pgd", "mi-fgsm", "pgd-stop", "deepfool", "cw")):
        told(right[number], *percent(1 - of[attack]["fooling"] / of[attack]["attempted"]))
        marked(right[number], of[attack])
        told(distances[number], of[attack]["distortion_l2"])
        told(published_weights[number], bare[attack]["distortion_l2"])
