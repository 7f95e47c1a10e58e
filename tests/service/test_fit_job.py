"""A fit's folder and lock: kept when it is interrupted, gone when it is done, one process at a time."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch

from service.fit_job import FitJob, FitJobs, FitNotFound, FitRunning, job_key

IDENTITY = {"plan": {"seed": 0, "attacks": ["fgsm"]}, "classifier": "ab" * 32, "regulator": None}


class Cut(Exception):
    """What ends a fit in these tests."""


@pytest.fixture
def jobs(tmp_path) -> FitJobs:
    return FitJobs(tmp_path / "fits")


def opened(jobs: FitJobs, identity=IDENTITY, **options):
    return jobs.open(identity, model="digits@1", dataset="digits", command="portcullis fit", **options)


def interrupt(jobs: FitJobs, *stages: str, identity=IDENTITY) -> FitJob:
    """Begin a fit, keep these stages and fail."""
    with suppress(Cut), opened(jobs, identity) as job:
        for name in stages:
            job.stages.save(name, {"x": torch.ones(3)}, {"seconds": 30})
        raise Cut
    return job


OTHER = """
import sys, time, torch
from pathlib import Path
from service.fit_job import FitJobs
import json
jobs = FitJobs(Path(sys.argv[1]))
with jobs.open(json.loads(sys.argv[2]), model="digits@1", dataset="digits", command="other") as job:
    job.stages.save("plan", {}, {"steps": 3})
    print("held", flush=True)
    time.sleep(60)
"""


@contextmanager
def another_process(folder: Path) -> Iterator[subprocess.Popen]:
    process = subprocess.Popen(
        [sys.executable, "-c", OTHER, str(folder), json.dumps(IDENTITY)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_the_key_depends_on_every_value_and_on_no_order():
    turned = {"regulator": None, "classifier": "ab" * 32, "plan": {"attacks": ["fgsm"], "seed": 0}}
    assert job_key(IDENTITY) == job_key(turned)
    assert len(job_key(IDENTITY)) == 16
    others = [
        {**IDENTITY, "regulator": "a@1"},
        {**IDENTITY, "plan": {"seed": 1, "attacks": ["fgsm"]}},
        {**IDENTITY, "plan": {"seed": 0, "attacks": ["fgsm", "pgd"]}},
    ]
    assert len({job_key(each) for each in [IDENTITY, *others]}) == 4


def test_an_interrupted_fit_is_resumed_with_what_it_kept(jobs, tmp_path):
    first = interrupt(jobs, "plan", "sample model")
    record = json.loads((tmp_path / "fits" / job_key(IDENTITY) / "job.json").read_text())
    assert (record["model"], record["dataset"], record["command"]) == ("digits@1", "digits", "portcullis fit")
    assert record["identity"] == IDENTITY
    with opened(jobs) as job:
        assert job.record == first.record
        assert job.stages.names() == ["plan", "sample model"]
        assert job.stages.load("plan").tensors["x"].tolist() == [1, 1, 1]
        told = job.told()
        assert "killed" not in told
        assert f"Resuming the fit {job_key(IDENTITY)}" in told
        assert "Kept, after 60 s of work: plan, sample model." in told
    assert jobs.unfinished() == []
    assert [path.name for path in (tmp_path / "fits").iterdir()] == [".lock"]


def test_a_fit_that_kept_nothing_leaves_nothing(jobs, tmp_path):
    first = interrupt(jobs)
    assert first.told() is None
    assert [path.name for path in (tmp_path / "fits").iterdir()] == [".lock"]
    with opened(jobs) as job:
        assert job.record.id != first.record.id


def test_a_fresh_fit_drops_what_was_kept_and_is_another(jobs):
    first = interrupt(jobs, "plan")
    with suppress(Cut), opened(jobs, fresh=True) as job:
        assert job.stages.names() == []
        assert job.told() is None
        assert job.record.id != first.record.id
        job.stages.save("statistics", {})
        raise Cut
    (left,) = jobs.unfinished()
    assert left.stages == ("statistics",)


def test_fits_of_different_identities_do_not_meet(jobs):
    other = {**IDENTITY, "regulator": "a@1"}
    interrupt(jobs, "plan")
    with opened(jobs, other) as job:
        assert job.stages.names() == []
        assert len(jobs.unfinished()) == 2
    assert [fit.key for fit in jobs.unfinished()] == [job_key(IDENTITY)]


def test_a_second_process_is_refused_with_the_folder_and_the_holder(jobs, tmp_path):
    with another_process(tmp_path / "fits") as process:
        with pytest.raises(FitRunning) as caught, opened(jobs):
            pytest.fail("the lock is held")
        assert caught.value.pid == process.pid
        assert str(tmp_path / "fits" / job_key(IDENTITY)) in str(caught.value)
        assert f"process {process.pid}" in str(caught.value)
        (row,) = jobs.unfinished()
        assert (row.pid, row.stages, row.record.command) == (process.pid, ("plan",), "other")
        with pytest.raises(FitRunning):
            jobs.discard(row.key)
        with opened(jobs, {**IDENTITY, "regulator": "a@1"}):
            pass


def test_a_second_fit_of_the_same_process_is_refused_too(jobs):
    with opened(jobs), pytest.raises(FitRunning, match=f"process {os.getpid()}"), opened(jobs):
        pytest.fail("the lock is held")


def test_a_killed_process_gives_the_lock_back_and_is_named(jobs, tmp_path):
    with another_process(tmp_path / "fits") as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        (row,) = jobs.unfinished()
        assert row.pid is None
        with suppress(Cut), opened(jobs) as job:
            assert f"Process {process.pid}, which was last at it, was killed." in job.told()
            raise Cut
    with opened(jobs) as job:
        assert "killed" not in job.told(), "the last one failed, and was not killed"


@pytest.mark.parametrize("content", ["", "{", '{"id": "x"}'])
def test_a_record_that_cannot_be_read_begins_the_fit_anew(jobs, tmp_path, content):
    first = interrupt(jobs, "plan")
    (tmp_path / "fits" / first.record.key / "job.json").write_text(content)
    (row,) = jobs.unfinished()
    assert (row.key, row.record, row.stages) == (first.record.key, None, ("plan",))
    with opened(jobs) as job:
        assert job.stages.names() == []
        assert job.record.id != first.record.id


def test_unfinished_fits_are_listed_oldest_first_with_their_size(jobs, tmp_path):
    assert jobs.unfinished() == []
    identities = [{**IDENTITY, "split_seed": seed} for seed in range(3)]
    for identity in identities:
        interrupt(jobs, "plan", identity=identity)
    assert [row.key for row in jobs.unfinished()] == [job_key(each) for each in identities]
    (tmp_path / "fits" / job_key(identities[0]) / "job.json").unlink()
    rows = jobs.unfinished()
    assert [row.key for row in rows] == [job_key(identities[index]) for index in (1, 2, 0)]
    for row in rows:
        files = [path for path in (tmp_path / "fits" / row.key).rglob("*") if path.is_file()]
        assert row.size == sum(path.stat().st_size for path in files) > 0


def test_a_discarded_fit_is_gone_and_an_unknown_one_is_named(jobs, tmp_path):
    kept = [interrupt(jobs, "plan", identity={"seed": seed}).record.key for seed in range(2)]
    jobs.discard(kept[0])
    assert [row.key for row in jobs.unfinished()] == [kept[1]]
    for key in (kept[0], "", "../fits"):
        with pytest.raises(FitNotFound, match=f"there are: {kept[1]}") as caught:
            jobs.discard(key)
        assert caught.value.key == key
    with pytest.raises(FitNotFound, match="there are: none"):
        FitJobs(tmp_path / "nowhere").discard(kept[0])
    assert not (tmp_path / "nowhere").exists()


def test_what_a_process_that_was_killed_while_removing_left_is_cleared(jobs, tmp_path):
    left = tmp_path / "fits" / ".removed-0"
    (left / "stages").mkdir(parents=True)
    (left / "stages" / "plan.safetensors").write_bytes(b"half")
    assert jobs.unfinished() == []
    with opened(jobs):
        assert not left.exists()
