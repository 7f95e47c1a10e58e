"""The page of an evaluation: what it tells of defenses that were really attacked, opened in a real browser."""

import base64
import io
import json
import re
import shutil
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright
from torch import nn

from defenses.baselines import BaselinePlan, fit_baseline
from defenses.checkpoint import save_protected
from defenses.classifier import Classifier
from defenses.evaluation.plan import EvaluationPlan
from defenses.evaluation.rows import Check, SubstituteResult
from defenses.splits import LabelledImages, Splits
from defenses.stages import Stages
from model_store import InputSpec, Store
from service.datasets import Dataset, load_dataset
from service.evaluation import Evaluated, EvaluationReport, evaluate_defenses, load_subjects
from service.evaluation.compare import compare, load_report
from service.evaluation.published import PublishedRow
from service.evaluation_report import render, write_page
from service.evaluation_report.curves import DASHES
from service.evaluation_report.samples import sample_groups
from service.fit_draft import baseline_draft
from service.register import Declaration, register
from service.report_parts.axes import LINES, MARKERS

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
CHROMIUM = shutil.which("chromium")
SPEC = InputSpec(shape=(1, 16, 16), mode="L", resize="bilinear")
HOSTILE = '<img src=x onerror="alert(1)">'
LABELS = ("zero", HOSTILE, "$two", "three & more", "four", "five", "six", "seven", "eight", "nine")
COMMAND = "portcullis evaluate digits@1 --data '<script>alert(2)</script>'"
LID = {"neighbors": 10, "references": 40}
BASELINES = (
    BaselinePlan("lid", LID, attacks=("fgsm:epsilon=48/255",), examples=60),
    BaselinePlan("lid", LID, attacks=("deepfool:steps=8",), examples=60),
    BaselinePlan("noise", {"sigma": 0.1}),
)
PLAN = EvaluationPlan(
    attacks=("fgsm:epsilon=48/255", "deepfool:steps=8"),
    scenarios=("A", "B"),
    sweeps=("fgsm@epsilon=8/255,48/255,200/255",),
    limit=12,
    dear_limit=6,
    samples=2,
    noise_seeds=2,
    lottery=2,
)
PUBLISHED = PublishedRow(
    *("digits@2", "lid", "A", "fgsm:epsilon=48/255", 0.9235, 0.875, (0.6, 0.97), 16, 0.9852, None),
    untrusted=True,
    unchecked=False,
)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors on one thread: the same rounding everywhere."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    loaded = load_dataset(["digits"], SPEC, labels=None, split_seed=0)
    return replace(loaded, name="scans & co <2026>", labels=LABELS)


@pytest.fixture(scope="module")
def store(dataset, tmp_path_factory) -> Store:
    """A store with a small classifier of digits, trained for real, and three baselines fitted for it."""
    models = Store.open(tmp_path_factory.mktemp("evaluated") / "models")
    splits = Splits(*(_images(getattr(dataset, name)) for name in Splits._fields))
    declared = Declaration(shape=SPEC.shape, resize="bilinear", labels=LABELS)
    register(models, "digits", _trained(splits.fit), declared, command="test")
    fetched = models.fetch("digits", 1)
    classifier = Classifier.load(fetched.folder / "model.onnx").eval()
    for plan in BASELINES:
        stages = Stages(tmp_path_factory.mktemp("stages"))
        fitted = fit_baseline(classifier, splits, plan, stages=stages, device=CPU, progress=lambda *_: None)
        payload = tmp_path_factory.mktemp("payload")
        save_protected(fitted.protected, payload / "checkpoint")
        models.publish("digits", baseline_draft(fetched, dataset, plan, fitted, fit="f1", command="test"), payload)
    return models


def _images(split) -> LabelledImages:
    return LabelledImages(torch.from_numpy(split.images), torch.from_numpy(split.targets).long())


def _trained(images: LabelledImages) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(
            *(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU()),
            *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 10)),
        )
        optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)
        x = images.images.float() / 255
        for _ in range(3):
            for rows in torch.randperm(len(x)).split(50):
                loss = F.cross_entropy(network(x[rows]), images.targets[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return network.eval()


@pytest.fixture(scope="module")
def measured(store, dataset, tmp_path_factory) -> Evaluated:
    """The baselines and the bare classifier, attacked by two attacks in both scenarios and by a sweep."""
    subjects = load_subjects(store, [f"digits@{version}" for version in range(1, 5)])
    return evaluate_defenses(
        subjects,
        dataset,
        PLAN,
        cache=tmp_path_factory.mktemp("cache"),
        minutes=None,
        device=CPU,
        progress=lambda *_: None,
        command=COMMAND,
    )


@pytest.fixture(scope="module")
def evaluated(measured) -> Evaluated:
    """The same, beside a row of a paper; a check of one attack and one of a row fail, and some rows have none."""
    attack, scenario = PLAN.attacks[1], "B"
    failed = (
        Check("repeats from its seed", False, f"{attack} gives other examples <b>twice</b>.", None, "A", (attack,)),
        Check("more effort wins no more", False, "twice the steps win all.", "digits@3", scenario, (PLAN.attacks[0],)),
    )
    rows = tuple(
        replace(row, untrusted=(failed[0].name,))
        if row.attack == attack
        else replace(row, untrusted=(failed[1].name,))
        if (row.defense, row.scenario, row.attack) == ("digits@3", scenario, PLAN.attacks[0])
        else replace(row, untrusted=())
        for row in measured.report.rows
    )
    least = measured.report.sweeps[0].attacks[0]
    rows = tuple(replace(row, checked=()) if (row.scenario, row.attack) == ("A", least) else row for row in rows)
    sweeps = tuple(
        replace(sweep, unchecked=(sweep.scenario == "A", *sweep.unchecked[1:])) for sweep in measured.report.sweeps
    )
    passed = tuple(replace(check, passed=None if check.passed is None else True) for check in measured.report.checks)
    checks = (*passed, *failed)
    report = replace(measured.report, rows=rows, sweeps=sweeps, checks=checks, published=(PUBLISHED,))
    return replace(measured, report=report)


@pytest.fixture(scope="module")
def written(evaluated, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("page") / "evaluation.html"
    write_page(evaluated, path)
    return path


@pytest.fixture(scope="module")
def values(evaluated) -> dict:
    """The report as JSON holds it."""
    return json.loads(json.dumps(evaluated.report.as_json(), allow_nan=False))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("There is no Chromium here.")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def page(browser, written) -> Page:
    """The page in a window of 1280 by 900."""
    shown = browser.new_page(viewport={"width": 1280, "height": 900})
    shown.goto(written.as_uri())
    return shown


def cells(page: Page, table: str) -> list[list[str]]:
    """Return what is read in each cell of a table, row by row."""
    rows = page.locator(f"#{table} tr").all()
    return [[re.sub(r"\s+", " ", text).strip() for text in row.locator("th, td").all_inner_texts()] for row in rows]


def clean_alone(evaluated: Evaluated) -> EvaluationReport:
    """Return what was measured on clean images, without the attacks."""
    return replace(evaluated.report, rows=(), sweeps=(), checks=(), published=(), plan=replace(PLAN, attacks=()))


def numbers_in(page: Page, where: str) -> list[float]:
    """Return the values of the numbers within an element, in their order."""
    found = page.locator(f"{where} data").evaluate_all("found => found.map(each => each.value)")
    return [float(value) for value in found]


def numbers(tree) -> set[float]:
    if isinstance(tree, dict):
        return set().union(*map(numbers, tree.values()))
    if isinstance(tree, list):
        return set().union(*map(numbers, tree))
    return {float(tree)} if isinstance(tree, int | float) and not isinstance(tree, bool) else set()


def rate_numbers(row: dict) -> list[float]:
    """Return a row's numbers in the order of the table's columns."""
    found = [row["fooling"], row["attempted"], row["distortion_l2"], row["distortion_linf"]]
    found += [rate and rate["mean"] for rate in (row["corrected"], row["alerted"], row["resisted"])]
    if row["resisted"]:
        found += row["resisted"]["interval"]
        by_seed = row["resisted"]["by_seed"]
        found += [min(by_seed), max(by_seed)] if len(by_seed) > 1 else []
    found += [row[name] for name in ("resisted_of_attempts", "resisted_of_fooling", "auc", "detector_auc")]
    found += [(row["success_within"] or {}).get(n) for n in ("1", "10", "100")]
    return [each for each in (*found, row["seconds_per_image"]) if each is not None]


@pytest.mark.parametrize(("width", "media"), [(1280, "screen"), (400, "screen"), (1000, "print")])
def test_the_page_opens_without_a_request_or_an_error_and_fits(browser, written, width, media):
    requests, complaints = [], []
    shown = browser.new_page(viewport={"width": width, "height": 900})
    shown.emulate_media(media=media)
    shown.on("request", lambda request: requests.append(request.url))
    shown.on("console", lambda message: complaints.append(message.text))
    shown.on("pageerror", lambda error: complaints.append(str(error)))
    shown.on("dialog", lambda dialog: complaints.append(dialog.message))
    shown.goto(written.as_uri())
    assert [url for url in requests if not url.startswith("data:")] == [written.as_uri()]
    assert complaints == []
    assert shown.evaluate("document.documentElement.scrollWidth") <= width
    assert shown.get_by_role("heading", name="Defenses of digits under attack").is_visible()
    broken = "all => all.filter(each => !each.complete || !each.naturalWidth).length"
    assert shown.locator("img").evaluate_all(broken) == 0
    shown.close()


def test_every_number_of_the_page_is_one_of_the_json(page, values):
    shown = numbers_in(page, "body")
    assert len(shown) > 800
    assert set(shown) <= numbers(values)


def test_the_defenses_are_told_as_the_json_has_them(page, values):
    heading, *rows = cells(page, "clean")
    assert heading[5] == "alerts as errors"
    assert len(rows) == 4
    for row, defense in zip(rows, values["defenses"], strict=True):
        clean = defense["clean"]
        assert defense["name"] in row[0]
        assert row[1] == (", ".join(defense["fitted_on"]) or "-")
        for cell, rate in zip(row[4:7], ("accuracy", "accepted_accuracy", "false_positive_rate"), strict=True):
            assert cell.startswith(f"{100 * clean[rate]['mean']:.2f} %")
            assert f"{100 * clean[rate]['interval'][0]:.2f} % to" in cell
        assert row[9:] == [f"{defense['milliseconds']:.3f}", f"{defense['bare_milliseconds']:.3f}"]
    assert rows[0][7:9] == ["-", "-"], "without noise there is no lottery"
    lottery = values["defenses"][3]["lottery"]
    assert rows[3][7].startswith(f"{100 * lottery['labels_change']:.1f} %")


@pytest.mark.parametrize(
    ("table", "scenario", "form"),
    [(1, "A", "as crafted"), (2, "A", "rounded"), (3, "B", "as crafted"), (4, "B", "rounded")],
)
def test_each_scenario_has_its_attacks_in_both_forms_with_a_line_for_each_defense(page, values, table, scenario, form):
    places = {defense["name"]: place for place, defense in enumerate(values["defenses"])}
    attacks = [*PLAN.attacks, *(["other-image"] if scenario == "B" else [])]
    groups = page.locator(f"#results-{table} tbody")
    assert groups.count() == len(attacks)
    for place, attack in enumerate(attacks):
        rows = [
            row for row in values["rows"] if (row["scenario"], row["form"], row["attack"]) == (scenario, form, attack)
        ]
        group = groups.nth(place)
        assert group.locator("tr.group").inner_text().startswith(attack)
        lines = group.locator("tr:not(.group):not(.doubt)")
        assert lines.count() == len(rows) == 4
        for row in rows:
            line = lines.nth(places[row["defense"]])
            assert row["defense"] in line.locator("th").inner_text()
            found = line.locator("data").evaluate_all("found => found.map(each => each.value)")
            assert [float(value) for value in found] == rate_numbers(row)


def test_what_is_resisted_stands_side_by_side(page, values):
    for scenario in ("A", "B"):
        heading, *rows = cells(page, f"overview-{scenario}")
        for row, defense in zip(rows, values["defenses"], strict=True):
            for attack, cell in zip(heading[1:], row[1:], strict=True):
                (found,) = (
                    each
                    for each in values["rows"]
                    if (each["defense"], each["scenario"], each["attack"], each["form"])
                    == (defense["name"], scenario, attack, "as crafted")
                )
                assert cell.startswith(f"{100 * found['resisted']['mean']:.1f} %")
                assert cell.endswith("(!)") == bool(found["untrusted"])


def test_untrusted_rows_are_marked_with_what_failed(page, evaluated):
    untrusted = page.locator("tr.untrusted")
    assert untrusted.count() == sum(bool(row.untrusted) for row in evaluated.report.rows)
    assert "untrusted" in untrusted.first.inner_text()
    plain = page.locator("#results-1 tbody tr:not(.untrusted):not(.group)").first
    colours = [
        each.locator("td").first.evaluate("e => getComputedStyle(e).backgroundColor")
        for each in (untrusted.first, plain)
    ]
    assert colours[0] != colours[1]
    of_the_attack = page.locator("#results-1 tr.doubt")
    assert of_the_attack.all_inner_texts() == [
        "Untrusted on every defense, since the check “repeats from its seed” failed: deepfool:steps=8 gives other "
        "examples <b>twice</b>."
    ]
    of_the_row = page.locator("#results-3 tbody").first.locator("tr.doubt")
    assert of_the_row.all_inner_texts() == [
        "Untrusted, since the check “more effort wins no more” failed: twice the steps win all."
    ]


def test_failed_checks_come_first_and_passed_ones_after_them(page, evaluated):
    assert [row[0] for row in cells(page, "failed")[1:]] == ["failed", "failed"]
    made = sum(check.passed is not None for check in evaluated.report.checks)
    assert page.locator(".findings").inner_text().startswith(f"2 of {made} sanity checks failed")
    page.locator("details:has(#passed) summary").click()
    passed = cells(page, "passed")[1:]
    assert len(passed) == made - 2
    assert {row[0] for row in passed} == {"passed"}
    assert "other-image wins" in page.locator("#passed").inner_text()


def test_checks_that_had_nothing_to_compare_with_are_told_apart(page, evaluated):
    page.locator("details:has(#missing) summary").click()
    missing = cells(page, "missing")[1:]
    assert [(row[0], row[2]) for row in missing] == [("not made", f"digits@{version}") for version in range(1, 5)]
    assert "no black box of the same norm and budget was run beside fgsm:epsilon=48/255" in missing[0][1]


def test_rows_that_no_check_looked_at_are_marked_as_unchecked(browser, page, evaluated):
    unchecked = sum(row.unchecked for row in evaluated.report.rows)
    assert unchecked == 4 * 2, "the least value of the sweep, in scenario A, of four defenses, in two forms"
    for summary in page.locator("#results details summary").all():
        summary.click()
    badges = page.locator("#results th .badge.unchecked")
    assert badges.all_inner_texts() == ["unchecked"] * unchecked
    assert cells(page, "sweep-1")[1][1].count("(?)") == 1
    assert "No check looked at the rows that are marked as unchecked" in page.locator("#checks").inner_text()
    rows = tuple(replace(row, checked=(), untrusted=()) for row in evaluated.report.rows)
    published = (replace(PUBLISHED, untrusted=False, unchecked=True),)
    shown = browser.new_page()
    shown.set_content(render(Evaluated(replace(evaluated.report, rows=rows, checks=(), published=published), ())))
    assert shown.locator("#results th .badge.unchecked").count() == len(rows)
    assert shown.locator("#overview-A td abbr").all_inner_texts() == ["(?)"] * 8
    assert cells(shown, "paper")[1][4].endswith("of 16) unchecked")
    assert "The attacks themselves were not checked." in shown.locator("#checks").inner_text()
    shown.close()


def test_an_incomplete_evaluation_says_so_in_large_letters(browser, evaluated, tmp_path, page):
    assert page.locator(".incomplete").count() == 0
    assert "Incomplete" not in page.locator("body").inner_text()
    path = tmp_path / "incomplete.html"
    write_page(Evaluated(replace(clean_alone(evaluated), complete=False), ()), path)
    shown = browser.new_page()
    shown.goto(path.as_uri())
    told = shown.locator(".incomplete strong")
    assert told.is_visible()
    assert float(told.evaluate("e => parseFloat(getComputedStyle(e).fontSize)")) > 30
    shown.close()


def test_the_sweeps_and_their_figures_tell_the_same(page, values):
    for number, sweep in enumerate(values["sweeps"]):
        table = 1 if sweep["scenario"] == "A" else 2
        heading, *rows = cells(page, f"sweep-{table}")
        assert [float(each) for each in heading[1:]] == pytest.approx(sweep["values"], rel=1e-3)
        (row,) = (row for row in rows if sweep["defense"] in row[0])
        for cell, share, distance in zip(row[1:], sweep["robust_accuracy"], sweep["distortion_l2"], strict=True):
            assert re.sub(r" \([!?]\)", "", cell) == f"{100 * share:.1f} % {distance:.3f}", number
    described = page.locator("#budget-0-desc").text_content()
    first = values["sweeps"][0]["robust_accuracy"]
    assert f"no defense (digits@1): from {100 * first[0]:.1f} % to {100 * first[-1]:.1f} %" in described
    # The two that have a detector, in both scenarios.
    assert page.locator("svg[aria-labelledby^=components]").count() == 4
    rows = {(row["defense"], row["scenario"], row["attack"], row["form"]): row for row in values["rows"]}
    shares = [
        rows["digits@2", "A", attack, "as crafted"]["alerted"]["mean"] for attack in values["sweeps"][0]["attacks"]
    ]
    told = ", ".join(f"{100 * share:.1f} %" for share in shares)
    assert f"detector: alerted: {told}" in page.locator("#components-0-desc").text_content()


def test_the_curves_have_a_line_for_each_defense_that_has_one(page, values):
    figures = page.locator("#curves svg")
    assert figures.count() == 5, "two attacks in A; those and another image in B"
    text = figures.first.locator("text").all_text_contents()
    rows = [
        row
        for row in values["rows"]
        if (row["scenario"], row["attack"], row["form"]) == ("A", PLAN.attacks[0], "as crafted")
    ]
    for row in rows:
        area = "" if row["auc"] is None else f", AUC {row['auc']:.3f}"
        assert any(label.endswith(f"({row['defense']}){area}") for label in text), text
    box = figures.first.bounding_box()
    assert box["width"] > 300
    assert box["height"] > 200


def test_what_was_fitted_on_one_attack_is_told_of_the_others(page, values, evaluated):
    heading, *rows = cells(page, "matrix")
    assert heading == ["fitted on", *PLAN.attacks]
    assert [row[0].split()[0] for row in rows] == ["fgsm:epsilon=48/255", "deepfool:steps=8"]
    assert page.locator("#matrix td.own").count() == 2
    rows = tuple(row for row in evaluated.report.rows if row.defense in ("digits@1", "digits@2") and not row.curve)
    alone = replace(evaluated.report, defenses=evaluated.report.defenses[:2], rows=rows, sweeps=())
    assert 'id="matrix"' not in render(Evaluated(alone, ())), "one defense generalises over nothing"


def test_a_substitute_is_told_beside_what_was_crafted_on_it(browser, evaluated):
    substitute = SubstituteResult(4000, 1000, 0.875, 0.25)
    rows = tuple(
        replace(row, scenario="transfer", substitute=substitute)
        for row in evaluated.report.rows
        if (row.defense, row.scenario) == ("digits@4", "B")
    )
    plan = replace(PLAN, scenarios=("transfer",))
    report = replace(clean_alone(evaluated), plan=plan, defenses=evaluated.report.defenses[3:], rows=rows)
    shown = browser.new_page()
    shown.set_content(render(Evaluated(report, ())))
    assert cells(shown, "substitutes")[1:] == [["noise digits@4", "4,000", "1,000", "87.5 %", "25.0 %"]]
    assert "crafted on a substitute that learned" in shown.locator("#overview-transfer caption").inner_text()
    assert "trained on the labels that the defense answers with" in shown.locator("#results").inner_text()
    shown.close()


def test_the_paper_stands_beside_what_was_measured(page, evaluated):
    measured = "87.5 % (60.0 % to 97.0 %, of 16) untrusted"
    assert cells(page, "paper")[1] == ["lid digits@2", "A", PLAN.attacks[0], "92.3 %", measured, "0.9852", "-"]
    assert 'id="paper"' not in render(Evaluated(clean_alone(evaluated), ()))


def test_the_pictures_are_the_images(page, measured):
    first = measured.samples[0]
    strip = page.locator("#samples table").first.locator("tbody tr").first
    assert strip.locator("td").count() == 3 + 4, "clean, adversarial, difference, and what each defense makes of it"
    pixels = []
    for each in strip.locator("img").all()[:3]:
        source = each.get_attribute("src").partition(",")[2]
        with Image.open(io.BytesIO(base64.b64decode(source))) as image:
            pixels.append(np.array(image).astype(float))
    assert np.abs(pixels[0] - 255 * first.clean[0].numpy()).max() <= 0.5
    assert np.abs(pixels[1] - 255 * first.adversarial[0].numpy()).max() <= 0.5
    times = int(strip.locator("td").nth(2).inner_text().split()[-1])
    change = (first.adversarial - first.clean)[0].numpy()
    assert np.abs(pixels[2] - 255 * np.clip(0.5 + times * change, 0, 1)).max() <= 1
    told = strip.locator("td").nth(3).inner_text()
    assert LABELS[first.answered_class] in told
    resisted = first.alerted or first.answered_class == first.true_class
    assert told.split("\n")[-1] == ("resisted" if resisted else "not resisted")


def copied(measured, copies: int, scenario: str) -> Evaluated:
    """Return the examples of one attack when a version is measured under so many names, twelve examples each."""
    attack = PLAN.attacks[0]
    shown = [
        each for each in measured.samples if (each.attack, each.scenario, each.defense) == (attack, "A", "digits@2")
    ]
    many = [replace(each, scenario=scenario) for each in (shown * 12)[:12]]
    names = [f"copy@{number}" for number in range(copies)]
    one = next(each for each in measured.report.defenses if each.name == "digits@2")
    report = replace(
        measured.report, defenses=tuple(replace(one, name=name) for name in names), rows=(), sweeps=(), checks=()
    )
    samples = tuple(replace(each, defense=name) for name in names for each in many)
    return replace(measured, report=report, samples=samples)


@pytest.mark.parametrize(("copies", "most"), [(1, 12), (5, 4), (13, 1), (40, 1)])
def test_the_more_defenses_the_fewer_examples_but_never_none(measured, copies, most):
    evaluated = copied(measured, copies, "A")
    (group,) = sample_groups(evaluated.report, evaluated.samples)
    assert len(group.strips) == most
    names = [f"copy@{number}" for number in range(copies)]
    assert all([each.defense.name for each in strip.answers] == names for strip in group.strips)
    assert not group.unshown


@pytest.mark.parametrize(("copies", "each", "unshown"), [(1, 8, 0), (3, 2, 0), (8, 1, 0), (13, 1, 5)])
def test_of_many_defenses_with_examples_of_their_own_the_first_are_shown(measured, copies, each, unshown):
    evaluated = copied(measured, copies, "B")
    (group,) = sample_groups(evaluated.report, evaluated.samples)
    shown = [f"copy@{number}" for number in range(copies - unshown) for _ in range(each)]
    assert [answer.defense.name for strip in group.strips for answer in strip.answers] == shown
    assert group.unshown == unshown
    told = re.findall(r"no room for those of (\d+) more", re.sub(r"<[^>]*>", "", render(evaluated)))
    assert told == ([str(unshown)] if unshown else [])


def test_names_are_text_and_never_markup(page, written):
    assert page.locator("img[onerror]").count() == 0
    assert page.locator("script").count() == 0
    text = page.locator("body").inner_text()
    assert HOSTILE in text
    assert "scans & co <2026>" in text
    assert COMMAND in text
    assert "<script" not in written.read_text(encoding="utf-8")


def test_tables_can_be_read_aloud(page):
    for table in page.locator("main table").all():
        assert table.locator("thead th:not([scope=col])").count() == 0
        assert table.locator("tbody th:not([scope])").count() == 0
        labelled = table.evaluate("e => Boolean(e.caption || e.closest('[role=region]').ariaLabel)")
        assert labelled
    ids = page.locator("[id]").evaluate_all("all => all.map(each => each.id)")
    assert len(ids) == len(set(ids))
    wanted = page.locator("[aria-labelledby]").evaluate_all(
        "all => all.flatMap(e => e.getAttribute('aria-labelledby').split(' '))"
    )
    assert set(wanted) <= set(ids)
    assert page.locator("nav a").evaluate_all("all => all.every(e => document.querySelector(e.getAttribute('href')))")


def test_lines_differ_in_more_than_their_colour():
    assert len(LINES) == len(MARKERS), "a line's colour and mark come again together, with another dash"
    assert len(LINES) * len(DASHES) >= 18


def test_an_evaluation_on_clean_images_alone_has_a_page(evaluated):
    text = render(Evaluated(clean_alone(evaluated), ()))
    assert 'id="clean"' in text
    assert all(f'id="{name}"' not in text for name in ("results", "curves", "sweeps", "generalisation", "samples"))
    assert "The attacks themselves were not checked." in text


def test_a_page_that_cannot_be_written_is_told(evaluated, tmp_path):
    with pytest.raises(OSError, match="nowhere"):
        write_page(Evaluated(clean_alone(evaluated), ()), tmp_path / "nowhere" / "page.html")


def test_the_json_reads_back_and_compared_with_itself_is_the_same(measured, tmp_path):
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps(measured.report.as_json()))
    read = load_report(path)
    assert read == replace(measured.report, defenses=read.defenses)
    compared = compare(read, measured.report)
    with_rates = [row for row in measured.report.rows if row.resisted is not None]
    assert len(compared.differences) == len(with_rates) + 2 * 4
    assert {each.difference for each in compared.differences} == {0}
    assert not compared.worse
    assert compared.only_first == compared.only_second == compared.notes == ()


def test_what_the_page_is_made_of_is_installed_with_the_package():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["service"]
    parts = [path for path in (ROOT / "service" / "evaluation_report").iterdir() if path.suffix in {".css", ".jinja"}]
    assert len(parts) == 5
    for path in (*parts, ROOT / "service" / "evaluation" / "published.csv"):
        assert any(path.relative_to(ROOT / "service").match(pattern) for pattern in declared), path
