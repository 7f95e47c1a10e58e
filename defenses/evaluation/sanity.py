"""Whether the attacks of an evaluation can be believed (after Carlini et al. 2019, On Evaluating Robustness).

A defense that an attack does not break may be strong, or the attack weak. Each check looks for one sign of the latter,
and names the rows that it makes untrusted.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise

from defenses.evaluation.crafting import ANOTHER_IMAGE, NOISES
from defenses.evaluation.rows import AttackResult, Check, SweepResult

LEAST_BROKEN = 0.5
"""The share of bare answers that an attack must turn."""

LEAST_TURNED = 0.5
"""How many answers of a defense an attack must turn for each bare one, whether alerted or not."""

UNBOUNDED = 0.95
"""The share that an attack without a bound must win; verdicts that fall otherwise under other noise are the rest."""

MOST_GAINED = 0.1
"""How much more an attack may win with twice the effort."""

MOST_LEFT = 0.05
"""The robust accuracy that may be left at the end of a sweep of the budget."""

SLACK = 0.05
"""By how much one attack may be below another, or a sweep rise, without meaning anything."""

BEST = "the best white box is not weaker than the best black box"
"""What a check is called, whether or not there was anything to compare."""


def won(row: AttackResult) -> float:
    """Return the share of the attempts that are answered wrongly and not alerted."""
    return 0.0 if row.resisted_of_attempts is None else 1 - row.resisted_of_attempts


def turned(row: AttackResult) -> float:
    """Return the share of the attempts that are answered wrongly, alerted or not; in A of those that fool alone."""
    if row.corrected is None:
        return 0.0
    counted = row.fooling / row.attempted if row.scenario == "A" else 1.0
    return (1 - row.corrected.mean) * counted


def breaks_the_undefended(broken: Mapping[str, float]) -> Iterator[Check]:
    """Check that each attack breaks a classifier without a defense; ``broken`` is the share that it turns, by name."""
    for name, share in broken.items():
        yield Check(
            "breaks the undefended classifier",
            share >= LEAST_BROKEN,
            f"{name} turns {_percent(share)} of the bare answers; at least {_percent(LEAST_BROKEN)} are expected.",
            None,
            "A",
            (name,),
        )


def repeats(same: Mapping[str, bool]) -> Iterator[Check]:
    """Check that each attack gives the same examples from the same seed, to the bit."""
    for name, equal in same.items():
        told = "the same examples" if equal else "other examples"
        yield Check("repeats from its seed", equal, f"{name} gives {told} a second time.", None, "A", (name,))


def wins_without_bound(unbounded: Iterable[AttackResult]) -> Iterator[Check]:
    """Check that another class's image is taken for that class on each defense: nothing resists that."""
    for row in unbounded:
        yield Check(
            "an attack without bound wins",
            won(row) >= UNBOUNDED,
            f"{ANOTHER_IMAGE} wins {_percent(won(row))} of {row.attempted} attempts on {row.defense}; at least "
            f"{_percent(UNBOUNDED)} are expected.",
            row.defense,
            "B",
            (row.attack,),
        )


def gains_little(effort: str, defense: str, attack: str, before: float, after: float, attempted: int) -> Check:
    """Check that twice as much of an ``effort`` wins hardly more, each rate over the same attempts."""
    doubled = "noises for each gradient" if effort == NOISES else effort
    return Check(
        "more effort wins no more",
        after - before <= MOST_GAINED,
        f"{attack} wins {_percent(before)} on {defense}, and {_percent(after)} with twice the {doubled} ({attempted} "
        f"attempts); at most {_percent(MOST_GAINED)} more are expected.",
        defense,
        "B",
        (attack,),
    )


def white_box_is_best(rows: Sequence[AttackResult]) -> Iterator[Check]:
    """Check that where white and black boxes have the same norm and budget, the best white box wins as much.

    Attacks that look for the least distance have no budget, and are compared by how often they win. What stands beside
    nothing of the other kind is told, for each defense, by a check that was not made.
    """
    alone: dict[str, list[AttackResult]] = {}
    for (defense, norm, epsilon), group in _by_budget(rows).items():
        white = [row for row in group if row.sees == "gradients"]
        black = [row for row in group if row.sees != "gradients"]
        if norm == "none" or not (white and black):
            alone.setdefault(defense, []).extend(group)
            continue
        best, rival = max(white, key=won), max(black, key=won)
        budget = "without a budget" if epsilon is None else f"{epsilon:.4g}"
        yield Check(
            BEST,
            won(best) >= won(rival) - SLACK,
            f"On {defense}, {norm} {budget}: {best.attack} wins {_percent(won(best))}, {rival.attack} "
            f"{_percent(won(rival))}.",
            defense,
            "B",
            tuple(row.attack for row in white),
        )
    for defense, group in alone.items():
        yield Check(BEST, None, _without_partner(defense, group), defense, "B", tuple(row.attack for row in group))


def _by_budget(rows: Sequence[AttackResult]) -> dict[tuple[str, str, float | None], list[AttackResult]]:
    """Return the rows of scenario B by defense, norm and budget, None where an attack has none."""
    budgets: dict[tuple[str, str, float | None], list[AttackResult]] = {}
    for row in rows:
        if row.scenario == "B" and row.form == "as crafted" and row.attack != ANOTHER_IMAGE:
            budgets.setdefault((row.defense, row.norm, row.parameters.get("epsilon")), []).append(row)
    return budgets


def _without_partner(defense: str, rows: Sequence[AttackResult]) -> str:
    white = [row.attack for row in rows if row.sees == "gradients"]
    black = [row.attack for row in rows if row.sees != "gradients"]
    missing = [
        f"no {other} box of the same norm and budget was run beside {', '.join(names)}"
        for other, names in (("black", white), ("white", black))
        if names
    ]
    return f"Not compared: on {defense} {', and '.join(missing)}."


def transfer_is_weaker(rows: Sequence[AttackResult]) -> Iterator[Check]:
    """Check that an attack that sees all of a defense wins as much as the same on a substitute, else it is misled.

    Gradients that say less than a substitute's are masked (Athalye et al. 2018, section 3.1).
    """
    placed = {(row.defense, row.attack, row.scenario): row for row in rows if row.form == "as crafted"}
    for (defense, attack, scenario), row in placed.items():
        transferred = placed.get((defense, attack, "transfer"))
        if scenario != "B" or transferred is None:
            continue
        yield Check(
            "transfer wins no more than the white box",
            won(transferred) <= won(row) + SLACK,
            f"{attack} wins {_percent(won(row))} on {defense}, and {_percent(won(transferred))} where it is crafted on "
            f"a substitute; at most {_percent(SLACK)} more are expected.",
            defense,
            "B",
            (attack,),
        )


def knowledge_helps(rows: Sequence[AttackResult]) -> Iterator[Check]:
    """Check that an attack on a defense wins and turns no less than the same on the bare classifier.

    Gradients may be masked. Against a detector that alerts of nearly everything both win little, and what is turned,
    alerted or not, tells them apart.
    """
    crafted = {(row.defense, row.attack, row.scenario): row for row in rows if row.form == "as crafted"}
    for (defense, attack, scenario), row in crafted.items():
        blind = crafted.get((defense, attack, "A"))
        if scenario != "B" or blind is None:
            continue
        yield Check(
            "knowing the defense helps the attacker",
            won(row) >= won(blind) - SLACK and turned(row) >= turned(blind) - SLACK,
            f"{attack} wins {_percent(won(row))} of the attempts and turns {_percent(turned(row))} when crafted on "
            f"{defense}, and {_percent(won(blind))} and {_percent(turned(blind))} when crafted on the classifier.",
            defense,
            "B",
            (attack,),
        )


def turns_the_defense(rows: Sequence[AttackResult], broken: Mapping[str, float]) -> Iterator[Check]:
    """Check that an attack that follows gradients through a defense turns half as many answers as without one.

    Alerted or not: a detector does not stop a gradient. ``broken`` is the share of bare answers that each turns, by
    name, and those that are not in it are left out.
    """
    for row in rows:
        if row.scenario != "B" or row.form != "as crafted" or row.sees != "gradients" or row.attack not in broken:
            continue
        least = max(0.0, LEAST_TURNED * broken[row.attack] - SLACK)
        yield Check(
            "turns answers of the defense",
            turned(row) >= least,
            f"{row.attack} turns {_percent(turned(row))} of the answers of {row.defense}, alerted or not, and "
            f"{_percent(broken[row.attack])} of the bare ones; at least {_percent(least)} are expected.",
            row.defense,
            "B",
            (row.attack,),
        )


def budget_breaks_all(sweeps: Iterable[SweepResult]) -> Iterator[Check]:
    """Check that robust accuracy falls with the budget, and to nothing in the end."""
    for sweep in sweeps:
        if sweep.parameter != "epsilon" or sweep.scenario != "B" or not sweep.robust_accuracy:
            continue
        rises = max((after - before for before, after in pairwise(sweep.robust_accuracy)), default=0.0)
        last = sweep.robust_accuracy[-1]
        yield Check(
            "a growing budget breaks the defense",
            last <= MOST_LEFT and rises <= SLACK,
            f"{sweep.sweep} on {sweep.defense} leaves {_percent(last)} at its largest budget, {sweep.values[-1]:.4g}, "
            f"and rises by {_percent(max(rises, 0.0))} at most on the way; at most {_percent(MOST_LEFT)} and "
            f"{_percent(SLACK)} are expected.",
            sweep.defense,
            "B",
            sweep.attacks,
        )


def untrusted_by(checks: Iterable[Check], row: AttackResult) -> tuple[str, ...]:
    """Return the names of the failed checks that a row is told of by."""
    return _names(check for check in checks if check.passed is False and _looks_at(check, row))


def checked_by(checks: Iterable[Check], row: AttackResult) -> tuple[str, ...]:
    """Return the names of the checks that looked at a row, whether it passed or failed them."""
    return _names(check for check in checks if check.passed is not None and _looks_at(check, row))


def _looks_at(check: Check, row: AttackResult) -> bool:
    if row.attack not in check.attacks:
        return False
    return check.defense is None or (check.defense, check.scenario) == (row.defense, row.scenario)


def _names(checks: Iterable[Check]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(check.name for check in checks))


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
