import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import typer

from loadtest.connections import Message
from loadtest.endurance import PORTIONS, endure
from loadtest.serving import Running, ServerEnded, ServerNotReady, free_port, running
from loadtest.watching import memory_over_time
from service.cli.common import failures_told

TELLS = "import os; print(sorted(n for n in os.environ if n.upper().startswith('PORTCULLIS'))); raise SystemExit(3)"


def test_a_gateway_is_given_no_setting_of_the_shell(monkeypatch):
    monkeypatch.setenv("PORTCULLIS_THREADS", "7")
    monkeypatch.setenv("portcullis_mode", "shadow")
    with (
        pytest.raises(ServerNotReady, match=r"\['PORTCULLIS_PORT'\]"),
        running([sys.executable, "-c", TELLS], free_port(), ready="/", environment={"PORTCULLIS_PORT": "1"}),
    ):
        pass


def test_a_server_that_does_not_start_is_told_without_a_traceback(capsys):
    with pytest.raises(typer.Exit), failures_told(), running([sys.executable, "-c", TELLS], free_port(), ready="/"):
        pass
    assert "ended with status 3; the end of its log" in capsys.readouterr().err


@pytest.fixture
def sleeper():
    """A process that starts another one and waits; both sleep."""
    child = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
    process = subprocess.Popen([sys.executable, "-c", f"{child}; time.sleep(60)"], start_new_session=True)
    watched = psutil.Process(process.pid)
    while not watched.children():
        pass
    yield process
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_a_child_that_ends_while_it_is_counted_counts_nothing(sleeper, monkeypatch):
    server, children = Running("http://127.0.0.1:1", sleeper.pid, Path("none.log")), psutil.Process.children

    def ending(self: psutil.Process, recursive: bool = False) -> list[psutil.Process]:
        found = children(self, recursive)
        for child in found:
            child.kill()
            while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
                pass
        return found

    both = server.memory
    monkeypatch.setattr(psutil.Process, "children", ending)
    with memory_over_time(server, 0.01) as held:
        pass
    assert held.ended is None
    assert 0 < held.samples[-1][1] < both
    assert server.cpu_seconds > 0


def test_a_server_that_is_gone_ends_the_samples_and_is_told(sleeper):
    server = Running("http://127.0.0.1:1", sleeper.pid, Path("none.log"))
    with memory_over_time(server, 0.01) as held:
        os.killpg(sleeper.pid, signal.SIGKILL)
        while not server.ended:
            pass
    assert held.most() > 1_000_000
    assert f"Expected process {sleeper.pid}, the server, to run until the end" in str(held.ended)
    assert all(size > 0 for _, size in held.samples), "one that waits for its status to be asked for holds nothing"
    with pytest.raises(ServerEnded):
        _ = server.cpu_seconds
    with memory_over_time(server) as nothing:
        pass
    assert (nothing.samples, nothing.most()) == ([], 0)


def test_an_endurance_run_ends_with_its_server(answering, sleeper):
    def ends_at_twenty(number):
        if number == 20:
            os.killpg(sleeper.pid, signal.SIGKILL)
            sleeper.wait()
        return 0.0, b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", False

    with answering(ends_at_twenty) as address:
        server = Running(f"http://{address.host}:{address.port}", sleeper.pid, Path("none.log"))
        result = endure(server, [Message("/", (), b"")], 10 * PORTIONS, 2, lambda _: None)
    assert "to run until the end" in result["ended"]
    assert result["requests"] == 30
    assert len(result["memory_bytes"]) == 3
    assert all(result["memory_bytes"])
