"""Attacks that know of NIP, by name from the command line, on a published NIP defense."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from service.cli import app

BALL = "epsilon=32/255,step_size=8/255"
ATTACKS = (f"pgd:{BALL}", f"s-ala:{BALL}", f"r-ala:{BALL},log_odds=1,lambda=1/2,k1=4")


def evaluated(store: Path, *attacks: str) -> tuple[int, str]:
    wanted = [word for text in attacks for word in ("--attack", text)]
    given = [
        "evaluate",
        "digits",
        "--data",
        "digits",
        *wanted,
        "--limit",
        "60",
        "--device",
        "cpu",
        "--json",
        "--no-checks",
    ]
    result = CliRunner().invoke(app, [*given, "--store", str(store)])
    return result.exit_code, result.output


def test_adaptive_attacks_are_measured_by_name_beside_the_others(nip_store):
    status, output = evaluated(nip_store, *ATTACKS)
    assert status == 0, output
    report = json.loads(output)
    ball = {"epsilon": 32 / 255, "step_size": 8 / 255, "steps": 10}
    rows = [row for row in report["rows"] if row["form"] == "as crafted"]
    assert [row["parameters"] for row in rows] == [
        ball,
        {**ball, "lambda": 1.0, "log_odds": False},
        {**ball, "lambda": 0.5, "log_odds": True, "k1": 4, "k2": 5},
    ]
    assert [row["attack"] for row in rows] == list(ATTACKS)
    for row in rows:
        assert row["attempted"] == 60
        assert row["fooling"] > 20


@pytest.mark.parametrize("text", ["s-ala:k2=5", "r-ala:log_odds=3"])
def test_a_parameter_that_an_adaptive_attack_does_not_have_is_told(nip_store, text):
    status, output = evaluated(nip_store, text)
    assert status == 1
    assert f"got '{text}'. There are: fgsm" in output


def test_neurons_that_leave_none_over_are_told(nip_store):
    status, output = evaluated(nip_store, "r-ala:k1=900,k2=900")
    assert status == 1
    assert "900 front and 900 tail neurons, at least 1800 in all" in output
