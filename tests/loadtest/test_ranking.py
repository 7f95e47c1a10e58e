from functools import partial

from loadtest.competition import OVERHEADS, OWN_OVERHEAD, expected_seconds, most_seconds
from loadtest.contenders import Contender
from loadtest.messages import png_message
from loadtest.own_cost import echo
from loadtest.ranking import best_settings, finalists, ratios


def run(setting, number, rate, statuses=("200",), server="a", concurrency=1, raw=False):
    """A row as a race writes it."""
    latencies = dict.fromkeys(("p50", "p90", "p99", "max"), 1000 / rate)
    return {
        **{"server": server, "setting": setting, "raw": raw, "concurrency": concurrency, "round": number},
        **{"per_second": rate, "milliseconds": latencies, "server_cpu_milliseconds": 1.0},
        **{"statuses": dict.fromkeys(statuses, 1), "failures": {}},
    }


def test_the_best_setting_has_no_errors_and_the_highest_median():
    runs = [
        *(run("steady", number, rate) for number, rate in enumerate((100, 110, 90))),
        *(run("wild", number, rate) for number, rate in enumerate((50, 400, 60))),
        *(run("wrong", number, 500, ("200", "503")) for number in range(3)),
        *(run("other", number, rate, server="b") for number, rate in enumerate((50, 44, 50))),
        *(run("undecoded", number, 120, raw=True) for number in range(3)),
    ]
    runs += [run("lost in the last round", number, 900) for number in range(2)]
    best = best_settings(runs, rounds=3, bodies="PNG")
    assert [(row["server"], row["setting"], row["per_second"]) for row in best] == [
        ("a", "steady", 100),
        ("b", "other", 50),
    ]
    assert ratios(best, ["a"]) == [
        {
            **{"server": "a", "against": "b", "concurrency": 1, "ratio": 2.0, "least": 1.8, "most": 2.5},
            **{"p99_ratio": 0.5, "lower_p99": True},
        }
    ]
    assert [(row["server"], row["setting"]) for row in best_settings(runs, rounds=3)] == [
        ("a", "undecoded"),
        ("b", "other"),
    ]


def contender(server, process, body, raw=False):
    return Contender(server, process, body, partial(png_message, path="/"), echo, raw=raw)


def test_the_finalists_are_the_fastest_with_pngs_and_with_raw_pixels_at_each_concurrency():
    contenders = [contender("a", "alone", body) for body in ("first", "second", "third", "wrong")]
    contenders += [contender("a", "alone", "raw", raw=True), contender("b", "alone", "first")]
    rates = {"first": (30, 10), "second": (20, 30), "third": (10, 20)}
    runs = [run(f"{name}, alone", 0, rate[at], concurrency=at) for name, rate in rates.items() for at in (0, 1)]
    runs += [run("wrong, alone", 0, 99, ("200", "503")), run("raw, alone", 0, 5, raw=True)]
    runs += [run("first, alone", 0, 1, server="b", concurrency=1)]
    chosen = {contender.name: at for contender, at in finalists(runs, contenders, 2).items()}
    assert chosen == {
        "a, first, alone": [0],
        "a, second, alone": [0, 1],
        "a, third, alone": [1],
        "a, raw, alone": [1],
        "b, first, alone": [1],
    }


def test_a_race_takes_its_loads_and_its_starts():
    start = OVERHEADS["LitServe"]
    loads = {
        contender("LitServe", "one", "PNG"): (1, 16),
        contender("LitServe", "one", "raw", raw=True): (1, 16),
        contender("LitServe", "two", "PNG"): (16,),
        contender("Portcullis bare", "one", "PNG"): (1,),
    }
    assert expected_seconds(loads, 2.0, 3) == 3 * (2 * 6 + 2 * start + OWN_OVERHEAD)
    assert expected_seconds(loads, 2.0, 3, {"LitServe, one": 1.0}) == 3 * (2 * 6 + 1 + start + OWN_OVERHEAD)
    assert most_seconds(loads, 2.0, 3) == expected_seconds(loads, 2.0, 3), "two finalists at most are all of them"
    many = {contender("LitServe", str(number), "PNG"): (1,) for number in range(9)}
    assert most_seconds(many, 2.0, 3) == 3 * (2 * 2 + 2 * start)
