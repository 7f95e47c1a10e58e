"""What in a fit deserves a second look."""

from typing import Any

FEW_EXAMPLES = 100
"""Below so many examples that fool the classifier, what is said of an attack is loose."""


def findings(report: dict[str, Any]) -> list[str]:
    """Return a sentence for each thing in a fit's report that whoever fitted it should know; often none."""
    return [*_of_the_regulator(report), *_of_the_rate(report), *_of_the_inspector(report), *_of_the_attacks(report)]


def _of_the_regulator(report: dict[str, Any]) -> list[str]:
    told = []
    selection, allowed = report["selection"], report["plan"]["accuracy_loss"]
    if not selection["within"]:
        lost = selection["undefended_accuracy"] - selection["chosen"]["accuracy"]
        told.append(
            f"The Regulator costs {100 * lost:.1f} points of accuracy on the validation images, more than the "
            f"{100 * allowed:g} allowed: nothing that was tried keeps within, and the one that costs least was taken."
        )
    for stage, curve in report["regulator"]["curves"].items():
        if any(loss is None for _, loss in curve):
            told.append(f"The training loss of the {stage} was not finite at times: lower the learning rate.")
    return told


def _of_the_rate(report: dict[str, Any]) -> list[str]:
    realised, promised = report["clean"]["false_positive_rate"], report["guarantee"]["interval"]
    if promised is None or realised <= promised[1]:
        return []
    return [
        f"On the test images {100 * realised:.2f} % are alerted, more than in 97.5 % of all calibrations if the "
        "calibration images are like the test images: perhaps they are not."
    ]


def _of_the_inspector(report: dict[str, Any]) -> list[str]:
    classes = report["inspector"]["classes"]
    shared = sum(each["shared"] for each in classes)
    if not shared:
        return []
    return [
        f"{shared} of {len(classes)} classes had too few examples of either kind and take the regression that is "
        "fitted on all classes together: craft more examples."
    ]


def _of_the_attacks(report: dict[str, Any]) -> list[str]:
    told = []
    for attack in report["attacks"]:
        crafted = next(row for row in attack["rows"] if row["form"] == "as crafted")
        if crafted["resisted"] is None:
            told.append(f"No example of {attack['name']} fools the classifier, so nothing was measured of it.")
            continue
        if crafted["fooling"] < FEW_EXAMPLES:
            low, high = crafted["resisted_interval"]
            told.append(
                f"Only {crafted['fooling']} examples of {attack['name']} fool the classifier: the 95 % interval of "
                f"what is resisted is {100 * (high - low):.0f} points wide."
            )
        if crafted["resisted"] < 0.5:
            told.append(f"Less than half of what {attack['name']} makes is resisted.")
    return told
