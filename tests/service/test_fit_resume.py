"""A fit that is killed, stopped, cut off while it publishes or out of disk goes on, to the result of one left alone."""

import json
import re
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from defenses.coophance import FitPlan, RegulatorPlan
from loadtest.kill_fit import (
    WEIGHTS,
    FitFailed,
    FitProcess,
    copy_of,
    difference,
    fit_undisturbed,
    kill_and_resume,
    published_by,
)
from model_store import Fetched, Store
from service.cli import app
from service.datasets import load_dataset
from service.fit_coophance import publish_coophance
from service.fit_job import FitJobs

pytestmark = pytest.mark.long

QUICK = ["--data", "digits", "--examples", "60", "--attack", "fgsm:epsilon=48/255", "--strength", "0.8"]
QUICK += ["--most-features", "64", "--inverse-penalty", "0.001"]
TRAINED = [*QUICK, "--epochs", "0.3", "--batch-size", "64", "--channels", "8", "--skip-channels", "4", "--no-flip"]
TRAINED += ["--stop", "last"]


def portcullis(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, re.sub(r"\s+", " ", result.output)


def fit(store: Path) -> tuple[int, str]:
    return portcullis("fit", "coophance", "digits", *TRAINED, "--store", store)


def unfinished(store: Path) -> list[dict]:
    return json.loads(portcullis("fit", "list", "--json", "--store", store)[1])


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Have every fit here, in this process or another, add up in the same order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def store(digits_store) -> Path:
    """A store with a small classifier of digits, trained for real."""
    return digits_store


@pytest.fixture(scope="module")
def undisturbed(store, tmp_path_factory) -> SimpleNamespace:
    """A fit that was left alone: its store, what it published, and its seconds."""
    copy = copy_of(store, tmp_path_factory.mktemp("undisturbed") / "store", "digits")
    seconds = fit_undisturbed(copy, "digits", TRAINED)
    return SimpleNamespace(store=copy, version=published_by(copy, store, "digits"), seconds=seconds)


def check_equal(expected: Fetched, found: Fetched) -> None:
    differences = difference(expected, found)
    # Not to the bit: the order of a sum may depend on where memory lies.
    assert differences.pop(WEIGHTS) < 1e-3
    assert differences == {}, "every metric is that of the fit that was left alone"
    assert found.manifest.threshold == pytest.approx(expected.manifest.threshold, abs=1e-3)


def test_a_fit_that_is_killed_three_times_gives_the_same(store, undisturbed, tmp_path):
    killed, stores = kill_and_resume(
        store, tmp_path, "digits", TRAINED, kills=3, longest=0.7 * undisturbed.seconds, seed=4
    )
    assert len(killed) == 3
    for each in stores:
        check_equal(undisturbed.version, published_by(each, store, "digits"))


def test_a_fit_that_is_stopped_says_so_and_is_nobody_elses_meanwhile(store, tmp_path):
    copy = copy_of(store, tmp_path / "store", "digits")
    first = FitProcess(copy, "digits", TRAINED)
    second = FitProcess(copy, "digits", TRAINED)
    with pytest.raises(FitFailed, match=f"This fit is being run by process {first.pid}, in {copy}/fits/"):
        second.finish()
    while not first.kept():
        time.sleep(0.05)
    assert portcullis("fit", "discard", unfinished(copy)[0]["key"], "--store", copy)[0] == 1
    assert first.stop_after(0, signal.SIGTERM) == 143
    assert "portcullis: Stopped by SIGTERM. What was finished is kept: run the same command again" in first.told()
    (left,) = unfinished(copy)
    assert left["pid"] is None
    assert left["record"]["model"] == "digits@1"
    assert left["record"]["dataset"] == "digits"
    assert f"{left['key']} │ digits" in portcullis("fit", "list", "--store", copy)[1]
    assert Store.open(copy / "models").versions("digits") == [1]
    assert portcullis("fit", "discard", "0123456789abcdef", "--store", copy)[0] == 1
    assert portcullis("fit", "discard", left["key"], "--store", copy)[0] == 0
    assert unfinished(copy) == []


class Cut(Exception):
    """What a kill is in a test of one process: nothing after it is done."""


def test_a_fit_goes_on_after_a_full_disk_and_after_being_cut_off_while_publishing(
    store, undisturbed, tmp_path, monkeypatch, files_of_at_most
):
    copy = copy_of(store, tmp_path / "store", "digits")
    with files_of_at_most(300_000):  # the examples to fit on are smaller, those to choose by are larger
        status, output = fit(copy)
    assert status == 1
    for part in ("The disk is full: ", "No defense was published.", "run the same command again to go on"):
        assert part in output, part
    (left,) = unfinished(copy)
    assert "fit examples, fgsm:epsilon=48/255" in left["stages"]
    assert Store.open(copy / "models").versions("digits") == [1]

    publish = Store.publish

    def published_and_cut(self, name, draft, folder):
        publish(self, name, draft, folder)
        raise Cut(draft.kind)

    with monkeypatch.context() as patched:
        patched.setattr(Store, "publish", published_and_cut)
        for kind in ("regulator", "coophance"):
            with pytest.raises(Cut, match=kind):
                fit(copy)
            assert [each["key"] for each in unfinished(copy)] == [left["key"]]
    status, output = fit(copy)
    assert status == 0
    assert "This fit was finished before: it is published as digits@2." in output
    check_equal(undisturbed.version, published_by(copy, store, "digits"))
    assert Store.open(copy / "regulators").versions("digits-1x32x32") == [1]


def test_the_precision_that_a_machine_trains_in_is_part_of_what_a_fit_is(store, tmp_path, monkeypatch):
    copy = copy_of(store, tmp_path / "store", "digits")
    classifier = Store.open(copy / "models").fetch("digits", 1)
    manifest = classifier.manifest
    dataset = load_dataset(["digits"], manifest.input, labels=manifest.labels, split_seed=0)
    small = RegulatorPlan(channels=(8,), skip_channels=(4,))
    plan = FitPlan(attacks=("fgsm:epsilon=48/255",), examples=20, regulator=small)

    def cut_once_something_is_kept(stage: str, done: int, total: int) -> None:
        if "validation" in stage:
            raise Cut

    for has, precision in ((True, "auto"), (False, "bfloat16"), (True, "auto")):
        monkeypatch.setattr("defenses.coophance.plan.has_bfloat16", lambda device, has=has: has)
        asked = replace(plan, regulator=replace(plan.regulator, precision=precision))
        with pytest.raises(Cut):
            publish_coophance(copy, classifier, dataset, asked, device="cpu", progress=cut_once_something_is_kept)
    (left,) = FitJobs(copy / "fits").unfinished()
    assert left.record.identity["plan"]["regulator"]["precision"] == "bfloat16"


def test_a_regulator_is_used_again_and_not_published_again(undisturbed, tmp_path):
    copy = tmp_path / "store"
    shutil.copytree(undisturbed.store, copy)
    arguments = [*QUICK, "--regulator", "digits-1x32x32@1", "--thresholds", "class"]
    # Of some classes there are few calibration images.
    arguments += ["--budget", "0.1", "--store", copy]
    status, output = portcullis("fit", "coophance", "digits", *arguments)
    assert status == 0, output
    assert "was fitted on" not in output
    assert Store.open(copy / "regulators").versions("digits-1x32x32") == [1]
    again = Store.open(copy / "models").fetch("digits", 3).manifest
    assert again.options["regulator_version"] == undisturbed.version.manifest.options["regulator_version"]
    assert "training" not in again.options
    assert len(again.threshold) == len(again.labels) == 10
    assert (
        again.metrics["clean_accuracy_undefended"] == undisturbed.version.manifest.metrics["clean_accuracy_undefended"]
    )
