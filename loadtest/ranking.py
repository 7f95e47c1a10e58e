"""Which setting of each server is best, and how the servers compare."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, Literal

from loadtest.contenders import Contender


def ranked(runs: Sequence[Mapping[str, Any]], rounds: int) -> list[dict[str, Any]]:
    """Return one row for each server, concurrency and setting, the highest median rate first.

    Only settings without an error count, that were measured in every round. Each row holds the medians over the rounds
    of the rate and the latencies, and the rates of the rounds.
    """
    groups: dict[tuple[str, int, str], list[Mapping[str, Any]]] = defaultdict(list)
    for run in runs:
        groups[run["server"], run["concurrency"], run["setting"]].append(run)
    table = [
        {
            "server": server,
            "concurrency": concurrency,
            "setting": setting,
            "raw": rows[0]["raw"],
            "per_second": median(row["per_second"] for row in rows),
            "rounds": [row["per_second"] for row in rows],
            **{name: median(row["milliseconds"][name] for row in rows) for name in ("p50", "p90", "p99", "max")},
            "server_cpu_milliseconds": median(row["server_cpu_milliseconds"] for row in rows),
        }
        for (server, concurrency, setting), rows in groups.items()
        if len(rows) >= rounds and all(set(row["statuses"]) == {"200"} and not row["failures"] for row in rows)
    ]
    return sorted(table, key=lambda row: row["per_second"], reverse=True)


def best_settings(
    runs: Sequence[Mapping[str, Any]], rounds: int, bodies: Literal["PNG", "any"] = "any"
) -> list[dict[str, Any]]:
    """Return for each server and concurrency the first row of ``ranked``, of those who send a PNG or of all."""
    best: dict[tuple[str, int], dict[str, Any]] = {}
    for row in ranked(runs, rounds):
        if bodies == "any" or not row["raw"]:
            best.setdefault((row["server"], row["concurrency"]), row)
    return list(best.values())


def finalists(
    runs: Sequence[Mapping[str, Any]], contenders: Sequence[Contender], count: int
) -> dict[Contender, list[int]]:
    """Return who is worth measuring at length after one round of all, and at which concurrencies.

    They are the fastest settings of each server at each concurrency, so many with PNGs and as many with raw pixels, in
    the contenders' order.
    """
    places: Counter[tuple[str, int, bool]] = Counter()
    chosen: dict[str, list[int]] = defaultdict(list)
    for row in ranked(runs, 1):
        place = row["server"], row["concurrency"], row["raw"]
        if places[place] < count:
            places[place] += 1
            chosen[f"{row['server']}, {row['setting']}"].append(row["concurrency"])
    return {contender: sorted(chosen[contender.name]) for contender in contenders if contender.name in chosen}


def ratios(best: Sequence[Mapping[str, Any]], own: Sequence[str]) -> list[dict[str, Any]]:
    """Return for each own server and each other one, by concurrency, the ratio of their best rates.

    ``least`` and ``most`` are the ratios of single rounds. ``lower_p99`` says whether the own server's is lower.
    """
    table = {(row["server"], row["concurrency"]): row for row in best}
    compared = []
    for (server, concurrency), row in table.items():
        for (other, at), rival in table.items():
            if server not in own or other in own or at != concurrency:
                continue
            by_round = [mine / theirs for mine, theirs in zip(row["rounds"], rival["rounds"], strict=True)]
            compared.append(
                {
                    "server": server,
                    "against": other,
                    "concurrency": concurrency,
                    "ratio": row["per_second"] / rival["per_second"],
                    "least": min(by_round),
                    "most": max(by_round),
                    "p99_ratio": row["p99"] / rival["p99"],
                    "lower_p99": row["p99"] < rival["p99"],
                }
            )
    return compared
