"""An evaluation from the command line: both scenarios, sweeps, checks, and runs that are killed or shared."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from defenses.attacks import ATTACKS
from service.cli import app

pytestmark = pytest.mark.long

LEAST = "deepfool:steps=5"
FGSM, PGD = "fgsm:epsilon=8/255", "pgd:epsilon=8/255,step_size=2/255,steps=8"
BLIND = "pgd-blind:epsilon=8/255,step_size=2/255,steps=8"
SWEEP = "pgd:steps=8,step_size=16/255@epsilon=1/255,16/255,1"
WHOLE = ["--data", "digits", "--scenario", "A", "--scenario", "B", "--attack", FGSM, "--attack", PGD, "--attack", BLIND]
WHOLE += ["--attack", LEAST]
WHOLE += ["--sweep", SWEEP, "--limit", "30", "--device", "cpu", "--samples", "2", "--lottery", "5"]
BLACK_TWIN, NOISE = "pgd-blind:epsilon=32/255", "auna:epsilon=32/255"
"""A white box that sees nothing, and a black box of the same budget."""

TIMED = ("seconds_per_image", "milliseconds", "bare_milliseconds")


def evaluated(store: Path, *arguments: object) -> dict:
    given = ["evaluate", *map(str, arguments), "--store", str(store), "--json"]
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 0, result.output
    return json.loads(result.output)


def untimed(report: dict) -> dict:
    """Return a report without what the clock says, and without the command that made it."""
    lists = {
        name: [{key: value for key, value in each.items() if key not in TIMED} for each in report[name]]
        for name in ("rows", "defenses")
    }
    return {**report, **lists, "command": None}


@pytest.fixture(scope="module")
def report(nip_store) -> dict:
    """The classifier and a defense of it, each attacked in both scenarios."""
    return evaluated(nip_store, "digits@1", "digits@2", *WHOLE)


def row_of(report: dict, defense: str, scenario: str, attack: str, form: str = "as crafted") -> dict:
    wanted = (defense, scenario, attack, form)
    (row,) = [
        row for row in report["rows"] if tuple(row[key] for key in ("defense", "scenario", "attack", "form")) == wanted
    ]
    return row


def test_an_attack_on_the_defense_does_better_than_one_on_the_bare_classifier(report):
    before, after = (row_of(report, "digits@2", scenario, LEAST) for scenario in "AB")
    assert (before["attempted"], after["attempted"]) == (30, 30)
    assert after["resisted_of_attempts"] < before["resisted_of_attempts"]
    assert after["fooling"] == round(30 * (1 - after["corrected"]["mean"]))
    # Nothing alerts, so that nothing is resisted of what is answered wrongly.
    assert after["resisted_of_fooling"] in (None, 0)
    bare = row_of(report, "digits@1", "B", PGD)
    assert bare["corrected"]["mean"] == 1 - row_of(report, "digits@1", "A", PGD)["fooling"] / 30


def test_a_sweep_goes_down_to_nothing(report):
    sweeps = {(sweep["defense"], sweep["scenario"]): sweep for sweep in report["sweeps"]}
    assert set(sweeps) == {(defense, scenario) for defense in ("digits@1", "digits@2") for scenario in "AB"}
    bare = sweeps["digits@1", "B"]
    assert bare["parameter"] == "epsilon"
    assert bare["values"] == pytest.approx([1 / 255, 16 / 255, 1])
    assert bare["robust_accuracy"][0] > bare["robust_accuracy"][-1] == 0
    assert bare["distortion_l2"] == sorted(bare["distortion_l2"])
    rows = [row_of(report, "digits@1", "B", name)["resisted_of_attempts"] for name in bare["attacks"]]
    assert rows == bare["robust_accuracy"]


def test_an_attack_without_a_gradient_is_caught_and_its_rows_are_marked(report):
    failed = {check["name"]: check for check in report["checks"] if not check["passed"] and BLIND in check["attacks"]}
    told = failed["breaks the undefended classifier"]["told"]
    assert re.fullmatch(rf"{BLIND} turns \d+\.\d % of the bare answers; at least 50\.0 % are expected\.", told)
    for row in report["rows"]:
        if row["attack"] == BLIND:
            assert "breaks the undefended classifier" in row["untrusted"]
    assert row_of(report, "digits@2", "B", PGD)["untrusted"] == []


def test_every_kind_of_check_is_made(report):
    names = {check["name"] for check in report["checks"]}
    assert names == {
        "breaks the undefended classifier",
        "repeats from its seed",
        "an attack without bound wins",
        "more effort wins no more",
        "a growing budget breaks the defense",
        "knowing the defense helps the attacker",
        "turns answers of the defense",
        "the best white box is not weaker than the best black box",
    }
    missing = [check for check in report["checks"] if check["passed"] is None]
    assert [check["defense"] for check in missing] == ["digits@1", "digits@2"], "there is no black box"
    assert all(check["name"].startswith("the best white box") for check in missing)
    repeats = [check for check in report["checks"] if check["name"] == "repeats from its seed"]
    assert all(check["passed"] for check in repeats)
    assert {check["attacks"][0] for check in repeats} >= {FGSM, PGD, BLIND}
    wins = [check for check in report["checks"] if check["name"] == "an attack without bound wins"]
    assert [check["defense"] for check in wins] == ["digits@1", "digits@2"]
    assert all(check["passed"] for check in wins)


def test_each_row_names_the_checks_that_looked_at_it(report):
    row = row_of(report, "digits@2", "B", PGD)
    both = {"breaks the undefended classifier", "repeats from its seed"}
    on_the_defense = {"turns answers of the defense", "knowing the defense helps the attacker"}
    assert set(row["checked"]) == both | on_the_defense | {"more effort wins no more"}
    assert set(row_of(report, "digits@2", "A", PGD)["checked"]) == both


def test_every_value_of_a_sweep_is_checked_but_only_the_largest_budget_must_break(report):
    sweeps = {(sweep["defense"], sweep["scenario"]): sweep for sweep in report["sweeps"]}
    swept = sweeps["digits@2", "B"]["attacks"]
    for scenario in "AB":
        assert sweeps["digits@2", scenario]["unchecked"] == [False, False, False]
    breaks = "breaks the undefended classifier"
    assert [breaks in row_of(report, "digits@2", "A", name)["checked"] for name in swept] == [False, False, True]
    for name in swept:
        on_the_defense = {"repeats from its seed", "turns answers of the defense", "more effort wins no more"}
        assert set(row_of(report, "digits@2", "B", name)["checked"]) >= on_the_defense


def test_rows_that_no_check_looked_at_are_marked(nip_store):
    words = ["evaluate", "digits@2", "--data", "digits", "--attack", FGSM, "--limit", "5", "--no-checks"]
    words += ["--store", str(nip_store), "--device", "cpu"]
    shown = CliRunner().invoke(app, words, env={"COLUMNS": "160"})
    assert shown.exit_code == 0, shown.output
    assert "digits@2 ?" in shown.output
    assert "?: unchecked, no check looked at it." in re.sub(r"\s+", " ", shown.output)
    assert all(row["checked"] == [] for row in json.loads(CliRunner().invoke(app, [*words, "--json"]).output)["rows"])


def test_a_black_box_that_does_better_than_the_white_box_is_told(nip_store):
    arguments = ["--data", "digits", "--scenario", "B", "--attack", BLACK_TWIN, "--attack", NOISE]
    report = evaluated(nip_store, "digits@2", *arguments, "--limit", "20", "--device", "cpu")
    (check,) = [each for each in report["checks"] if each["name"].startswith("the best white box")]
    (draws,) = [each for each in report["checks"] if each["attacks"] == [NOISE] and "more effort" in each["name"]]
    assert "with twice the repeats (20 attempts)" in draws["told"]
    noise, blind = (row_of(report, "digits@2", "B", name)["resisted_of_attempts"] for name in (NOISE, BLACK_TWIN))
    assert check["passed"] == (1 - blind >= 1 - noise - 0.05)
    assert not check["passed"], "a hundred draws do better than one"
    assert check["attacks"] == [BLACK_TWIN]


def test_time_that_runs_out_is_told_and_the_same_command_goes_on(report, nip_store, tmp_path):
    cache = ["--cache", tmp_path / "kept"]
    begun = evaluated(nip_store, "digits@1", "digits@2", *WHOLE, *cache, "--minutes", "0")
    assert (begun["complete"], begun["rows"], begun["sweeps"], begun["checks"]) == (False, [], [], [])
    assert len(begun["defenses"]) == 2
    assert untimed(evaluated(nip_store, "digits@1", "digits@2", *WHOLE, *cache)) == untimed(report)


def test_killed_runs_and_two_at_once_end_with_the_same_report(report, nip_store, tmp_path):
    command = [sys.executable, "-c", "from service.cli import app; app()", "evaluate", "digits@1", "digits@2"]
    command += [*WHOLE, "--store", str(nip_store), "--cache", str(tmp_path / "kept"), "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    kept = tmp_path / "kept"
    for wanted in (1, 4):
        running = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 120
        while len(list(kept.glob("*/*/examples.safetensors"))) < wanted and time.monotonic() < deadline:
            if running.poll() is not None:
                break
            time.sleep(0.02)
        running.send_signal(signal.SIGKILL)
        _, errors = running.communicate()
        assert running.returncode == -signal.SIGKILL, errors.decode()
    both = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)
    ]
    for each in both:
        output, errors = each.communicate(timeout=240)
        assert each.returncode == 0, errors.decode()
        assert untimed(json.loads(output)) == untimed(report)


def test_every_attack_is_listed_with_what_it_takes():
    result = CliRunner().invoke(app, ["attacks", "--json"])
    listed = json.loads(result.output)
    assert set(listed) == set(ATTACKS)
    assert listed["pgd"]["parameters"]["steps"] == 10
    for name, facts in listed.items():
        assert facts["norm"] in ("linf", "l2", "l0", "none"), name
        assert facts["passes"] >= 1, name
        assert facts["source"], name
    shown = CliRunner().invoke(app, ["attacks"], env={"COLUMNS": "200"}).output
    assert "Goodfellow et al. 2015" in shown


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["digits@1", "digits@9"], "9"),
        (["digits@2", "elsewhere"], "elsewhere"),
    ],
)
def test_a_version_that_is_not_there_is_named(nip_store, names, told):
    result = CliRunner().invoke(app, ["evaluate", *names, "--data", "digits", "--store", str(nip_store)])
    assert result.exit_code == 1
    assert told in result.output
