import json
import os
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from time import monotonic

import numpy as np
import psutil
import pytest
from typer.testing import CliRunner

from loadtest import drive as driving
from loadtest.connections import Message
from loadtest.drive import broken_limits
from loadtest.endurance import PORTIONS, endure
from loadtest.endurance import verdict as flatness
from loadtest.image_sets import traffic
from loadtest.overload import (
    ROOM,
    Acts,
    allow_open_files,
    connections_for,
    judge,
    least_rate,
    play,
    recovered_after,
    settings_of,
)
from loadtest.runs import Run
from loadtest.serving import Running
from service.settings import Settings

OK_ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
ROOT = Path(__file__).parents[2]


def run_of(seconds, statuses=None, intended=None, duration=10.0):
    seconds = np.asarray(seconds, float)
    statuses = np.full(len(seconds), 200) if statuses is None else np.asarray(statuses)
    intended = np.linspace(0, duration, len(seconds), endpoint=False) if intended is None else np.asarray(intended)
    count = len(seconds)
    return Run(intended, seconds, statuses, np.zeros(count), np.zeros(count, bool), np.full(count, ""), duration)


@pytest.fixture
def good() -> Acts:
    """What passes every limit: p50 10 ms, p99 30 ms at 80 %, and a tenth refused at 150 %."""
    steady = run_of([0.01] * 980 + [0.03] * 20)
    over = run_of([0.05] * 900 + [0.002] * 100, [200] * 900 + [429] * 100)
    return Acts(steady, steady, over, steady, 100_000_000, 110_000_000)


def failed(acts: Acts) -> list[str]:
    return [verdict["expected"] for verdict in judge(acts) if not verdict["passed"]]


def test_what_keeps_all_limits_passes(good):
    assert len(judge(good)) == 9
    assert failed(good) == []


@pytest.mark.parametrize(
    ("act", "run", "broken"),
    [
        ("steady", run_of([0.01] * 990 + [0.03] * 10, [200] * 999 + [503]), "at 80 % every answer is 200"),
        ("steady", run_of([0.01] * 950 + [0.06] * 50), "at 80 % p99 is under 5 times p50"),
        ("over", run_of([0.05] * 1000), "at 150 % requests are refused with 429"),
        ("over", run_of([0.05] * 1000, [200] * 800 + [429] * 199 + [500]), "at 150 % every other answer is 200"),
        (
            "over",
            run_of([0.07] * 900 + [0.002] * 100, [200] * 900 + [429] * 100),
            "at 150 % accepted requests' p99 is within 2 times that at 80 %",
        ),
        (
            "recovery",
            run_of([0.1] * 70 + [0.01] * 30),
            "within 5 s all is as at 80 % again",
        ),
    ],
)
def test_each_limit_can_be_broken(good, act, run, broken):
    assert broken in failed(Acts(**{**vars(good), act: run}))


def test_memory_that_grows_breaks_its_limit(good):
    assert failed(Acts(**{**vars(good), "over_memory": 126_000_000})) == [
        "at 150 % memory is within 1.25 times that at 80 %"
    ]


def test_who_waits_for_a_connection_and_a_server_that_ends_break_their_limits(good):
    over = replace(good.over, waited=np.arange(1000) < 3)
    assert failed(replace(good, over=over)) == ["no request waits for a connection of the client"]
    assert failed(replace(good, ended="The server is gone.", over_memory=0)) == ["the gateway runs to the end"]


def test_a_full_queue_and_more_fit_the_clients_connections():
    assert connections_for({}) == Settings.model_fields["queue_images"].default + ROOM
    assert connections_for({"queue_images": "5000"}) == 5000 + ROOM
    with pytest.raises(ValueError, match="Expected queue_images as a whole number, got 'many'"):
        connections_for({"queue_images": "many"})


def test_open_files_are_allowed_as_far_as_the_system_does():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (400, hard))
        allow_open_files(500)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (500, hard)
        allow_open_files(300)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (500, hard), "nothing is taken away"
        if hard != resource.RLIM_INFINITY:
            with pytest.raises(ValueError, match=f"Expected to be allowed {hard + 1} open files"):
                allow_open_files(hard + 1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_capacity_is_what_the_worst_window_shows():
    brisk, slow = np.arange(0, 5, 0.01), np.arange(5, 10, 0.02)
    moments = np.concatenate([brisk, slow, [11.0]])
    run = run_of(np.full(len(moments), 0.001), intended=moments, duration=11.5)
    assert least_rate(run, 11.5) == 50, "the rest of a window counts for nothing"
    refused = run_of(np.full(len(moments), 0.001), np.where(moments < 1, 429, 200), moments, 11.5)
    assert least_rate(refused, 6) == 80
    assert least_rate(run, 4) == run.rate


def test_recovery_counts_from_the_last_bad_second():
    slow_at_first = run_of([0.5] * 20 + [0.01] * 80)
    assert recovered_after(slow_at_first, 0.1) == 2
    assert recovered_after(run_of([0.01] * 100), 0.1) == 0
    assert recovered_after(run_of([0.01] * 100, [200] * 99 + [429]), 0.1) is None


def test_memory_is_flat_within_a_share_of_what_it_settled_at():
    rising = [100] * 5 + [100 + n for n in range(PORTIONS - 4)]
    assert flatness([50, 80, 90, 95, *[100] * (PORTIONS - 3)], 0.05) == {
        "settled_bytes": 100,
        "furthest": 0.0,
        "flat": True,
    }
    assert not flatness(rising, 0.05)["flat"]
    assert flatness(rising, 0.40)["flat"]


def test_limits_of_a_run_are_told():
    run = run_of([0.01] * 90 + [0.2] * 10, [200] * 99 + [503])
    assert broken_limits(run, 500, 0.02) == []
    assert broken_limits(run, 100, 0.0) == [
        "Expected a p99 of at most 100 ms, measured 200.0 ms.",
        "Expected at most 0 % of answers other than 200, got 1.00 %.",
    ]
    assert broken_limits(run_of([]), 100, 1.0) == ["Expected requests, but none was sent."]


def test_settings_are_names_with_values():
    assert settings_of(["threads=1", "modes={}"]) == {"threads": "1", "modes": "{}"}
    with pytest.raises(ValueError, match="name=value"):
        settings_of(["threads"])


def test_a_driver_ends_with_1_where_a_limit_is_broken(server, images_file):
    common = [server.url, "digits", "--images", str(images_file)]
    done = CliRunner().invoke(driving.app, ["closed", *common, "--seconds", "0.3", "--pid", str(server.pid)])
    told = json.loads(done.output)
    assert done.exit_code == 0, done.output
    assert told["statuses"] == {"200": told["requests"]}
    assert len(told["memory"]) >= 2
    assert told["memory"][0]["bytes"] > 10_000_000
    assert told["server_cpu_milliseconds"] > 0
    arguments = ["--seconds", "0.3", "--rate", "50", "--spacing", "even", "--body", "binary", "--p99", "0.001"]
    slow = CliRunner().invoke(driving.app, ["open", *common, *arguments])
    assert slow.exit_code == 1
    told = json.loads(slow.output)
    assert told["requests"] == 15
    assert told["broken_limits"][0].startswith("Expected a p99 of at most 0.001 ms")
    nobody = CliRunner().invoke(driving.app, ["closed", "http://127.0.0.1:9", *common[1:], "--seconds", "0.1"])
    assert nobody.exit_code == 1
    assert "ConnectionRefusedError" in json.loads(nobody.output)["failures"]


def test_the_acts_of_an_overload_are_played_on_a_gateway(server, image_set):
    messages = traffic(image_set, 0.1, "digits", "png", count=32)
    told = []
    seconds = (0.5, 0.5, 0.5, 0.5)
    acts = play(server, messages, concurrency=8, connections=256, seconds=seconds, told=told.append)
    assert len(told) == 3
    assert acts.capacity.errors == 0
    assert len(acts.steady.seconds) == pytest.approx(0.8 * 0.5 * acts.capacity.rate, rel=0.5)
    assert len(acts.over.seconds) > len(acts.steady.seconds)
    assert acts.over_memory > 10_000_000
    assert acts.ended is None
    assert len(judge(acts)) == 9


def test_a_recovery_begins_with_what_waits_at_the_switch(answering):
    free_at = [0.0]

    def in_turn(number):
        free_at[0] = max(free_at[0], monotonic()) + 0.02
        return free_at[0] - monotonic(), OK_ANSWER, False

    with answering(in_turn) as address:
        slow = Running(f"http://{address.host}:{address.port}", os.getpid(), Path("none.log"))
        message, seconds = Message("/", (), b""), (0.6, 0.5, 1.0, 0.5)
        acts = play(slow, [message], concurrency=1, connections=200, seconds=seconds, told=lambda _: None)
    assert acts.over.percentile(99) > 0.2, "a backlog of a third of a second's requests"
    assert acts.recovery.seconds[:5].min() > 0.5 * acts.over.seconds[-5:].max()
    assert acts.recovery.intended.min() >= 0
    assert acts.recovery.intended.max() < 0.5
    assert "within 5 s all is as at 80 % again" in failed(acts)


def test_memory_is_noted_over_all_requests(server, image_set):
    told = []
    result = endure(server, traffic(image_set, 0.0, "digits", "binary", count=8), 200, 4, told.append)
    assert (result["requests"], result["errors"], len(result["memory_bytes"])) == (200, 0, PORTIONS + 1)
    assert told[-1].startswith("200 requests")
    assert abs(result["memory_bytes"][-1] / psutil.Process(server.pid).memory_info().rss - 1) < 0.2


def locust(server, images_file, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "locust", "-f", "loadtest/profiles/smoke.py", "--headless", "--only-summary"]
    given = ["--host", server.url, "--images", str(images_file), "--model", "digits", "--time-scale", "0.05"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [*command, *given, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def test_a_profile_ends_with_the_status_of_its_limits(server, images_file):
    good = locust(server, images_file, "--attack-share", "0.3", "--p99", "5000")
    assert good.returncode == 0, good.stdout + good.stderr
    for body in ("png", "binary", "json"):
        assert f"POST     {body}" in good.stdout + good.stderr
    slow = locust(server, images_file, "--p99", "0.5")
    assert slow.returncode == 1
    assert "Expected a p99 of at most 0.5 ms" in slow.stderr
    lost = locust(server, images_file, "--model", "cats", "--p99", "5000")
    assert lost.returncode == 1
    assert "Expected at most 0 % of the requests failed" in lost.stderr


def test_a_profile_without_images_does_not_begin(server, tmp_path):
    done = locust(server, tmp_path / "none.npz")
    assert done.returncode != 0
    assert "none.npz holds no images" in done.stderr


def test_what_a_profile_may_show():
    told = json.loads(
        subprocess.run(
            [
                sys.executable,
                "-c",
                "import json; from loadtest.profiles.limits import Limits, Seen;"
                "limits = Limits(p99=100, refused=0.1);"
                "print(json.dumps([limits.broken(seen) for seen in ("
                "Seen(100, {'status 429': 10}, 100), Seen(100, {'status 429': 11}, 50),"
                "Seen(100, {'status 503': 1}, 50), Seen(0, {}, 0))]))",
            ],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    )
    assert told == [
        [],
        ["Expected at most 10 % of the requests refused, but 11 of 100 were."],
        ["Expected at most 0 % of the requests failed, but 1 of 100 were."],
        ["Expected requests, but none was answered."],
    ]
