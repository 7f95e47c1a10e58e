"""Attackers who are told answers alone: of a gateway, image by image, and of a whole defense through a substitute."""

import json
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from defenses.attacks import ATTACKS, attack
from defenses.attacks.shards import ExampleCache
from defenses.baselines.additive_noise import AdditiveNoise
from defenses.detector import NoDetector
from defenses.evaluation import plan as plans
from defenses.evaluation import sanity
from defenses.evaluation.plan import EvaluationPlan, suits
from defenses.evaluation.run import Evaluation, EvaluationResult
from defenses.evaluation.substitutes import QueryImages
from defenses.nip import substitute_training
from defenses.nip.substitute import ANSWERS, TooFewImages
from defenses.nip.substitute_training import TRAINING
from defenses.protected import ProtectedClassifier
from model_store import InputSpec, Store
from service import evaluate
from service.cli import app
from service.client import GatewayRefused, Served, Told
from service.datasets import Dataset, load_dataset
from service.defended import load_defended
from service.evaluate import Measured, PatientClient, Report, in_seeded_order, search
from service.evaluation.subjects import load_subjects, undefended
from service.http_victim import HttpExamples
from service.register import Declaration, register
from service.tables import report_table

pytestmark = pytest.mark.long

CPU = torch.device("cpu")
SPEC = InputSpec(shape=(1, 16, 16), mode="L", resize="bilinear")
LID = ("--attack", "fgsm:epsilon=48/255", "--examples", "80", "--references", "60", "--neighbors", "10")
UNIFORM, WALK = "auna:epsilon=160/255,repeats=10", "boundary:steps=20"
SEARCHES = ("--crafted-on", "gateway", "--attack", UNIFORM, "--attack", WALK, "--limit", "3", "--seed", "3")
FGSM, PGD = "fgsm:epsilon=64/255", "pgd:epsilon=64/255,step_size=16/255,steps=6"
PLAN = EvaluationPlan(
    attacks=(FGSM, PGD, UNIFORM),
    scenarios=("B", "transfer"),
    limit=30,
    samples=2,
    queries=200,
    noise_seeds=2,
    lottery=0,
    checks=False,
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
    return load_dataset(["digits"], SPEC, labels=None, split_seed=0)


def trained(dataset: Dataset) -> nn.Module:
    """A small classifier of digits."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(
            *(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(256, 10)),
        )
        optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
        x, y = torch.from_numpy(dataset.fit.images).float() / 255, torch.from_numpy(dataset.fit.targets)
        for _ in range(4):
            for rows in torch.randperm(len(x)).split(50):
                loss = nn.functional.cross_entropy(network(x[rows]), y[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return network.eval()


@pytest.fixture(scope="module")
def attacked_store(dataset, tmp_path_factory) -> Path:
    """A store of digits whose version 2 detects by LID and serves; it is only read."""
    root = tmp_path_factory.mktemp("blind") / "store"
    declared = Declaration(shape=SPEC.shape, resize="bilinear", labels=dataset.labels)
    register(Store.open(root / "models"), "digits", trained(dataset), declared, command="test")
    arguments = ["fit", "baseline", "digits", "--data", "digits", "--method", "lid", *LID, "--store", str(root)]
    result = CliRunner().invoke(app, [*arguments, "--promote"])
    assert result.exit_code == 0, result.output
    return root


def evaluated(store: Path, *arguments: object) -> tuple[int, str]:
    given = ["evaluate", "digits", "--data", "digits", "--store", store, *arguments]
    result = CliRunner().invoke(app, [str(each) for each in given])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def told(output: str) -> str:
    return re.sub(r"\s+", " ", output)


def quietly(*_: object) -> None:
    pass


def test_a_gateway_is_attacked_by_its_answers_alone(serve, attacked_store, dataset):
    with serve(store=attacked_store, models="digits") as server:
        status, output = evaluated(attacked_store, "--url", server.url, *SEARCHES, "--json")
        assert status == 0, output
        with closing(PatientClient(server.url)) as client:
            plan = EvaluationPlan((UNIFORM, WALK), limit=3, seed=3)
            found = search(client, "digits", 10, dataset.test, plan, progress=quietly)
        status, crafted = evaluated(attacked_store, "--url", server.url, "--attack", FGSM, "--limit", "3", "--json")
        assert status == 0, crafted
    report = json.loads(output)
    assert (report["model"], report["version"], report["mode"], report["waits"]) == ("digits", "2", "flag", 0)
    assert (report["clean"]["images"], report["attacks"]) == (3, [])
    _, protected = load_defended(Store.open(attacked_store / "models"), "digits", 2)
    for row, examples in zip(report["searches"], found, strict=True):
        # What the same search finds once more is what was reported, and what the defense says of it.
        with torch.no_grad():
            answered = protected(examples.x_adv.float() / 255)
        won = (answered.logits.argmax(1) != examples.y) & ~answered.alerts
        assert torch.equal(won, examples.fooled)
        assert (row["attempted"], row["successes"]) == (3, int(won.sum()))
        assert row["success_rate"] == pytest.approx(row["successes"] / 3)
        assert row["success_interval"][0] <= row["success_rate"] <= row["success_interval"][1]
        assert row["queries_mean"] == pytest.approx(examples.queries.double().mean().item())
        assert row["queries_max"] == int(examples.queries.max()) >= row["queries_mean"] > 0
    assert [(row["attack"], row["crafted_on"]) for row in report["searches"]] == [
        (UNIFORM, "gateway"),
        (WALK, "gateway"),
    ]
    assert report["searches"][0]["queries_max"] <= 12
    assert sum(row["successes"] for row in report["searches"]) > 0
    (row,) = json.loads(crafted)["attacks"]
    assert (row["attack"], row["crafted_on"], json.loads(crafted)["searches"]) == (FGSM, "classifier", [])


def test_the_table_tells_successes_and_queries(bright):
    y = torch.tensor([0, 1, 2, 3])
    x = torch.from_numpy(bright(4))
    fooled, queries = torch.tensor([True, False, False, True]), torch.tensor([10, 20, 30, 41])
    found = HttpExamples(attack(WALK), x, x - 51, y, y, fooled, queries)
    clean = Measured("clean", x.numpy(), y.numpy(), y.numpy(), Told(y.numpy(), np.array([True, False, False, False])))
    table = report_table(Report.of("digits", Served("2", "flag"), [clean], [found], waits=7))
    assert [list(column.cells) for column in table.columns] == [
        [WALK], ["4"], ["2"], ["50.0 %"], ["6.8-93.2"], ["25.2"], ["41"], ["3.20"]
    ]  # fmt: skip
    assert "4 clean images: 100.0 % answered rightly, 25.0 % alerted" in table.caption
    assert "had no room 7 times" in table.caption


@pytest.fixture
def listener() -> Iterator[tuple[str, list[int]]]:
    """An address, and a list that grows when anybody connects to it."""
    connected: list[int] = []
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(0.05)
        stopped = threading.Event()

        def accept() -> None:
            while not stopped.is_set():
                try:
                    connection, address = listening.accept()
                except TimeoutError:
                    continue
                connected.append(address[1])
                connection.close()

        thread = threading.Thread(target=accept)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", connected
        stopped.set()
        thread.join()


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        (["--attack", "pgd"], "sees labels alone, or nothing, got pgd, which sees gradients"),
        (["--attack", UNIFORM, "--attack", "square"], "got square, which sees scores"),
        (["--attack", "bondary"], "Expected an attack such as fgsm"),
        (["--clean"], "--crafted-on gateway attacks, and --clean leaves attacks out."),
        (["--scenario", "transfer"], "are for a measurement without --url"),
    ],
)
def test_what_a_client_cannot_do_is_told_before_anything_is_sent(attacked_store, listener, asked, sentence):
    url, connected = listener
    status, output = evaluated(attacked_store, "--url", url, "--crafted-on", "gateway", *asked)
    assert status == 1
    assert sentence in told(output)
    time.sleep(0.1)
    assert not connected


def test_a_gateway_is_wanted_to_craft_on(attacked_store):
    status, output = evaluated(attacked_store, "--crafted-on", "gateway")
    assert status == 1
    assert "--crafted-on is for a gateway: name it with --url, or say --scenario for a version." in told(output)


def test_a_gateway_that_goes_away_is_told(serve, attacked_store):
    with serve(store=attacked_store, models="digits") as server:

        def leave() -> None:
            asked = 'portcullis_requests_total{model="digits",outcome="ok",version="2"}'
            while True:
                found = re.search(rf"{re.escape(asked)} (\S+)", httpx.get(f"{server.url}/metrics").text)
                if found and float(found[1]) > 20:
                    server.process.kill()
                    return
                time.sleep(0.02)

        leaving = threading.Thread(target=leave)
        leaving.start()
        arguments = ("--crafted-on", "gateway", "--attack", "boundary:steps=5000", "--limit", "20")
        status, output = evaluated(attacked_store, "--url", server.url, *arguments)
        leaving.join()
    assert status == 1
    assert f"portcullis: No gateway answers at {server.url}" in told(output)


def test_a_gateway_without_room_is_asked_again_for_so_long_and_no_longer(serve, bright, tmp_path, monkeypatch):
    with (
        serve(models="digits", alert_queue=2, alert_wait_seconds=0.1) as server,
        closing(PatientClient(server.url)) as client,
        closing(sqlite3.connect(tmp_path / "alerts.db", isolation_level=None, check_same_thread=False)) as blocker,
    ):
        blocker.execute("BEGIN IMMEDIATE")
        assert client.classify("digits", bright(2)).alerted.all()
        free = threading.Timer(0.5, blocker.execute, ["ROLLBACK"])
        free.start()
        start = time.monotonic()
        assert client.classify("digits", bright(1, seed=1)).alerted.all()
        free.join()
        assert client.waits == 1
        assert time.monotonic() - start > 1, "the gateway said to come back after a second"
        while "portcullis_alert_queue_depth 0.0" not in httpx.get(f"{server.url}/metrics").text:
            time.sleep(0.02)
        blocker.execute("BEGIN IMMEDIATE")
        monkeypatch.setattr(evaluate, "MOST_WAITS", 2)
        monkeypatch.setattr(evaluate, "LONGEST_WAIT", 0.05)
        assert client.classify("digits", bright(2, seed=2)).alerted.all()
        with pytest.raises(GatewayRefused, match="The gateway answered 429: No room for 1 more alerts"):
            client.classify("digits", bright(1, seed=3))
        assert client.waits == 3
        blocker.execute("ROLLBACK")
        with pytest.raises(GatewayRefused, match="404"):
            client.classify("letters", bright(1))
        assert client.waits == 3


@pytest.fixture(scope="module")
def evaluation_of(attacked_store, dataset) -> Callable[..., Evaluation]:
    """An evaluation of a detector and of noise, by a plan, with the images that substitutes learn from."""
    (subject,) = load_subjects(Store.open(attacked_store / "models"), ["digits@2"])
    classifier = subject.protected.classifier
    noisy = ProtectedClassifier(classifier, AdditiveNoise(0.1), NoDetector()).eval()
    asked = QueryImages(*(torch.from_numpy(part.images) for part in (dataset.fit, dataset.validation)))

    def made(plan: EvaluationPlan = PLAN, images: QueryImages | None = asked, first: int = 0) -> Evaluation:
        return Evaluation(
            classifier,
            subject.classifier.digest,
            undefended(classifier),
            [("lid", subject.fetched.digest, subject.protected), ("noise", "noise of 0.1", noisy)][first:],
            plan,
            *in_seeded_order(dataset.test, plan.seed),
            CPU,
            images,
        )

    return made


@pytest.fixture(scope="module")
def few_epochs() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plans, "SUBSTITUTE_EPOCHS", 5)
        patch.setattr(substitute_training, "KEEP_EVERY", 0.0)
        yield


@pytest.fixture(scope="module")
def transferred(evaluation_of, few_epochs, tmp_path_factory) -> EvaluationResult:
    return evaluation_of().run(ExampleCache(tmp_path_factory.mktemp("kept")), progress=quietly)


def rows_of(result: EvaluationResult, scenario: str) -> list[dict]:
    return [{**asdict(row), "seconds_per_image": None} for row in result.rows if row.scenario == scenario]


def test_examples_are_crafted_on_what_has_learnt_the_labels_of_the_whole_defense(transferred):
    assert transferred.complete
    found = rows_of(transferred, "transfer")
    places = [(row["defense"], row["attack"], row["form"]) for row in found]
    forms = ("as crafted", "rounded")
    assert places == [(name, each, form) for name in ("lid", "noise") for each in (FGSM, PGD) for form in forms]
    for row in found:
        assert (row["attempted"], row["sees"], row["norm"]) == (30, "nothing", "linf")
        substitute = row["substitute"]
        assert substitute["queries"] == 200
        assert 0.5 > substitute["commonest_share"] < substitute["agreement"] <= 1
        # All attempts count, whether they fool or not.
        assert row["resisted_of_attempts"] == pytest.approx(row["resisted"]["mean"])
        assert row["fooling"] == round(30 * (1 - row["corrected"]["mean"]))
        assert row["distortion_linf"] == pytest.approx(64 / 255, abs=0.01)
    first, second = (found[at]["substitute"] for at in (0, 4))
    assert first["held_out"] == second["held_out"] > 100
    assert first["agreement"] != second["agreement"], "each defense has a substitute of its own"
    assert all(row["substitute"] is None for row in rows_of(transferred, "B"))
    assert any(row["resisted"]["mean"] < 0.9 for row in found), "examples transfer"


def test_a_substitute_that_was_killed_in_training_is_taken_up_where_it_was(
    transferred, evaluation_of, few_epochs, tmp_path
):
    whole = {
        scenario: [row for row in rows_of(transferred, scenario) if row["defense"] == "noise"]
        for scenario in ("B", "transfer")
    }

    def dying(stage: str, done: int, total: int) -> None:
        if (stage, done) == (TRAINING, 3):
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        try:
            evaluation_of(first=1).run(ExampleCache(tmp_path), progress=dying)
        finally:
            os._exit(1)
    _, ended = os.waitpid(child, 0)
    assert os.WIFSIGNALED(ended)
    assert [path.stem for path in tmp_path.glob("*/*/*partial*")] == [f"{TRAINING}, partial"]
    out_of_time = evaluation_of(first=1).run(ExampleCache(tmp_path), deadline=0, progress=quietly)
    assert (out_of_time.complete, out_of_time.rows) == (False, ())
    seen: list[tuple[str, int]] = []
    for deadline, epochs in ((float("inf"), [3, 4, 5]), (0.0, [])):
        again = evaluation_of(first=1).run(
            ExampleCache(tmp_path), deadline=deadline, progress=lambda stage, done, _: seen.append((stage, done))
        )
        assert again.complete
        assert [done for stage, done in seen if stage == TRAINING] == epochs
        assert not [done for stage, done in seen if stage == ANSWERS], "what was answered is not asked again"
        assert {scenario: rows_of(again, scenario) for scenario in whole} == whole
        seen.clear()


def test_the_command_line_trains_substitutes_on_the_fit_split_and_goes_on_when_killed(attacked_store, tmp_path):
    asked = ["--scenario", "transfer", "--attack", FGSM, "--queries", "100", "--limit", "20", "--no-checks", "--json"]
    words = ["evaluate", "digits@2", "--data", "digits", "--store", str(attacked_store), *asked, "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    kept = tmp_path / "kept"
    command = [sys.executable, "-c", "from service.cli import app; app()", *words, "--cache", str(kept)]
    running = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not list(kept.glob(f"*/*/{ANSWERS}.safetensors")) and running.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    running.kill()
    _, errors = running.communicate()
    assert running.returncode == -signal.SIGKILL, errors.decode()
    (answers,) = kept.glob(f"*/*/{ANSWERS}.safetensors")
    answered = answers.stat().st_mtime_ns
    reports = []
    for cache in (kept, tmp_path / "elsewhere"):
        result = CliRunner().invoke(app, [*words, "--cache", str(cache)])
        assert result.exit_code == 0, result.output
        reports.append(json.loads(result.output))
    assert answers.stat().st_mtime_ns == answered
    rows = [[{**row, "seconds_per_image": None} for row in report["rows"]] for report in reports]
    assert rows[0] == rows[1]
    assert [row["scenario"] for row in rows[0]] == ["transfer", "transfer"]
    assert (rows[0][0]["substitute"]["queries"], reports[0]["plan"]["queries"]) == (100, 100)
    shown = CliRunner().invoke(app, [*words[:-3], *words[-2:], "--cache", str(kept)])
    assert "crafted on a substitute of the defense" in told(shown.output)


def test_images_to_ask_about_are_wanted_and_enough_of_them(evaluation_of, few_epochs, dataset, tmp_path):
    with pytest.raises(ValueError, match="Expected images that substitutes can ask the defenses about"):
        evaluation_of(PLAN, None)
    few = QueryImages(*(torch.from_numpy(dataset.fit.images[:count]) for count in (4, 9)))
    with pytest.raises(TooFewImages, match="Expected 10 or more images to ask about, one for each class, got 4"):
        evaluation_of(PLAN, few).run(ExampleCache(tmp_path), progress=quietly)
    evaluation_of(replace(PLAN, scenarios=("A", "B")), None)
    evaluation_of(replace(PLAN, attacks=(UNIFORM,)), None)


def test_white_boxes_on_any_model_are_transferred_and_no_others():
    names = {name for name in ATTACKS if suits(attack(name), "transfer")}
    assert {"fgsm", "pgd", "cw", "deepfool", "autoattack"} <= names
    assert not names & {"square", "boundary", "auna", "other-image"}
    assert all(ATTACKS[name].facts.on == "any" for name in names)


def test_a_white_box_that_its_transfer_outdoes_is_not_to_be_trusted(transferred):
    checks = {(each.defense, each.attacks): each for each in sanity.transfer_is_weaker(transferred.rows)}
    assert set(checks) == {(name, (each,)) for name in ("lid", "noise") for each in (FGSM, PGD)}
    rows = {(row.defense, row.attack, row.scenario): row for row in transferred.rows if row.form == "as crafted"}
    for (defense, (name,)), check in checks.items():
        white, blind = (sanity.won(rows[defense, name, scenario]) for scenario in ("B", "transfer"))
        assert check.passed == (blind <= white + 0.05)
        assert f"{name} wins {100 * white:.1f} % on {defense}, and {100 * blind:.1f} % where" in check.told
    masked = [replace(row, resisted_of_attempts={"B": 0.8, "transfer": 0.7}[row.scenario]) for row in transferred.rows]
    failed = list(sanity.transfer_is_weaker(masked))
    assert not any(check.passed for check in failed)
    for row in masked:
        outdone = row.scenario == "B" and row.attack != UNIFORM
        wanted = ("transfer wins no more than the white box",) if outdone else ()
        assert sanity.untrusted_by(failed, row) == wanted
