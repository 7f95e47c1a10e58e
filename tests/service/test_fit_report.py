"""The report of a fit: what it tells of a defense that was really fitted, as a page and as JSON."""

import base64
import io
import json
import math
import re
import tomllib
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn

from defenses.calibration import CalibrationTooSmall, calibrate
from defenses.classifier import Classifier
from defenses.coophance import FitPlan, InspectorPlan, RegulatorPlan, fit_coophance
from defenses.onnx_import import canonicalise
from defenses.onnx_trace import export_classifier
from defenses.splits import LabelledImages, Splits
from defenses.stages import Stages
from model_store import DataRecord, Draft, FalsePositiveRate, InputSpec, Parent, Store
from service.fit_report import JSON_FILE, PAGE_FILE, DraftIncomplete, write_report
from service.fit_report.document import BINS
from service.fit_report.guarantee import guarantee_of
from service.fit_report.samples import look_at
from service.libraries import library_versions
from service.report_parts.pictures import MOST_SIDE, difference_picture, picture

CPU = torch.device("cpu")
HOSTILE = '<script>alert("1")</script>'
LABELS = ("zero", HOSTILE, "$two", "three & more", "four", "five", "six", "seven", "eight", "nine")
ATTACK, WEAK = "fgsm:epsilon=24/255", "fgsm:epsilon=0"
PLAN = FitPlan(
    attacks=(ATTACK, WEAK),
    examples=300,
    validation_examples=100,
    test_examples=150,
    regulator=RegulatorPlan(channels=(8, 16), skip_channels=(4, 8), epochs=3, batch_size=64, flip=False),
    inspector=InspectorPlan(most_features=256),
)


class Page(HTMLParser):
    """The elements of a page with their attributes, and the text within each table's cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.text = ""
        self._table = ""
        self._cell = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.elements.append((tag, given))
        if tag == "table":
            self._table = given.get("id", "")
            self.tables[self._table] = []
        elif tag == "tr":
            self.tables[self._table].append([])
        elif tag in {"td", "th"}:
            self.tables[self._table][-1].append("")
            self._cell = True

    def handle_endtag(self, tag):
        if tag in {"td", "th"}:
            self._cell = False

    def handle_data(self, data):
        self.text += data
        if self._cell:
            self.tables[self._table][-1][-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Small tensors on one thread: the same rounding everywhere."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def splits() -> Splits:
    """Scikit-learn's digits at 16x16, in a seeded order."""
    digits = load_digits()
    images = torch.from_numpy(np.kron(digits.images / 16 * 255, np.ones((2, 2))).astype(np.uint8))[:, None]
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, targets = images[order], torch.from_numpy(digits.target)[order].long()
    return Splits(*map(LabelledImages, images.split([800, 197, 400, 400]), targets.split([800, 197, 400, 400])))


@pytest.fixture(scope="module")
def classifier(splits) -> Classifier:
    """A small classifier of digits, trained for real."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(
            *(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU()),
            *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 10)),
        )
        optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)
        x = splits.fit.images.float() / 255
        for _ in range(5):
            for rows in torch.randperm(len(x)).split(50):
                loss = F.cross_entropy(network(x[rows]), splits.fit.targets[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return Classifier(canonicalise(export_classifier(network.eval(), (1, 16, 16)))).eval()


@pytest.fixture(scope="module")
def fitted(classifier, splits, tmp_path_factory):
    """CoopHANCE around it; of its two attacks one fools nothing."""
    return fit_coophance(
        classifier,
        splits,
        PLAN,
        stages=Stages(tmp_path_factory.mktemp("stages")),
        device=CPU,
        progress=lambda *_: None,
    )


@pytest.fixture(scope="module")
def reused(classifier, splits, fitted, tmp_path_factory):
    """The same Regulator in a defense with a threshold for each class."""
    return fit_coophance(
        classifier,
        splits,
        replace(
            PLAN,
            attacks=(ATTACK,),
            budget=0.1,
            inspector=InspectorPlan(most_features=256, inverse_penalty=1e-4, fusion=False, thresholds="class"),
        ),
        stages=Stages(tmp_path_factory.mktemp("stages")),
        regulator=fitted.protected.purifier,
        device=CPU,
        progress=lambda *_: None,
    )


def draft_of(fitted, splits, plan=PLAN, **changes) -> Draft:
    counts = {name: len(part.targets) for name, part in splits._asdict().items()}
    threshold = fitted.protected.threshold
    given = {
        "kind": "coophance",
        "input": InputSpec(shape=(1, 16, 16), mode="L"),
        "labels": LABELS,
        "parent": Parent(name="digits", version=3, digest="ab" * 32),
        "threshold": None if threshold.ndim else float(threshold),
        "false_positive_rate": FalsePositiveRate(
            budget=plan.budget,
            calibrated_on=counts["calibration"],
            realised=fitted.clean.false_positive_rate,
            evaluated_on=counts["test"],
        ),
        "data": DataRecord(name="scans & co <2026>", digest="cd" * 32, split_seed=0, counts=counts),
        "options": {"plan": json.loads(json.dumps(asdict(plan))), "fit": "f17", "regulator_version": "scans-1x16x16@1"},
        "libraries": library_versions(),
        "seed": plan.seed,
        "command": 'portcullis fit coophance digits --data "my scans"',
    }
    return Draft(**{**given, **changes})


def strict(text: str):
    """Read JSON as the standard has it, without NaN and infinity."""

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def numbers(tree) -> set[float]:
    if isinstance(tree, dict):
        return set().union(*map(numbers, tree.values()))
    if isinstance(tree, list):
        return set().union(*map(numbers, tree))
    return {float(tree)} if isinstance(tree, int | float) and not isinstance(tree, bool) else set()


@pytest.fixture(scope="module")
def written(fitted, splits, tmp_path_factory):
    """The folder of the fit's report."""
    folder = tmp_path_factory.mktemp("payload") / "defense"
    write_report(fitted, folder, name="digits", draft=draft_of(fitted, splits), device=CPU)
    return folder


@pytest.fixture(scope="module")
def report(written):
    """The report as JSON."""
    return strict((written / JSON_FILE).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def page(written) -> Page:
    """The report as a page."""
    return Page((written / PAGE_FILE).read_text(encoding="utf-8"))


def test_the_json_holds_what_was_measured(report, fitted):
    assert report["clean"] == json.loads(json.dumps(asdict(fitted.clean)))
    rows = [row for attack in report["attacks"] for row in attack["rows"]]
    assert rows == json.loads(json.dumps([asdict(row) for row in fitted.attacks]))
    assert report["selection"] == json.loads(json.dumps(fitted.selection.as_json()))
    assert report["threshold"] == pytest.approx(float(fitted.protected.threshold))
    assert report["regulator"]["curves"] == json.loads(json.dumps(fitted.trained.curves))
    training = report["regulator"]["training"]
    assert training["epochs"] == training["steps"] * 64 / 800
    assert training["epochs"] == pytest.approx(3, abs=0.05)
    assert report["summary"]["attacks_measured"] == 1
    assert report["summary"]["attacks_resisted"] == fitted.metrics[f"resistance_rate.{ATTACK}"]
    assert report["classifier"]["labels"] == list(LABELS)
    assert report["data"]["counts"] == {"fit": 800, "validation": 197, "calibration": 400, "test": 400}
    assert report["hardware"]["cpus"] >= 1
    assert report["seed"] == 0
    assert report["fit"] == "f17"


def test_the_scores_that_are_shown_are_those_that_were_measured(report, fitted):
    attack, row = report["attacks"][0], fitted.attacks[0]
    histogram = attack["histogram"]
    left, corrected, clean = (sum(histogram[kind]) for kind in ("left", "corrected", "clean"))
    assert clean == 400
    assert left + corrected == row.fooling > 50
    assert corrected / row.fooling == row.corrected
    look = look_at(
        fitted.protected, fitted.test_examples[0], LABELS, fitted.calibration_scores, device=CPU, seed=PLAN.seed
    )
    assert float((look.scores > fitted.protected.threshold).double().mean()) == row.alerted
    assert len(histogram["edges"]) == BINS + 1
    assert sorted(histogram["edges"]) == histogram["edges"]
    # The detector's curve passes through the share that is alerted: more is at equal false positives at best.
    assert attack["detector_curve"][0] == [0, 0]
    realised = fitted.clean.false_positive_rate
    with_fewer = max(share for rate, share in attack["detector_curve"] if rate < realised)
    at_most = max(share for rate, share in attack["detector_curve"] if rate <= realised)
    assert with_fewer - 0.02 <= row.alerted <= at_most + 0.02


def test_the_samples_are_the_first_that_fool_the_classifier(report, fitted):
    examples = fitted.test_examples[0]
    fooled = examples.fooled.nonzero().flatten()[:6]
    samples = report["attacks"][0]["samples"]
    assert [sample["row"] for sample in samples] == examples.rows[fooled].tolist()
    assert [sample["true"] for sample in samples] == [LABELS[y] for y in examples.y[fooled]]
    threshold, calibrated = float(fitted.protected.threshold), fitted.calibration_scores
    for i, sample in zip(fooled, samples, strict=True):
        assert sample["undefended"] != sample["true"]
        assert sample["alert"] == (sample["score"] > threshold)
        assert sample["resisted"] == (sample["alert"] or sample["answer"] == sample["true"])
        assert sample["p_value"] == pytest.approx((1 + int((calibrated >= sample["score"]).sum())) / 401)
        distance = (examples.x_adv[i] - examples.x[i].float() / 255).norm()
        assert sample["distortion_l2"] == pytest.approx(float(distance), rel=1e-5)


def test_every_number_of_the_page_is_one_of_the_json(page, report):
    known = numbers(report)
    shown = [float(element["value"]) for element in page.all("data")]
    assert len(shown) > 150
    assert set(shown) <= known


def test_the_tables_tell_the_figures(page, report, fitted):
    heading, *rows = page.tables["rates"]
    assert heading[7] == "resisted"
    assert len(rows) == 4
    row = fitted.attacks[0]
    assert rows[0][:4] == [ATTACK, "as crafted", "150", str(row.fooling)]
    assert rows[0][7] == f"{100 * row.resisted:.1f} %"
    assert rows[2][3:] == ["0", "-", "-", "-", "-", "-", "-", "-"], "an attack that fools nothing has no rates"
    assert len(page.tables["selection"]) == 1 + len(fitted.selection.tried)
    assert [cell for cells in page.tables["selection"] for cell in cells if "chosen" in cell]
    assert [cells[0] for cells in page.tables["classes"][1:]] == list(LABELS)
    assert sum(int(cells[2]) for cells in page.tables["classes"][1:]) == sum(fitted.inspector.positives)
    sigma = fitted.trained.fluctuations[0].standard_deviation
    assert page.tables["confusion"][1] == [
        "after down-sampling 1",
        "8",
        f"{fitted.trained.fluctuations[0].mean.abs().mean():.4f}",
        f"{sigma.mean():.4f}",
        f"{sigma.max():.4f}",
    ]
    assert dict(cells for cells in page.tables["plan"])["regulator.batch_size"] == "64"
    stages = {cells[0]: cells for cells in page.tables["stages"][1:]}
    assert stages["Regulator, the last 40 %"][3] == str(64 * round(0.4 * report["regulator"]["training"]["steps"]))
    assert report["summary"]["seconds"] == pytest.approx(sum(fitted.seconds.values()))


def test_the_page_stands_alone_and_runs_nothing(page, written):
    tags = {tag for tag, _ in page.elements}
    assert tags.isdisjoint({"script", "link", "iframe", "object", "embed", "form", "base", "foreignobject"})
    text = (written / PAGE_FILE).read_text(encoding="utf-8")
    assert "@import" not in text
    for _, attributes in page.elements:
        for name, value in attributes.items():
            assert not name.startswith("on"), name
            if name != "xmlns" and not (value or "").startswith("data:image/png;base64,"):
                assert "//" not in (value or ""), (name, value)
            if name in {"href", "src"}:
                assert value.startswith(("#", "data:image/png;base64,"))
    policy = next(each["content"] for each in page.all("meta") if "http-equiv" in each)
    assert "default-src 'none'" in policy


def test_names_are_text_and_never_markup(page, written):
    assert HOSTILE in page.text
    assert "scans & co <2026>" in page.text
    assert '--data "my scans"' in page.text
    assert "<script" not in (written / PAGE_FILE).read_text(encoding="utf-8")


def test_references_within_the_page_are_whole(page):
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    wanted = set()
    for _, attributes in page.elements:
        wanted |= set((attributes.get("aria-labelledby") or "").split())
        wanted |= {value[1:] for value in (attributes.get("href"),) if value}
        wanted |= {name for value in attributes.values() for name in re.findall(r"url\(#([^)]*)\)", value or "")}
    assert wanted <= set(ids)


def test_figures_are_well_formed_and_say_what_they_show(written, fitted):
    text = (written / PAGE_FILE).read_text(encoding="utf-8")
    figures = [ElementTree.fromstring(each) for each in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]
    # Resistance, detector, loss, selection, and the scores of the one attack that fools anything.
    assert len(figures) == 5
    svg = "{http://www.w3.org/2000/svg}"
    for figure in figures:
        assert figure.attrib["role"] == "img"
        assert [figure[i].tag for i in (0, 1)] == [f"{svg}title", f"{svg}desc"]
        assert all(figure[i].text for i in (0, 1))
        assert figure.find(f".//{svg}path") is not None
        colours = {
            colour for each in figure.iter() for colour in re.findall(r"#[0-9a-f]{6}\b", each.attrib.get("style", ""))
        }
        assert not colours, "a colour of its own would not follow the page into the dark"
    words = " ".join(each.text or "" for each in figures[0].iter(f"{svg}text"))
    assert f"{ATTACK}  (AUC {fitted.attacks[0].auc:.3f})" in words
    defined = set(re.findall(r"(--[a-z0-9-]+):", text))
    assert set(re.findall(r"var\((--[a-z0-9-]+)\)", text)) <= defined


def test_the_pictures_are_the_images(page, fitted):
    shown = page.all("img")
    assert len(shown) == 5 * 6
    assert all(each["alt"] for each in shown)
    examples = fitted.test_examples[0]
    first = int(examples.fooled.nonzero()[0])
    pixels = []
    for each in shown[:5]:
        with Image.open(io.BytesIO(base64.b64decode(each["src"].partition(",")[2]))) as image:
            assert (image.format, image.size, image.mode) == ("PNG", (16, 16), "L")
            pixels.append(np.array(image).astype(int))
    clean, adversarial, _, perturbation, _ = pixels
    assert (clean == examples.x[first, 0].numpy()).all()
    assert np.abs(adversarial - 255 * examples.x_adv[first, 0].numpy()).max() <= 0.5
    # Middle grey is no change, and brighter is more.
    change = examples.x_adv[first, 0].numpy() - examples.x[first, 0].numpy() / 255
    assert np.abs(perturbation - 127.5)[change == 0].max() <= 1
    assert perturbation[change > 0.05].min() > 150


def test_large_pictures_are_reduced_and_small_changes_made_visible():
    image = torch.rand(3, 96, 2 * MOST_SIDE, generator=torch.Generator().manual_seed(0))
    with Image.open(io.BytesIO(base64.b64decode(picture(image).partition(",")[2]))) as shown:
        assert shown.size == (MOST_SIDE, 48)
        assert shown.mode == "RGB"
        coarse = image.reshape(3, 48, 2, MOST_SIDE, 2).mean((2, 4))
        assert np.abs(np.array(shown) / 255 - coarse.permute(1, 2, 0).numpy()).max() < 0.01
    change = 0.004 * torch.ones(1, 8, 8)
    uri, times = difference_picture(change)
    assert times == 100
    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as shown:
        assert np.unique(np.array(shown)).tolist() == [round(255 * 0.9)]
    assert difference_picture(torch.zeros(1, 8, 8))[1] == 1000
    assert difference_picture(torch.ones(1, 8, 8))[1] == 1


def test_an_attack_that_fools_nothing_is_told(page, report):
    weak = report["attacks"][1]
    assert weak["samples"] == weak["detector_curve"] == []
    assert f"No example of {WEAK} fools the classifier, so nothing was measured of it." in report["findings"]
    assert report["findings"][-1] in page.text


def test_the_same_fit_is_reported_the_same_and_nothing_is_disturbed(report, fitted, splits, tmp_path):
    torch.manual_seed(1)
    before, settings = torch.get_rng_state(), dict(matplotlib.rcParams)
    weights = [parameter.clone() for parameter in fitted.protected.parameters()]
    write_report(fitted, tmp_path, name="digits", draft=draft_of(fitted, splits), device=CPU)
    assert torch.equal(torch.get_rng_state(), before)
    assert dict(matplotlib.rcParams) == settings
    assert all(map(torch.equal, fitted.protected.parameters(), weights))
    assert not fitted.protected.training
    again = strict((tmp_path / JSON_FILE).read_text(encoding="utf-8"))
    assert {**again, "written": ""} == {**report, "written": ""}


def test_the_report_can_be_published(written, fitted, splits, tmp_path):
    manifest = Store.open(tmp_path).publish("digits", draft_of(fitted, splits), written)
    assert set(manifest.files) == {JSON_FILE, PAGE_FILE}


def test_a_regulator_used_again_has_no_curves_and_each_class_its_threshold(reused, splits, tmp_path):
    plan = replace(PLAN, attacks=(ATTACK,), budget=0.1)
    write_report(reused, tmp_path, name="digits", draft=draft_of(reused, splits, plan), device=CPU)
    report = strict((tmp_path / JSON_FILE).read_text(encoding="utf-8"))
    assert report["regulator"]["reused"]
    assert report["regulator"]["training"] is None
    assert report["regulator"]["curves"] == {}
    assert report["threshold"] == pytest.approx(reused.protected.threshold.tolist())
    assert len(report["threshold"]) == 10
    assert report["guarantee"]["interval"] is None
    assert report["attacks"][0]["histogram"]["threshold"] == 0
    look = look_at(
        reused.protected, reused.test_examples[0], LABELS, reused.calibration_scores, device=CPU, seed=PLAN.seed
    )
    assert float((look.scores > 0).double().mean()) == reused.attacks[0].alerted
    page = Page((tmp_path / PAGE_FILE).read_text(encoding="utf-8"))
    assert "scans-1x16x16@1" in page.text
    assert "is used again: nothing was trained here" in page.text
    assert "of each class is the quantile" in page.text
    assert "loss-title" not in {element.get("id") for _, element in page.elements}
    assert len(page.all("svg")) == 4


def test_a_loss_that_is_not_finite_is_null_and_told(fitted, splits, tmp_path):
    curves = {"sample model": [(20, math.inf), (40, 0.5)], "regulator": [(20, math.nan), (40, math.nan)]}
    broken = replace(fitted, trained=replace(fitted.trained, curves=curves))
    write_report(broken, tmp_path, name="digits", draft=draft_of(fitted, splits), device=CPU)
    report = strict((tmp_path / JSON_FILE).read_text(encoding="utf-8"))
    assert report["regulator"]["curves"] == {
        "sample model": [[20, None], [40, 0.5]],
        "regulator": [[20, None], [40, None]],
    }
    told = [finding for finding in report["findings"] if "not finite" in finding]
    assert len(told) == 2


def test_what_deserves_a_second_look_is_told(fitted, splits, tmp_path):
    selection = replace(fitted.selection, within=False, undefended_accuracy=fitted.selection.chosen.accuracy + 0.1)
    clean = replace(fitted.clean, false_positive_rate=0.25)
    row = replace(fitted.attacks[0], resisted=0.4, resisted_interval=(0.3, 0.5), fooling=20)
    changed = replace(fitted, selection=selection, clean=clean, attacks=(row, *fitted.attacks[1:]))
    write_report(changed, tmp_path, name="digits", draft=draft_of(fitted, splits), device=CPU)
    told = " ".join(strict((tmp_path / JSON_FILE).read_text(encoding="utf-8"))["findings"])
    assert "costs 10.0 points of accuracy on the validation images, more than the 4 allowed" in told
    assert "25.00 % are alerted, more than in 97.5 % of all calibrations" in told
    assert f"Only 20 examples of {ATTACK} fool the classifier" in told
    assert "20 points wide" in told
    assert f"Less than half of what {ATTACK} makes is resisted." in told


def test_a_fit_for_which_nothing_was_chosen_by_attacks_says_so(fitted, splits, tmp_path):
    only = replace(fitted.selection.chosen, corrected=None)
    selection = replace(fitted.selection, chosen=only, tried=(only,))
    changed = replace(fitted, selection=selection, inspector=replace(fitted.inspector, areas={}))
    write_report(changed, tmp_path, name="digits", draft=draft_of(fitted, splits), device=CPU)
    report = strict((tmp_path / JSON_FILE).read_text(encoding="utf-8"))
    assert (report["selection"]["chosen"]["corrected"], report["inspector"]["areas"]) == (None, [])
    page = Page((tmp_path / PAGE_FILE).read_text(encoding="utf-8"))
    assert "no attacked validation image fools the classifier, so that nothing is told of how it does" in page.text
    shown = {element.get("id") for _, element in page.elements}
    assert "loss-title" in shown
    assert not shown & {"selection-title", "penalties"}


def test_a_draft_of_something_else_is_refused_by_name(fitted, splits, tmp_path):
    draft = draft_of(fitted, splits, parent=None, options={})
    with pytest.raises(DraftIncomplete, match=r"got one without parent, options\.plan\.") as refused:
        write_report(fitted, tmp_path / "new", name="digits", draft=draft, device=CPU)
    assert refused.value.missing == ("parent", "options.plan")
    assert not (tmp_path / "new").exists()


def test_a_folder_that_cannot_be_written_is_told(fitted, splits, tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(FileExistsError, match="taken"):
        write_report(fitted, tmp_path / "taken", name="digits", draft=draft_of(fitted, splits), device=CPU)


def test_what_the_page_is_made_of_is_installed_with_the_package():
    root = Path(__file__).parents[2]
    declared = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["service"]
    folders = (root / "service" / "fit_report", root / "service" / "report_parts")
    parts = [path for folder in folders for path in folder.iterdir() if path.suffix in {".css", ".jinja"}]
    assert len(parts) == 3
    for path in parts:
        assert any(path.relative_to(root / "service").match(pattern) for pattern in declared), path


def test_what_calibration_promises_is_what_calibrations_keep():
    promise = guarantee_of(0.05, calibrated_on=150, measured_on=200, per_class=False)
    random = np.random.default_rng(0)
    realised = []
    for _ in range(3000):
        scores = torch.from_numpy(random.standard_normal(350))
        realised.append(float((scores[150:] > calibrate(scores[:150], 0.05)).double().mean()))
    assert promise.expected <= 0.05
    assert np.mean(realised) == pytest.approx(promise.expected, abs=0.002)
    assert np.std(realised) == pytest.approx(promise.standard_deviation, rel=0.05)
    low, high = promise.interval
    assert 0.94 < np.mean([low <= rate <= high for rate in realised]) < 0.98
    with pytest.raises(CalibrationTooSmall):
        guarantee_of(0.05, calibrated_on=10, measured_on=200, per_class=False)
