"""The servers' comparison as a whole: a short trial of every setting, then the best of each at length."""

from collections import Counter
from collections.abc import Mapping, Sequence
from time import perf_counter
from typing import Any

import numpy as np

from loadtest.contenders import Contender
from loadtest.racing import Told, race
from loadtest.ranking import best_settings, finalists, ratios

FINALISTS = 2
"""How many settings of a server are measured at length, at each concurrency, with PNGs and as many with raw pixels."""

OVERHEADS = {"LitServe": 4.5, "MLServer": 5.0, "BentoML": 8.0, "Ray Serve": 11.0}
"""Seconds to start, warm up and end a server on two idle cores, for the estimate that comes before any is measured."""

OWN_OVERHEAD = 4.0

Loads = Mapping[Contender, Sequence[int]]


def compete(
    contenders: Sequence[Contender],
    images: np.ndarray,
    own: Sequence[str],
    *,
    concurrencies: Sequence[int],
    trial_seconds: float,
    seconds: float,
    rounds: int,
    told: Told,
) -> dict[str, Any]:
    """Try every contender in one round of short loads, measure the ``finalists`` in full rounds, and compare them.

    Tells beforehand how long it will take, and again once it is known who is measured. ``own`` are the servers that are
    compared with the others. Returns ``best`` and ``ratios``, each of PNGs alone as ``PNG`` and of whatever body is
    best as ``any``; all that was measured, as ``trial`` and ``runs``; ``failures``; and the minutes expected at first
    and taken.
    """
    begun = perf_counter()
    loads: Loads = dict.fromkeys(contenders, concurrencies)
    expected = expected_seconds(loads, trial_seconds, 1) + most_seconds(loads, seconds, rounds)
    told(f"{len(contenders)} settings are tried, the best measured: {expected / 60:.0f} minutes at most on idle cores")
    trial = race(loads, images, seconds=trial_seconds, rounds=1, told=told, called="trial")
    best = finalists(trial["runs"], contenders, FINALISTS)
    left = expected_seconds(best, seconds, rounds, trial["overheads"])
    told(f"{len(best)} of {len(contenders)} settings are measured at length: about {left / 60:.0f} minutes more")
    raced = race(best, images, seconds=seconds, rounds=rounds, told=told)
    tables = {
        "PNG": best_settings(raced["runs"], rounds, "PNG"),
        "any": best_settings(raced["runs"], rounds, "any"),
    }
    return {
        "settings_tried": len(contenders),
        "settings_measured": len(best),
        "trial_seconds": trial_seconds,
        "seconds": seconds,
        "rounds": rounds,
        "minutes_expected": expected / 60,
        "minutes_taken": (perf_counter() - begun) / 60,
        "failures": trial["failures"] | raced["failures"],
        "best": tables,
        "ratios": {body: ratios(table, own) for body, table in tables.items()},
        "trial": trial["runs"],
        "runs": raced["runs"],
    }


def expected_seconds(loads: Loads, seconds: float, rounds: int, overheads: Mapping[str, float] | None = None) -> float:
    """Return how long a race takes; ``overheads`` are what was measured of starting each process, by its name."""
    known = overheads or {}
    starts = {
        contender.started: known.get(contender.started, OVERHEADS.get(contender.server, OWN_OVERHEAD))
        for contender in loads
    }
    return rounds * (seconds * sum(map(len, loads.values())) + sum(starts.values()))


def most_seconds(loads: Loads, seconds: float, rounds: int) -> float:
    """Return how long the finalists of such loads take at most: all in processes of their own, as far as there are."""
    runs: Counter[tuple[str, int, bool]] = Counter()
    processes: dict[str, set[str]] = {}
    for contender, concurrencies in loads.items():
        runs.update((contender.server, concurrency, contender.raw) for concurrency in concurrencies)
        processes.setdefault(contender.server, set()).add(contender.started)
    kept: Counter[str] = Counter()
    for (server, _, _), count in runs.items():
        kept[server] += min(FINALISTS, count)
    starts = sum(
        min(len(found), kept[server]) * OVERHEADS.get(server, OWN_OVERHEAD) for server, found in processes.items()
    )
    return rounds * (seconds * kept.total() + starts)
