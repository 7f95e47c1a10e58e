"""A published NIP defense studied from the command line: what is written, drawn and told, and what is refused."""

import json
import re
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from typer.testing import CliRunner

from defenses.attacks import attack, craft
from defenses.checkpoint import load_protected
from defenses.classifier import Classifier
from defenses.coophance import Regulator, RegulatorConfig
from defenses.detector import NoDetector
from defenses.nip import DefenseSuccess
from defenses.protected import ProtectedClassifier
from model_store import Store
from service.cli import app
from service.datasets import load_dataset
from service.evaluate import in_seeded_order
from service.nip_studies import StudyUnknown, StudyUnsuitable, check_suitable, known_studies

CPU = torch.device("cpu")
ATTACKS = ("fgsm:epsilon=24/255", "deepfool:steps=6")
STUDIES = ["influence", "tknc", "k", "layer", "eta", "neurons"]
FIT = ["--data", "digits", "--preset", "paper", "--candidates", "20", "--template", "class", "--attack", ATTACKS[0]]
FIT += ["--accuracy-loss", "0.02", "--amplitudes", "0.02,0.5", "--test-examples", "5", "--device", "cpu"]
QUICK = ["--data", "digits", *(word for text in ATTACKS for word in ("--attack", text)), "--limit", "20"]
QUICK += ["--seed", "5", "--device", "cpu"]
SVG = "{http://www.w3.org/2000/svg}"


def portcullis(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def chosen(*names: str) -> list[str]:
    return [word for name in names for word in ("--study", name)]


@pytest.fixture(scope="module")
def pool_store(digits_store, tmp_path_factory) -> Path:
    """A store with a classifier of digits and, version 2, a pool by the printed method; it is only read."""
    root = tmp_path_factory.mktemp("pool") / "store"
    shutil.copytree(digits_store, root)
    status, output = portcullis("fit", "nip", "digits", *FIT, "--store", root)
    assert status == 0, output
    return root


@pytest.fixture(scope="module")
def written(pool_store, tmp_path_factory) -> tuple[dict, Path, str]:
    """All studies: the JSON in the file, the folder of the plots, and what was shown."""
    folder = tmp_path_factory.mktemp("studies")
    arguments = [*QUICK, *chosen(*reversed(STUDIES)), "--store", pool_store]
    arguments += ["--output", folder / "studies.json", "--plots", folder / "plots"]
    status, output = portcullis("evaluate", "digits@2", *arguments)
    assert status == 0, output
    return json.loads((folder / "studies.json").read_text()), folder / "plots", re.sub(r"\s+", " ", output)


@pytest.fixture(scope="module")
def defended(pool_store) -> ProtectedClassifier:
    classifier = Classifier.load(pool_store / "models/digits/1/model.onnx").eval()
    return load_protected(classifier, pool_store / "models/digits/2/checkpoint")


def test_the_report_says_what_was_studied_and_how(written, pool_store):
    report, _, _ = written
    manifest = Store.open(pool_store / "models").manifest("digits", 2)
    assert (report["model"], report["version"], report["candidates"]) == ("digits", 2, 20)
    assert report["amplitude"] == manifest.options["strength"]["amplitude"]
    assert report["layer"] == manifest.layers["head"]
    assert report["fitted"] == manifest.options["plan"]
    assert report["accuracy_loss"] == 0.02
    assert report["validation_images"] == manifest.data.counts["validation"]
    assert report["plan"] == {"studies": STUDIES, "attacks": list(ATTACKS), "limit": 20, "seed": 5}
    assert report["dataset"]["digest"] == manifest.data.digest
    assert list(report["studies"]) == list(report["seconds"]) == STUDIES
    assert [each["attack"] for each in report["attacks"]] == list(ATTACKS)
    for each in report["attacks"]:
        assert 5 < each["fooling"] <= each["attempted"] == 20
        assert each["distortion_l2"] > 0
    assert report["command"].split()[0] == "portcullis"


def test_the_own_setting_made_anew_is_the_version_that_is_published(written, defended, pool_store):
    """The pool is made of the same images by the same plan, so it answers like the published one."""
    report, _, _ = written
    manifest = Store.open(pool_store / "models").manifest("digits", 2)
    dataset = load_dataset(["digits"], manifest.input, labels=manifest.labels, split_seed=0)
    images, targets = in_seeded_order(dataset.test, 5)
    success = DefenseSuccess.of(defended, CPU, 5)
    clean = success.clean(images[:20], targets[:20], "nearest").accuracy
    rates = {}
    for text in ATTACKS:
        examples = craft(
            attack(text), defended.classifier, images, targets, limit=20, device=CPU, seed=5, progress=lambda *_: None
        )
        rates[text] = success.attacked(examples, "nearest")[0].success
    studies = report["studies"]
    own = [row["outcome"] for name in ("k", "layer", "eta") for row in studies[name]["rows"] if row["own"]]
    own = [outcome for outcome in own if not outcome["recalibrated"]]
    assert len(own) == 4, "of k1 and k2, of the layer, and of eta"
    own.append(studies["neurons"]["rows"][0]["outcome"])
    for outcome in own:
        assert outcome["amplitude"] == report["amplitude"]
        assert outcome["clean"]["rate"] == clean
        assert {each["attack"]: each["right"]["rate"] for each in outcome["attacks"]} == rates
    for row in studies["tknc"]["rows"]:
        if row["direction"] == "nearest":
            assert row["right"]["rate"] == (clean if row["attack"] is None else rates[row["attack"]])


def test_every_share_has_its_count_and_interval(written):
    report, _, _ = written
    shares = []

    def gather(values: object) -> None:
        if isinstance(values, dict) and "counted" in values:
            shares.append(values)
        for each in values.values() if isinstance(values, dict) else values if isinstance(values, list) else ():
            gather(each)

    gather(report["studies"])
    assert len(shares) > 200
    for share in shares:
        assert share["rate"] == share["counted"] / share["images"]
        assert 0 <= share["interval"][0] <= share["rate"] <= share["interval"][1] <= 1


def test_each_study_is_drawn_as_a_file_that_stands_alone(written):
    report, folder, _ = written
    assert sorted(path.name for path in folder.iterdir()) == sorted(f"{name}.svg" for name in STUDIES)
    for name in STUDIES:
        text = (folder / f"{name}.svg").read_text()
        assert "var(" not in text, "there is no page around it that has colours"
        assert "#0000" not in text, "no colour is left that stands for another"
        root = ElementTree.fromstring(text)
        assert [child.tag for child in root][:3] == [f"{SVG}title", f"{SVG}desc", f"{SVG}rect"]
        assert root.attrib["width"].endswith("pt")
        shown = " ".join(element.text or "" for element in root.iter(f"{SVG}text"))
        described = root.findtext(f"{SVG}desc")
        for text in ATTACKS:
            assert text in shown
            assert text in described
    layers = {row["setting"]["layer"] for row in report["studies"]["layer"]["rows"]}
    drawn = ElementTree.parse(folder / "layer.svg").getroot()
    assert len(layers) == 6
    names = [element.text for element in drawn.iter(f"{SVG}text")]
    assert all(any((name or "").startswith(layer) for name in names) for layer in layers)


def test_the_tables_tell_the_same(written):
    report, _, shown = written
    for title in ("influence of the neurons", "top-k neuron consistency, k = 5", "front and tail neurons"):
        assert title in shown
    assert f"Layer {report['layer']}, 20 candidates, amplitude {report['amplitude']:g}." in shown
    every = next(each for each in report["studies"]["tknc"]["correlations"] if each["attack"] is None)
    assert f"over the 10 rows of all attacks it is {every['coefficient']:.2f}" in shown
    for row in report["studies"]["tknc"]["rows"]:
        assert f"{100 * row['right']['rate']:.1f} %" in shown
        assert f"{row['consistency']:.3f}" in shown


def test_one_study_alone_finds_the_same_and_draws_nothing(written, pool_store):
    arguments = [*QUICK, *chosen("tknc"), "--store", pool_store, "--json"]
    status, output = portcullis("evaluate", "digits@2", *arguments)
    assert status == 0, output
    alone = json.loads(output)
    assert list(alone["studies"]) == ["tknc"]
    assert alone["studies"]["tknc"] == written[0]["studies"]["tknc"]


def test_an_attack_that_fools_nothing_leaves_plots_that_say_so(pool_store, tmp_path):
    arguments = ["--data", "digits", "--attack", "fgsm:epsilon=1/100000", "--limit", "10", "--store", pool_store]
    studies = chosen("influence", "tknc", "eta", "neurons")
    status, output = portcullis("evaluate", "digits@2", *arguments, *studies, "--json", "--plots", tmp_path)
    assert status == 0, output
    report = json.loads(output)
    assert [each["fooling"] for each in report["attacks"]] == [0]
    for row in (*report["studies"]["eta"]["rows"], *report["studies"]["neurons"]["rows"]):
        (told,) = row["outcome"]["attacks"]
        assert told["right"] == {"images": 0, "counted": 0, "rate": None, "interval": None}
        assert row["outcome"]["clean"]["images"] == 10
    for name in ("influence", "tknc"):
        assert "No attack has an example" in ElementTree.parse(tmp_path / f"{name}.svg").getroot().findtext(
            f"{SVG}desc"
        )
    text = re.sub(r"\s+", " ", portcullis("evaluate", "digits@2", *arguments, *studies)[1])
    assert "0/10" in text


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["digits@1", *chosen("k")], "--study is for a defense of kind nip, and digits@1 is of kind classifier"),
        (["digits@2", *chosen("tknc", "depth")], "of influence, tknc, k, layer, eta, neurons, got 'depth'"),
        (["digits@2", "--plots", "there"], "--plots draws studies: name one or more with --study"),
        (["digits@2", *chosen("k"), "--controls"], "are for a measurement, and --study asks for another"),
        (["digits@2", *chosen("k"), "--clean"], "are for a measurement, and --study asks for another"),
        (["digits@2", *chosen("k"), "--url", "http://127.0.0.1:9"], "are for a measurement, and --study"),
        (["digits@2", *chosen("k"), "--plots", "no/such/folder"], "to make folder in"),
        (["digits@2", *chosen("k"), "--attack", "fgms"], "got 'fgms'"),
    ],
)
def test_what_cannot_be_studied_is_refused_with_the_reason(pool_store, arguments, told):
    status, output = portcullis("evaluate", *arguments, "--data", "digits", "--store", pool_store)
    assert status == 1
    assert told in re.sub(r"\s+", " ", output)


def test_plots_do_not_go_into_a_file(pool_store, tmp_path):
    file = tmp_path / "plots"
    file.write_text("mine")
    arguments = [*chosen("k"), "--data", "digits", "--store", pool_store, "--plots", file]
    status, output = portcullis("evaluate", "digits@2", *arguments)
    assert status == 1
    assert "Expected a folder to put plots into, got the file" in re.sub(r"\s+", " ", output)
    assert file.read_text() == "mine"


def test_a_defense_of_another_kind_has_no_studies(store):
    status, output = portcullis("evaluate", "digits@2", *chosen("k"), "--data", "digits", "--store", store)
    assert status == 1
    assert "--study is for a defense of kind nip, and digits@2 is of kind coophance" in re.sub(r"\s+", " ", output)


def test_a_version_without_a_pool_or_a_plan_is_refused_by_name(defended, pool_store):
    manifest = Store.open(pool_store / "models").manifest("digits", 2)
    assert check_suitable(manifest, defended) is defended.purifier
    regulator = Regulator(RegulatorConfig((1, 32, 32), channels=(4, 4), skip_channels=(2, 2)))
    other = ProtectedClassifier(defended.classifier, regulator, NoDetector())
    with pytest.raises(StudyUnsuitable, match="digits@2 has another purifier, Regulator"):
        check_suitable(manifest, other)
    with pytest.raises(StudyUnsuitable, match="digits@2 has no plan on record"):
        check_suitable(manifest.model_copy(update={"options": {}}), defended)


def test_studies_are_known_by_name_each_once_in_their_order():
    assert known_studies(["eta", "influence", "eta"]) == ("influence", "eta")
    with pytest.raises(StudyUnknown, match="got 'K'"):
        known_studies(["eta", "K"])
