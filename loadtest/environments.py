"""Environments of their own for other servers, installed from the package index."""

import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")
INSTALL_SECONDS = 1800
TOLD_LINES = 3


class PeerUnavailable(RuntimeError):
    """A server to compare with cannot be installed here."""

    def __init__(self, name: str, reason: str) -> None:
        self.name, self.reason = name, reason
        super().__init__(f"{name} could not be installed: {reason}")


class Environment:
    """A virtual environment with the packages of one server, under ``root``."""

    def __init__(self, root: Path, name: str, requirements: Sequence[str]) -> None:
        self.name = name
        self.folder = (root / name).resolve()
        self.requirements = tuple(requirements)
        self._installed = self.folder / "installed.txt"

    def program(self, name: str) -> str:
        """Return the path of a program in the environment."""
        return str(self.folder / "bin" / name)

    def install(self) -> None:
        """Make the environment unless it is there with the same requirements; raises ``PeerUnavailable``."""
        wanted = "\n".join(self.requirements)
        if self._installed.exists() and self._installed.read_text() == wanted:
            return
        if not (self.folder / "pyvenv.cfg").exists():
            venv.create(self.folder)
        command = [*self._pip(), "install", "--quiet", *self.requirements]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_SECONDS, check=False)
        except subprocess.TimeoutExpired as error:
            raise PeerUnavailable(self.name, f"it took more than {INSTALL_SECONDS} s") from error
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or [done.stderr.strip()]
            raise PeerUnavailable(self.name, " ".join(errors[-TOLD_LINES:])[-600:])
        self._installed.write_text(wanted)

    def versions(self) -> list[str]:
        """Return what is installed, each as ``name==version``."""
        return subprocess.run([*self._pip(), "freeze"], capture_output=True, text=True, check=True).stdout.split()

    def _pip(self) -> list[str]:
        return [*PIP, "--python", self.program("python")]


def own_versions() -> list[str]:
    """Return what is installed beside this file's interpreter, each as ``name==version``."""
    command = [*PIP, "freeze", "--exclude-editable"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
