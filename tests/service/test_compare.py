"""Two evaluations beside each other, through the command line and by hand."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from defenses.evaluation.plan import EvaluationPlan
from defenses.evaluation.rates import interval_of
from defenses.evaluation.rows import AttackResult, CleanResult, Rate
from service.cli import app
from service.evaluation import EvaluationReport
from service.evaluation.compare import (
    ReportsUnlike,
    ReportUnreadable,
    SchemaUnknown,
    Share,
    compare,
    load_report,
    newcombe_interval,
    wilson_interval,
)
from service.evaluation.document import SCHEMA, DefenseReport

FGSM, CW = "fgsm:epsilon=8/255", "cw:steps=100"
PARAMETERS = {FGSM: {"epsilon": 8 / 255}, CW: {"confidence": 0.0, "steps": 100}}


def rate(count: int, of: int) -> Rate:
    return Rate(count / of, (count / of,), interval_of(count, of))


def defense(name: str, method: str, digest: str, *, right: int = 900, alerted: int = 50) -> DefenseReport:
    clean = CleanResult(1000, 0.92, rate(right, 1000), rate(right - 40, 1000), rate(alerted, 1000))
    return DefenseReport(name, "coophance", method, digest, 0.5, (FGSM,), False, clean, None, 2.0, 1.0)


def result(name: str, attack: str, resisted: int | None, *, scenario: str = "A", fooling: int = 250) -> AttackResult:
    found = None if resisted is None else rate(resisted, fooling if scenario == "A" else 300)
    return AttackResult(
        defense=name,
        scenario=scenario,
        attack=attack,
        family=attack.partition(":")[0],
        parameters=PARAMETERS[attack],
        norm="linf",
        sees="gradients",
        form="as crafted",
        attempted=300,
        fooling=fooling if resisted is not None else 0,
        distortion_l2=1.0,
        distortion_linf=0.03,
        corrected=found,
        alerted=found,
        resisted=found,
        resisted_of_attempts=None,
        resisted_of_fooling=None,
        auc=0.9,
        detector_auc=0.8,
        curve=((0.0, 0.0), (1.0, 1.0)),
        success_within={"1": 0.1, "10": 0.2, "100": 0.3},
        seconds_per_image=0.1,
        checked=("repeats from its seed",),
    )


@pytest.fixture
def first() -> EvaluationReport:
    """Two defenses under two attacks in scenario A, one of them also in B."""
    return EvaluationReport(
        schema=SCHEMA,
        classifier={"name": "cats", "version": 1, "digest": "ab" * 32},
        labels=("cat", "dog"),
        dataset={"name": "pets", "digest": "cd" * 32, "split_seed": 0},
        plan=EvaluationPlan(attacks=(FGSM, CW), scenarios=("A", "B")),
        attempted=300,
        complete=True,
        defenses=(defense("cats@2", "coophance", "d2"), defense("cats@3", "lid", "d3")),
        rows=(
            result("cats@2", FGSM, 200),
            result("cats@2", CW, 240),
            result("cats@2", FGSM, 150, scenario="B"),
            result("cats@3", FGSM, 100),
        ),
        sweeps=(),
        checks=(),
        published=(),
        code="ef" * 32,
        libraries={"torch": "2.13.0"},
        hardware={"device": "a machine", "cpus": 2},
        command="portcullis evaluate cats@2 cats@3",
    )


def written(report: EvaluationReport, path: Path) -> Path:
    path.write_text(json.dumps(report.as_json()))
    return path


def with_rows(report: EvaluationReport, *rows: AttackResult) -> EvaluationReport:
    """Return the same evaluation with rows in the place of those of the same attack."""
    key = {(row.defense, row.scenario, row.attack): row for row in rows}
    return replace(report, rows=tuple(key.get((r.defense, r.scenario, r.attack), r) for r in report.rows))


def portcullis(*arguments: object) -> tuple[int, str]:
    outcome = CliRunner().invoke(app, ["compare", *map(str, arguments)])
    if outcome.exception is not None and not isinstance(outcome.exception, SystemExit):
        raise outcome.exception
    return outcome.exit_code, re.sub(r"\s+", " ", outcome.output)


def told(comparison) -> dict[tuple[str, str, str | None, str | None], object]:
    return {
        (each.place.measure, each.place.defense, each.place.scenario, each.place.attack): each
        for each in comparison.differences
    }


def test_a_report_is_read_as_it_was_written(first, tmp_path):
    assert load_report(written(first, tmp_path / "a.json")) == first


def test_newcombes_interval_is_that_of_his_paper():
    # Newcombe 1998, table II, method 10: 56/70 less 48/80, 9/10 less 3/10, 10/10 less 0/10, 5/56 less 0/29.
    expected = {
        ((56, 70), (48, 80)): (0.0524, 0.3339),
        ((9, 10), (3, 10)): (0.1705, 0.8090),
        ((10, 10), (0, 10)): (0.6075, 1.0),
        ((5, 56), (0, 29)): (-0.0381, 0.1926),
    }
    for ((count, of), (other, of_other)), interval in expected.items():
        assert newcombe_interval(Share(other / of_other, of_other), Share(count / of, of)) == pytest.approx(
            interval, abs=6e-5
        )


def test_wilsons_interval_is_that_of_scipy():
    from scipy.stats import binomtest

    for count, of in ((0, 7), (3, 7), (7, 7), (431, 1000)):
        low, high = binomtest(count, of).proportion_ci(0.95, method="wilson")
        assert wilson_interval(Share(count / of, of)) == pytest.approx((low, high))


def test_the_interval_holds_the_true_difference_as_often_as_it_says():
    random = np.random.default_rng(0)
    p, q, n, trials = 0.85, 0.7, 120, 2000
    held = 0
    for _ in range(trials):
        low, high = newcombe_interval(Share(random.binomial(n, p) / n, n), Share(random.binomial(n, q) / n, n))
        held += low <= q - p <= high
    assert 0.935 < held / trials < 0.975


def test_what_differs_beyond_chance_is_told_and_the_rest_is_not(first):
    rows = (result("cats@2", FGSM, 120), result("cats@2", CW, 235), result("cats@3", FGSM, 170))
    found = told(compare(first, with_rows(first, *rows)))
    worse, alike, better = (found["resisted", row.defense, "A", row.attack] for row in rows)
    assert (worse.first.rate, worse.second.rate, worse.difference) == pytest.approx((0.8, 0.48, -0.32))
    assert (worse.worse, worse.better) == (True, False)
    assert worse.interval[1] < 0
    assert (alike.worse, alike.better) == (False, False)
    assert alike.difference == pytest.approx(-0.02)
    assert alike.interval[0] < alike.difference < 0 < alike.interval[1]
    assert (better.worse, better.better) == (False, True)


def test_more_false_positives_are_worse_and_more_accuracy_is_better(first):
    other = replace(
        first,
        defenses=(defense("cats@2", "coophance", "d2", right=960, alerted=120), first.defenses[1]),
    )
    found = told(compare(first, other))
    accuracy, alarms = (found[measure, "cats@2", None, None] for measure in ("accuracy", "false positives"))
    assert accuracy.better
    assert alarms.worse
    assert alarms.difference == pytest.approx(0.07)
    assert not found["accuracy", "cats@3", None, None].better


def test_rates_are_over_what_fools_in_a_and_over_all_attempts_in_b(first):
    found = told(compare(first, first))
    assert found["resisted", "cats@2", "A", FGSM].first.images == 250
    assert found["resisted", "cats@2", "B", FGSM].first.images == 300


def test_defenses_are_matched_by_digest_then_name_then_method(first):
    renamed = replace(
        first,
        defenses=(replace(first.defenses[0], name="cats@7"), replace(first.defenses[1], digest="new")),
        rows=tuple(replace(row, defense={"cats@2": "cats@7"}.get(row.defense, row.defense)) for row in first.rows),
    )
    pairs = {each.place.defense: each.second_defense for each in compare(first, renamed).differences}
    assert pairs == {"cats@2": "cats@7", "cats@3": "cats@3"}
    fitted_again = replace(renamed, defenses=tuple(replace(each, digest="other") for each in renamed.defenses))
    assert {e.place.defense: e.second_defense for e in compare(first, fitted_again).differences} == pairs


def test_two_of_one_method_that_nothing_tells_apart_are_not_matched(first):
    nips = tuple(defense(f"cats@{n}", "nip", f"n{n}") for n in (4, 5))
    others = tuple(replace(each, name=f"dogs@{n}", digest=f"m{n}") for n, each in enumerate(nips))
    compared = compare(replace(first, defenses=nips, rows=()), replace(first, defenses=others, rows=()))
    assert compared.differences == ()
    assert {place.defense for place in compared.only_first} == {"cats@4", "cats@5"}
    assert {place.defense for place in compared.only_second} == {"dogs@0", "dogs@1"}


def test_attacks_are_matched_by_their_parameters_and_not_by_how_they_were_written(first):
    renamed = replace(
        first, rows=tuple(replace(row, attack="fgsm") if row.family == "fgsm" else row for row in first.rows)
    )
    assert compare(first, renamed).only_first == ()
    stronger = replace(first, rows=tuple(replace(row, parameters={"epsilon": 0.1}) for row in first.rows))
    compared = compare(first, stronger)
    assert {place.attack for place in compared.only_first} == {FGSM, CW}
    assert {each.place.measure for each in compared.differences} == {"accuracy", "false positives"}


def test_a_row_that_nothing_counts_in_is_as_if_it_were_not_there(first):
    compared = compare(first, with_rows(first, result("cats@2", CW, None)))
    assert [(place.defense, place.attack) for place in compared.only_first] == [("cats@2", CW)]
    assert compared.only_second == ()


@pytest.mark.parametrize(
    ("changed", "told_of"),
    [
        ({"classifier": {"name": "dogs", "version": 4, "digest": "99" * 32}}, "cats@1 (abababababab) and dogs@4"),
        ({"dataset": {"name": "pets", "digest": "77" * 32, "split_seed": 0}}, "pets (777777777777, split seed 0)"),
        ({"dataset": {"name": "pets", "digest": "cd" * 32, "split_seed": 5}}, "split seed 5)"),
        ({"attempted": 200}, "300 attempted images in the order of seed 0 and 200 in that of 0"),
        ({"plan": EvaluationPlan(attacks=(FGSM, CW), seed=3)}, "and 300 in that of 3"),
    ],
)
def test_evaluations_of_other_things_are_refused_unless_wanted_anyway(first, tmp_path, changed, told_of):
    other = replace(first, **changed)
    with pytest.raises(ReportsUnlike, match=r"Compare them --anyway\.") as refused:
        compare(first, other)
    assert told_of in str(refused.value)
    assert len(refused.value.unlike) == 1
    paths = [written(each, tmp_path / name) for each, name in ((first, "a.json"), (other, "b.json"))]
    status, output = portcullis(*paths)
    assert status == 1
    assert told_of in output
    status, output = portcullis(*paths, "--anyway")
    assert status == 0
    assert f"Not alike: {refused.value.unlike[0]}." in output


def test_the_command_prints_the_differences_and_fails_only_where_asked(first, tmp_path):
    before = written(first, tmp_path / "a.json")
    rows = (replace(result("cats@2", FGSM, 120), untrusted=("more effort wins no more",)), result("cats@2", CW, None))
    changed = replace(with_rows(first, *rows), code="99" * 32, complete=False, plan=replace(first.plan, samples=16))
    after = written(changed, tmp_path / "b.json")
    status, output = portcullis(before, after)
    assert status == 0, output
    low, high = (100 * end for end in newcombe_interval(Share(0.8, 250), Share(0.48, 250)))
    assert f"80.0 % (250) 48.0 % (250) -32.0 {low:.1f}, {high:.1f} worse" in output
    assert "as crafted !" in output
    assert f"In the first alone: coophance cats@2, A, {CW}, as crafted." in output
    assert "Otherwise made: samples: 8 in the first, 16 in the second." in output
    assert "the code that crafted is another" in output
    assert "the second is not complete: time ran out" in output
    assert portcullis(before, after, "--fail-on-worse")[0] == 3
    assert portcullis(after, before, "--fail-on-worse")[0] == 0, "what is better is no failure"
    assert portcullis(before, before, "--fail-on-worse")[0] == 0


def test_a_rate_that_no_check_looked_at_is_marked_and_said_to_be(first, tmp_path, monkeypatch):
    unchecked = replace(result("cats@2", FGSM, 200), checked=())
    other = with_rows(first, unchecked)
    found = told(compare(first, other))["resisted", "cats@2", "A", FGSM]
    assert (found.first.unchecked, found.second.unchecked) == (False, True)
    before, after = written(first, tmp_path / "a.json"), written(other, tmp_path / "b.json")
    monkeypatch.setenv("COLUMNS", "160")
    status, output = portcullis(before, after)
    assert status == 0, output
    assert output.count("as crafted ?") == 1
    assert "?: no check looked at it." in output
    assert "as crafted ?" not in portcullis(before, before)[1]


def test_the_json_says_the_same(first, tmp_path):
    before = written(first, tmp_path / "a.json")
    after = written(with_rows(first, result("cats@2", FGSM, 120)), tmp_path / "b.json")
    outcome = CliRunner().invoke(app, ["compare", str(before), str(after), "--json", "--fail-on-worse"])
    assert outcome.exit_code == 3
    values = json.loads(outcome.output)
    assert values["worse"] is True
    (worse,) = (each for each in values["differences"] if each["worse"])
    assert worse["place"]["attack"] == FGSM
    assert worse["difference"] == pytest.approx(-0.32)
    assert worse["interval"] == pytest.approx(newcombe_interval(Share(0.8, 250), Share(0.48, 250)))


def test_names_with_brackets_are_printed_as_they_are(first, tmp_path):
    named = replace(first, defenses=(replace(first.defenses[0], name="[bold]x[/y]@2"),), rows=())
    path = written(named, tmp_path / "a.json")
    status, output = portcullis(path, path)
    assert status == 0
    assert "[bold]x[/y]@2" in output


@pytest.mark.parametrize(
    ("text", "error", "told_of"),
    [
        ("{", ReportUnreadable, "it is no JSON"),
        ("[1]", ReportUnreadable, "it names no schema"),
        ('{"model": "cats", "clean": {}}', ReportUnreadable, "it names no schema"),
        ('{"schema": 99}', SchemaUnknown, f"of schema {SCHEMA}, got "),
        (f'{{"schema": {SCHEMA}}}', ReportUnreadable, "classifier: Field required"),
    ],
)
def test_what_is_no_evaluation_is_refused_with_the_reason(first, tmp_path, text, error, told_of):
    path = tmp_path / "b.json"
    path.write_text(text)
    with pytest.raises(error, match=re.escape(told_of)) as refused:
        load_report(path)
    assert refused.value.path == path
    status, output = portcullis(written(first, tmp_path / "a.json"), path)
    assert status == 1
    assert told_of in output


def test_a_value_of_another_kind_is_named_by_its_place(first, tmp_path):
    values = json.loads(json.dumps(first.as_json()))
    values["rows"][1]["resisted"]["mean"] = "most"
    path = tmp_path / "a.json"
    path.write_text(json.dumps(values))
    with pytest.raises(ReportUnreadable, match=r"rows\.1\.resisted\.mean: Input should be a valid number"):
        load_report(path)


def test_bytes_that_are_no_text_and_files_that_are_not_there_are_told(first, tmp_path):
    path = tmp_path / "b.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ReportUnreadable, match="it is no JSON"):
        load_report(path)
    status, output = portcullis(written(first, tmp_path / "a.json"), tmp_path / "none.json")
    assert status == 1
    assert "There is no file" in output
    assert "none.json to compare." in output
    assert portcullis(tmp_path, tmp_path)[0] == 1, "a folder is no file"


def test_a_field_that_is_new_is_no_obstacle(first, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({**first.as_json(), "later": 1}))
    assert load_report(path) == first
