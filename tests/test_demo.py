"""The demonstration, as a newcomer runs it."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from model_store import Store
from service.demo.build import NAME
from service.repository import MODELS

pytestmark = pytest.mark.long

PORTCULLIS = [sys.executable, "-c", "from service.cli import app; app()"]


@pytest.fixture(scope="module")
def first_run(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    folder = tmp_path_factory.mktemp("demo")
    return folder, demonstrate(folder, "--once")


def demonstrate(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [*PORTCULLIS, "demo", "--folder", str(folder), "--port", "18000", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)


def test_the_demonstration_keeps_its_promise_and_says_what_to_try(first_run):
    _, run = first_run
    assert run.returncode == 0, run.stdout + run.stderr
    for kind in ("clean", "fgsm", "pgd-stop"):
        assert re.search(rf"│ {kind} +│", run.stdout), kind
    alerts = re.search(r"(\d+) images were alerted, and (\d+) alerts are on record", run.stdout)
    assert alerts is not None
    assert int(alerts[1]) == int(alerts[2]) > 100
    assert "/v1/models/digits/predict" in run.stdout
    assert "/metrics" in run.stdout


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_second_start_reuses_the_store_and_the_printed_curl_line_works(first_run, stop):
    folder, _ = first_run
    process = subprocess.Popen(
        [*PORTCULLIS, "demo", "--folder", str(folder), "--port", "18000"],
        stdout=subprocess.PIPE,
        text=True,
        # What is run in a shell's background ignores the interrupt, and hands that on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        start = time.monotonic()
        printed = ""
        assert process.stdout is not None
        while "The gateway stays up" not in printed:
            line = process.stdout.readline()
            assert line, f"the demonstration ended: {printed}"
            printed += line
        assert time.monotonic() - start < 60
        command = re.search(r"curl -H .*--data-binary @(\S+) (\S+/predict)", printed)
        assert command is not None
        answer = httpx.post(command[2], content=Path(command[1]).read_bytes(), headers={"Content-Type": "image/png"})
        assert answer.json()["predictions"][0]["verdict"] in ("accepted", "alert")
    finally:
        process.send_signal(stop)
        assert process.wait(timeout=30) == 0
    with pytest.raises(httpx.ConnectError):
        httpx.get(command[2])
    assert Store.open(folder / "store" / MODELS).versions(NAME) == [1, 2]
