"""Servers in processes of their own, started for a measurement and watched from outside."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

READY_SECONDS = 90.0
STOP_SECONDS = 20.0
TOLD_LINES = 12


class ServerNotReady(RuntimeError):
    """A server ended, or was not ready in time."""

    def __init__(self, command: Sequence[str], reason: str, log: Path) -> None:
        self.reason = reason
        lines = log.read_text(errors="replace").splitlines()[-TOLD_LINES:]
        super().__init__("\n".join([f"{' '.join(command[:6])} {reason}; the end of its log:", *lines]))


@dataclass(frozen=True)
class Running:
    """A server that is ready, with the processes it started."""

    url: str
    pid: int
    log: Path

    @property
    def memory(self) -> int:
        """Resident bytes of the server's processes together; what they share counts for each."""
        return sum(process.memory_info().rss for process in self._processes())

    @property
    def cpu_seconds(self) -> float:
        """Seconds of processor time that the server's processes have used."""
        times = [process.cpu_times() for process in self._processes()]
        return sum(time.user + time.system for time in times)

    def _processes(self) -> list[psutil.Process]:
        first = psutil.Process(self.pid)
        return [first, *first.children(recursive=True)]


@contextmanager
def running(
    command: Sequence[str],
    port: int,
    *,
    ready: str,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
    seconds: float = READY_SECONDS,
) -> Iterator[Running]:
    """Run a server's command until the block ends; yields once ``ready``, a path, answers 200.

    ``folder`` is its working directory. Raises ``ServerNotReady`` with the end of its log.
    """
    with tempfile.TemporaryDirectory() as logs:
        log = Path(logs) / "server.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                env={**os.environ, **(environment or {})},
                cwd=folder,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            url = f"http://127.0.0.1:{port}"
            _await(process, f"{url}{ready}", seconds, command, log)
            yield Running(url, process.pid, log)
        finally:
            _stop(process)


@contextmanager
def gateway(store: Path, **settings: object) -> Iterator[Running]:
    """Run a gateway on a store, with settings by name; alerts go to a folder that is gone afterwards.

    Raises ``ServerNotReady``.
    """
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        given = {
            "store": store.resolve(),
            "port": port,
            "database": f"sqlite+aiosqlite:///{Path(folder) / 'alerts.db'}",
            "inputs": Path(folder) / "inputs",
            **settings,
        }
        environment = {f"PORTCULLIS_{name.upper()}": str(value) for name, value in given.items()}
        command = [sys.executable, "-c", "from service.cli import app; app()", "serve"]
        with running(command, port, ready="/v2/health/ready", environment=environment) as server:
            yield server


def free_port() -> int:
    """Return a port on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _await(process: subprocess.Popen[bytes], url: str, seconds: float, command: Sequence[str], log: Path) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ServerNotReady(command, f"ended with status {process.returncode}", log)
        try:
            if httpx.get(url, timeout=5).is_success:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.1)
    raise ServerNotReady(command, f"was not ready within {seconds:g} s", log)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the server and everything it started."""
    started = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    for number, patience in ((signal.SIGTERM, STOP_SECONDS), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, number)
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:
            pass
        break
    process.wait()
    for child in psutil.wait_procs(started, timeout=1)[1]:
        child.kill()
