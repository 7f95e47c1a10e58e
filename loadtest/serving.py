"""Servers in processes of their own, started for a measurement and watched from outside."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from service.settings import Settings

READY_SECONDS = 90.0
STOP_SECONDS = 20.0
TOLD_LINES = 12
PREFIX = Settings.model_config["env_prefix"]
"""What the variables of a gateway's settings begin with, in capitals or not."""


class ServerNotReady(ChildProcessError):
    """A server ended, or was not ready in time."""

    def __init__(self, command: Sequence[str], reason: str, log: Path) -> None:
        self.reason = reason
        super().__init__("\n".join([f"{' '.join(command[:6])} {reason}; the end of its log:", *_last_lines(log)]))


class ServerEnded(ProcessLookupError):
    """A server that was ready ended before its measurement did."""

    def __init__(self, pid: int, log: Path) -> None:
        self.pid = pid
        lines = _last_lines(log)
        told = [f"Expected process {pid}, the server, to run until the end, but it is gone{';' if lines else '.'}"]
        super().__init__("\n".join([told[0] + " the end of its log:", *lines] if lines else told))


@dataclass(frozen=True)
class Running:
    """A server that is ready, with the processes it started; raises ``ServerEnded`` where it is gone."""

    url: str
    pid: int
    log: Path

    @property
    def memory(self) -> int:
        """Resident bytes of the server's processes together; what they share counts for each."""
        return int(self._sum(lambda process: process.memory_info().rss))

    @property
    def cpu_seconds(self) -> float:
        """Seconds of processor time that the server's processes have used."""
        return self._sum(lambda process: sum(process.cpu_times()[:2]))

    @property
    def ended(self) -> bool:
        """Whether the server is gone, as one is that has let go of its memory, or whose status nobody asked for yet."""
        try:
            first = psutil.Process(self.pid)
            return first.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD) or not first.memory_info().rss
        except psutil.NoSuchProcess:
            return True

    def ends_within(self, seconds: float) -> bool:
        """Wait so long at most for the server's end; say whether it came."""
        deadline = time.monotonic() + seconds
        while not self.ended and time.monotonic() < deadline:
            time.sleep(0.02)
        return self.ended

    def _sum(self, of: Callable[[psutil.Process], float]) -> float:
        """Add up what is told of each process; one that the server started and that ends meanwhile counts nothing."""
        try:
            first = psutil.Process(self.pid)
            total, children = of(first), first.children(recursive=True)
        except psutil.NoSuchProcess as error:
            raise ServerEnded(self.pid, self.log) from error
        if self.ended:
            raise ServerEnded(self.pid, self.log)
        for child in children:
            with suppress(psutil.NoSuchProcess):
                total += of(child)
        return total


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

    ``folder`` is its working directory. Settings of a gateway in this process's own environment are not handed on.
    Raises ``ServerNotReady`` with the end of its log.
    """
    with tempfile.TemporaryDirectory() as logs:
        log = Path(logs) / "server.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                env={**plain_environment(), **(environment or {})},
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
        environment = {f"{PREFIX}{name.upper()}": str(value) for name, value in given.items()}
        command = [sys.executable, "-c", "from service.cli import app; app()", "serve"]
        with running(command, port, ready="/v2/health/ready", environment=environment) as server:
            yield server


def plain_environment() -> dict[str, str]:
    """Return the environment without a gateway's settings: what is measured is what was asked for."""
    return {name: value for name, value in os.environ.items() if not name.upper().startswith(PREFIX)}


def free_port() -> int:
    """Return a port on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _last_lines(log: Path) -> list[str]:
    return log.read_text(errors="replace").splitlines()[-TOLD_LINES:] if log.is_file() else []


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
