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

UNBOUNDED = 0.95
"""The share that an attack without a bound must win; verdicts that fall otherwise under other noise are the rest."""

MOST_GAINED = 0.1
"""How much more an attack may win with twice the effort."""

MOST_LEFT = 0.05
"""The robust accuracy that may be left at the end of a sweep of the budget."""

SLACK = 0.05
"""By how much the best white box may be below the best black box, or a sweep rise, without meaning anything."""


def won(row: AttackResult) -> float:
    """Return the share of the attempts that are answered wrongly and not alerted."""
    return 0.0 if row.resisted_of_attempts is None else 1 - row.resisted_of_attempts


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
    """Check that where white and black boxes have the same norm and budget, the best white box wins as much."""
    budgets: dict[tuple[str, str, float], list[AttackResult]] = {}
    for row in rows:
        if row.scenario == "B" and row.form == "as crafted" and "epsilon" in row.parameters:
            budgets.setdefault((row.defense, row.norm, row.parameters["epsilon"]), []).append(row)
    for (defense, norm, epsilon), group in budgets.items():
        white = [row for row in group if row.sees == "gradients"]
        black = [row for row in group if row.sees != "gradients"]
        if not (white and black):
            continue
        best, rival = max(white, key=won), max(black, key=won)
        yield Check(
            "the best white box is not weaker than the best black box",
            won(best) >= won(rival) - SLACK,
            f"On {defense}, {norm} {epsilon:.4g}: {best.attack} wins {_percent(won(best))}, {rival.attack} "
            f"{_percent(won(rival))}.",
            defense,
            "B",
            tuple(row.attack for row in white),
        )


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
    """Check that an attack on a defense wins no less than the same on the bare classifier: gradients may be masked."""
    crafted = {(row.defense, row.attack, row.scenario): row for row in rows if row.form == "as crafted"}
    for (defense, attack, scenario), row in crafted.items():
        blind = crafted.get((defense, attack, "A"))
        if scenario != "B" or blind is None:
            continue
        yield Check(
            "knowing the defense helps the attacker",
            won(row) >= won(blind) - SLACK,
            f"{attack} wins {_percent(won(row))} of the attempts when crafted on {defense}, and {_percent(won(blind))} "
            "when crafted on the classifier.",
            defense,
            "B",
            (attack,),
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
    return tuple(
        dict.fromkeys(
            check.name
            for check in checks
            if not check.passed
            and row.attack in check.attacks
            and (check.defense is None or (check.defense == row.defense and check.scenario == row.scenario))
        )
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
